"""The training loop of the experiments."""

import errno
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock

import loop
import pytest
import timm
import torch
import torch.nn.functional as F
from loop import DivergedError, Settings, evaluate, fit, normalize, weight_sum
from record import write_whole
from runs import run_each
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset

N, CLASSES, SIDE, BATCH = 23, 3, 8, 5
PER_EPOCH = N // BATCH  # 4 batches; 3 images of an epoch are left out
SETTINGS = Settings(lr=1e-2, epochs=3, batch_size=BATCH, seed=7)
PLAIN = Settings(lr=0.0, warmup_lr=0.0, weight_decay=0.0, batch_size=BATCH, flip=False, shift=0)  # changes nothing


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (N, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return pixels, torch.arange(N) % CLASSES


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """The same images, with noise from the random numbers of the process that loads them if it is wanted."""

    def __init__(self, noise: float) -> None:
        self.noise, self.seen, self.epochs = noise, [], []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.seen.append(i)
        pixels, labels = images()
        return pixels[i] / 127.5 - 1 + self.noise * torch.randn(3, SIDE, SIDE), labels[i]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def make_ait() -> nn.Module:
    """A model with all that a checkpoint must hold: weights, memory and dropout."""
    torch.manual_seed(2)
    shape: dict[str, Any] = dict(img_size=SIDE, depth=1, embed_dim=24, num_heads=2, num_classes=CLASSES)
    memory: dict[str, Any] = dict(num_slots=7, slot_dim=5, write_heads=3, bottleneck=11)
    return timm.create_model('test_ait', **shape, **memory, proj_drop_rate=0.3)


def make_linear() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))


class StoppedError(Exception):
    pass


def stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let every run stop with an error before this step."""
    train = loop.Run.train

    def stopping(run: loop.Run, batch: list[Tensor]) -> None:
        if run.step == step:
            raise StoppedError
        train(run, batch)

    patch.setattr(loop.Run, 'train', stopping)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize('save_every', [None, 3, 5])
@pytest.mark.parametrize(
    ('kind', 'workers'), [('tensors', 0), ('data set', 0), ('data set', 1)], ids=['tensors', 'data set', 'worker']
)
def test_a_run_that_was_stopped_ends_with_the_same_weights_and_log(
    kind: str, workers: int, save_every: int | None, tmp_path: Path
) -> None:
    data = images() if kind == 'tensors' else Noisy(noise=0.0 if workers else 0.5)
    whole = make_ait()
    log = fit(whole, data, SETTINGS, workers=workers).log
    with pytest.MonkeyPatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(StoppedError):
            fit(make_ait(), data, SETTINGS, tmp_path / 'run.pt', save_every, workers)
    torch.manual_seed(13)  # another process has other random numbers
    resumed = make_ait()
    assert fit(resumed, data, SETTINGS, tmp_path / 'run.pt', save_every, workers).log == log
    assert_equal(resumed, whole)


def test_a_run_in_two_sittings_names_both_commits_and_adds_up_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, 'commit', lambda: 'first')
    with pytest.MonkeyPatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(StoppedError):
            fit(make_linear(), images(), SETTINGS, tmp_path / 'run.pt', save_every=3)
    state = torch.load(tmp_path / 'run.pt', weights_only=True)
    torch.save({**state, 'seconds': 1000.0}, tmp_path / 'run.pt')
    monkeypatch.setattr(loop, 'commit', lambda: 'second')
    record = fit(make_linear(), images(), SETTINGS, tmp_path / 'run.pt').record()
    assert record['commits'] == ['first', 'second']
    assert 1000 < record['seconds'] < 1100
    monkeypatch.setattr(loop, 'commit', lambda: 'third')
    assert fit(make_linear(), images(), SETTINGS, tmp_path / 'run.pt').record()['commits'] == ['first', 'second']


def test_a_finished_run_is_read_and_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_ait()
    log = fit(model, images(), SETTINGS, tmp_path / 'run.pt').log
    monkeypatch.setattr(loop.Run, 'train', lambda *args: pytest.fail('trained'))
    again = make_ait()
    assert fit(again, images(), SETTINGS, tmp_path / 'run.pt').log == log
    assert_equal(again, model)


def test_a_killed_save_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / 'run.pt'
    write_whole(path, lambda file: torch.save({'step': 3}, file))

    def killed(file: BinaryIO) -> None:
        file.write(b'half of a checkpoint')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, killed)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True) == {'step': 3}
    write_whole(path, lambda file: torch.save({'step': 5}, file))
    assert torch.load(path, weights_only=True) == {'step': 5}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_gets_its_room_back(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        def write(data: bytes) -> int:
            if file.tell() > 1000:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return file.write(data)

        torch.save({'weights': torch.zeros(1000)}, Mock(write=write))

    with pytest.raises(OSError, match=r'run\.pt cannot be written: .*No space left on device'):
        write_whole(tmp_path / 'run.pt', fill)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_or_one_of_other_images_is_refused(tmp_path: Path) -> None:
    path, settings, (pixels, labels) = tmp_path / 'run.pt', Settings(lr=0.01, batch_size=BATCH), images()
    fit(make_linear(), (pixels, labels), settings, path)
    with pytest.raises(ValueError, match='is of a run with data='):
        fit(make_linear(), (pixels.flip(-1), labels), settings, path)
    for content in (path.read_bytes()[:100], path.read_bytes()[:1000], b'text'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r'run\.pt is damaged; remove it'):
            fit(make_linear(), (pixels, labels), settings, path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r'run\.pt lacks .*: an older version wrote it; remove the file'):
        fit(make_linear(), (pixels, labels), settings, path)


def test_after_a_run_that_diverged_the_others_follow(capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, seed: int) -> float:
        if seed == 1:
            raise DivergedError('expected a finite loss')
        return 50.0

    with pytest.raises(ValueError, match=r'^ait, seed 1: expected a finite loss; vit, seed 1: expected a finite loss$'):
        run_each([('ait', 1), ('ait', 2), ('vit', 1), ('vit', 2)], run)
    assert 'ait, seed 2: 50.00 %' in (said := capsys.readouterr().out)
    assert 'vit, seed 2: 50.00 %' in said


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(make_linear(), images(), Settings(lr=0.01, batch_size=BATCH), tmp_path / 'run.pt')
    with pytest.raises(ValueError, match=r'run\.pt is of a run with lr=0\.01, seed=0; use the same settings or remove'):
        fit(make_linear(), images(), Settings(lr=0.02, seed=3, batch_size=BATCH), tmp_path / 'run.pt')


def test_a_checkpoint_of_a_model_with_another_start_is_refused(tmp_path: Path) -> None:
    settings, other = Settings(lr=0.01, batch_size=BATCH), make_linear()
    nn.init.constant_(other[1].weight, 0.5)
    run = fit(make_linear(), images(), settings, tmp_path / 'run.pt')
    with pytest.raises(ValueError, match=rf'is of a run with first_weights={run.first_weights}; use the same'):
        fit(other, images(), settings, tmp_path / 'run.pt')
    assert run.record()['first_weights'] != weight_sum(other)


def test_a_run_without_a_terminal_says_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    fit(make_linear(), images(), Settings(lr=0.01, epochs=2, batch_size=BATCH), name='linear')
    assert capsys.readouterr().err.count('linear: ') == 2


@pytest.mark.parametrize(('save_every', 'step'), [(None, 4), (3, 3)])
def test_a_loss_that_is_not_finite_is_an_error_and_is_not_saved(
    save_every: int | None, step: int, tmp_path: Path
) -> None:
    model = make_linear()
    nn.init.constant_(model[1].weight, float('nan'))
    with pytest.raises(ValueError, match=f'a finite loss, got nan before step {step}; lower the learning rate'):
        fit(model, images(), SETTINGS, tmp_path / 'run.pt', save_every)
    assert not (tmp_path / 'run.pt').exists()


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'run.pt'
    fit(make_linear(), images(), Settings(lr=0.01, batch_size=BATCH), path)
    state = torch.load(path, weights_only=True)
    older = {key: value for key, value in state.items() if key not in ('seconds', 'commits')}
    torch.save(older, path)
    with pytest.raises(ValueError, match=r'run\.pt lacks seconds, commits: an older version wrote it; remove the file'):
        fit(make_linear(), images(), Settings(lr=0.01, batch_size=BATCH), path)


def test_fewer_images_than_a_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match='at least one batch of 29 images, got 23; lower batch_size'):
        fit(make_linear(), images(), Settings(lr=0.01, batch_size=29))


def test_the_log_has_the_mean_loss_and_accuracy_of_each_epoch() -> None:
    pixels, labels = images()
    data = pixels[: 4 * BATCH], labels[: 4 * BATCH]
    model = make_linear()
    log = fit(model, data, PLAIN).log
    logits = model(normalize(data[0], PLAIN))
    assert log == [
        {
            'loss': pytest.approx(F.cross_entropy(logits, data[1]).item(), rel=1e-5),
            'accuracy': 100 * (logits.argmax(-1) == data[1]).double().mean().item(),
        }
    ]


@pytest.mark.parametrize(('steps', 'epochs'), [(3, 1), (4, 1), (9, 3)])
def test_a_number_of_steps_replaces_the_epochs(steps: int, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(steps, monkeypatch)  # which would raise if one step more was done
    log = fit(make_linear(), images(), Settings(lr=0.01, steps=steps, batch_size=BATCH)).log
    assert len(log) == epochs


def test_each_epoch_takes_every_image_at_most_once_in_an_order_of_its_own() -> None:
    data = Noisy(noise=0.0)
    fit(make_linear(), data, SETTINGS)
    epochs = [data.seen[i : i + PER_EPOCH * BATCH] for i in range(0, len(data.seen), PER_EPOCH * BATCH)]
    assert data.epochs == [0, 1, 2]
    assert [len(set(epoch)) for epoch in epochs] == [PER_EPOCH * BATCH] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = Noisy(noise=0.0)
    fit(make_linear(), other, Settings(lr=1e-2, batch_size=BATCH, seed=8))
    assert other.seen != epochs[0]


def test_the_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, data = make_linear(), Noisy(noise=0.5)
    torch.manual_seed(5)
    fit(model, data, SETTINGS)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_with_dropout_depends_on_its_own_seed_alone() -> None:
    models = [make_ait() for _ in range(3)]
    for model, caller, seed in zip(models, (1, 2, 2), (7, 7, 8), strict=True):
        torch.manual_seed(caller)
        fit(model, images(), replace(SETTINGS, epochs=1, flip=False, shift=0, seed=seed))
    assert_equal(models[0], models[1])
    assert not torch.equal(models[1].head.weight, models[2].head.weight)


def test_weights_decay_and_biases_do_not() -> None:
    models = [make_linear() for _ in range(2)]
    black = torch.full((N, 3, SIDE, SIDE), 0.0), images()[1]  # no gradient of the weights
    for model, decay in zip(models, (0.0, 0.5), strict=True):
        fit(model, black, replace(PLAIN, lr=0.1, weight_decay=decay))
    (_, plain), (_, decayed) = models
    assert torch.equal(plain.bias, decayed.bias)
    assert decayed.weight.norm() < 0.99 * plain.weight.norm()


def test_gradients_are_cut_to_a_length_of_one_and_those_of_older_steps_are_gone() -> None:
    pixels, labels = images()
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group['params']]
        norms.append(torch.stack(gradients).norm().item())

    for scale in (100.0, 0.01):
        handle = register_optimizer_step_pre_hook(note)
        try:
            fit(make_linear(), (scale * normalize(pixels, PLAIN), labels), replace(PLAIN, batch_size=N, steps=3))
        finally:
            handle.remove()
    assert norms[:3] == pytest.approx([1.0] * 3, abs=1e-4)
    assert norms[3] < 0.5
    assert norms[3:] == pytest.approx([norms[3]] * 3, rel=1e-4)


def test_a_model_that_was_evaluated_is_trained_in_training_mode() -> None:
    model, modes = make_linear().eval(), set()
    model[1].register_forward_hook(lambda module, args, out: modes.add(module.training))
    fit(model, images(), PLAIN)
    assert modes == {True}


def test_the_learning_rate_grows_then_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    train = loop.Run.train

    def noting(run: loop.Run, batch: list[Tensor]) -> None:
        train(run, batch)
        rates.append(run.optimizer.param_groups[0]['lr'])

    monkeypatch.setattr(loop.Run, 'train', noting)
    fit(make_linear(), images(), Settings(lr=1.0, steps=20, warmup_lr=0.5, batch_size=BATCH))
    cosine = [0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(2, 20)]
    assert rates == pytest.approx([0.5, 0.75, *cosine])


def test_mixed_precision_computes_in_bfloat16() -> None:
    model, dtypes = make_linear(), set()
    model[1].register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    fit(model, images(), Settings(lr=0.01, batch_size=BATCH, bfloat16=True))
    evaluate(model, images(), Settings(lr=0.01, bfloat16=True))
    assert dtypes == {torch.bfloat16}
    assert model[1].weight.dtype == torch.float32


class WithQuestion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor, question: Tensor) -> Tensor:
        assert x.shape[1:] == (3, SIDE, SIDE)
        return self.head(question)


def test_more_inputs_go_to_the_model_between_images_and_labels() -> None:
    pixels, labels = images()
    data = (pixels, torch.randn(N, 2), labels)
    model = WithQuestion()
    before = model.head.weight.clone()
    fit(model, data, Settings(lr=0.1, batch_size=BATCH))
    assert not torch.equal(model.head.weight, before)
    right = (model.head(data[1]).argmax(-1) == labels).sum().item()
    assert evaluate(model, data, PLAIN) == pytest.approx(100 * right / N)


@pytest.mark.parametrize('batch_size', [1, 7, 250])
def test_the_accuracy_is_that_of_all_images_at_any_batch_size(batch_size: int) -> None:
    model, (pixels, labels) = make_linear(), images()
    right = (model(normalize(pixels, PLAIN)).argmax(-1) == labels).sum().item()
    assert 0 < right < N
    assert evaluate(model, (pixels, labels), PLAIN, batch_size) == pytest.approx(100 * right / N)
    assert evaluate(model, Noisy(noise=0.0), PLAIN, batch_size) == pytest.approx(100 * right / N)


def test_pixels_are_normalized_and_floats_are_not() -> None:
    settings = Settings(lr=0.1, mean=(0.5, 0.2, 0.0), std=(0.5, 0.4, 1.0))
    pixels = torch.tensor([[0, 255], [51, 255], [0, 51]], dtype=torch.uint8).view(1, 3, 1, 2)
    expected = torch.tensor([[-1.0, 1.0], [0.0, 2.0], [0.0, 0.2]]).view(1, 3, 1, 2)
    torch.testing.assert_close(normalize(pixels, settings), expected)
    assert normalize(expected, settings) is expected


@pytest.mark.parametrize('what', ['nothing', 'flip', 'shift', 'turn'])
def test_training_sees_the_images_as_the_settings_change_them(what: str) -> None:
    pixels, labels = normalize(images()[0], PLAIN), images()[1]
    model, seen = make_linear(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    change = dict(nothing={}, flip=dict(flip=True), shift=dict(shift=2), turn=dict(turn=True))[what]
    fit(model, (pixels, labels), replace(PLAIN, epochs=3, **change))
    padded = F.pad(pixels, (2, 2, 2, 2), mode='reflect')
    allowed = {
        'nothing': [pixels],
        'flip': [pixels, pixels.flip(-1)],
        'shift': [padded[..., y : y + SIDE, x : x + SIDE] for y, x in itertools.product(range(5), repeat=2)],
        'turn': [pixels.rot90(quarters, dims=(-2, -1)) for quarters in range(4)],
    }[what]
    which = torch.stack([(torch.cat(seen)[:, None] == one).flatten(2).all(-1).any(-1) for one in allowed])
    assert which.any(0).all()
    assert which.any(1).sum() > len(allowed) // 2  # more than half of all changes occur
