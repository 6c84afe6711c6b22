"""AiT in a training loop of timm's own parts: averaged weights, resumed runs, faults, and every switch once."""

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from models import memories
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import Tensor, nn

from timm_ait import AssociativeTransformer

B, CLASSES = 5, 7


def make_model(**kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(1)
    args = dict(num_classes=CLASSES, depth=2, embed_dim=32, num_heads=2, bottleneck=13)
    return timm.create_model('test_ait', **dict(args, **kwargs)).train()


def vit_layout(**kwargs: Any) -> AssociativeTransformer:
    args = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES, bottleneck=13)
    return timm.create_model('ait_small', **dict(args, **kwargs)).train()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 32, 32, generator=generator), torch.randint(0, CLASSES, (B,), generator=generator)


def assert_sane(model: nn.Module) -> None:
    for memory in memories(model):
        torch.testing.assert_close(memory.norm(dim=-1), torch.ones(len(memory)))


class Run:
    """A training run as timm's train.py keeps it."""

    def __init__(self, folder: Path, epochs: int = 4) -> None:
        self.model = make_model(drop_path_rate=0.1, proj_drop_rate=0.1)
        self.task = ClassificationTask(self.model, nn.CrossEntropyLoss(), verbose=False)
        self.optimizer = create_optimizer_v2(self.model, opt='adamw', lr=1e-3, weight_decay=0.05)
        self.ema = ModelEmaV3(self.model, decay=0.5)
        self.scheduler, _ = create_scheduler_v2(self.optimizer, 'cosine', num_epochs=epochs)
        folder.mkdir(exist_ok=True)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, model_ema=self.ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
        )
        self.losses: list[float] = []

    def epoch(self, epoch: int) -> None:
        torch.manual_seed(epoch)
        self.model.train()
        images, target = batch(epoch)
        loss = self.task(images, target)['loss']
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(self.model)
        self.scheduler.step(epoch + 1)
        self.losses.append(loss.item())
        self.saver.save_checkpoint(epoch, metric=float(epoch))


def test_a_run_stopped_in_the_middle_ends_bit_identical(tmp_path: Path) -> None:
    whole, first = Run(tmp_path / 'whole'), Run(tmp_path / 'halves')
    for epoch in range(4):
        whole.epoch(epoch)
    for epoch in range(2):
        first.epoch(epoch)

    second = Run(tmp_path / 'halves')
    file = str(tmp_path / 'halves' / 'last.pth.tar')
    start = resume_checkpoint(second.model, file, second.optimizer, log_info=False)
    second.ema.module.load_state_dict(torch.load(file, weights_only=False)['state_dict_ema'])
    second.scheduler.step(start)
    for epoch in range(start, 4):
        second.epoch(epoch)

    assert first.losses + second.losses == whole.losses
    for ours, theirs in ((second.model, whole.model), (second.ema.module, whole.ema.module)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_a_process_killed_while_it_writes_loses_no_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / 'killed.py'
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from pathlib import Path
        from test_training import Run
        run = Run(Path({str(tmp_path)!r}) / 'run')
        run.epoch(0)
        def half(state, path, **kwargs):
            Path(path).write_bytes(b'half a checkpoint')
            os._exit(9)
        torch.save = half
        run.epoch(1)
        """)
    )
    assert subprocess.run([sys.executable, str(script)], env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode == 9
    run = Run(tmp_path / 'run')
    assert resume_checkpoint(run.model, str(tmp_path / 'run' / 'last.pth.tar'), run.optimizer, log_info=False) == 1
    run.epoch(1)
    assert_sane(run.model)


def test_averaged_weights_read_a_memory_of_unit_rows() -> None:
    """The average of unit rows is shorter than one: the layer reads its direction."""
    model = make_model()
    ema = ModelEmaV3(model, decay=0.5)
    for i in range(3):
        model(batch(i)[0])
        ema.update(model)
    stored = ema.module.blocks[1].mlp.memory
    read = []
    ema.module.blocks[1].mlp.linear_transform.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ema.module(batch(9)[0])
    assert not torch.allclose(stored.norm(dim=-1), torch.ones(len(stored)), atol=1e-3)
    torch.testing.assert_close(read[0], F.normalize(stored, dim=-1))
    assert not ema.module.training


@pytest.mark.parametrize('poison', [torch.nan, torch.inf, -torch.inf])
def test_training_goes_on_after_an_image_that_is_not_finite(poison: float) -> None:
    model = make_model()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3)
    scaler = NativeScaler(device='cpu')
    for i in range(4):
        images, target = batch(i)
        before = memories(model)
        if i == 1:
            images[2, 0, 3, 5] = poison
        with torch.autocast('cpu', torch.float16):
            loss = F.cross_entropy(model(images), target)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        kept = all(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))
        assert kept == (i == 1)
        assert loss.isfinite() == (i != 1)
    assert_sane(model)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_that_is_not_finite_leaves_memory_and_parameters_to_the_scaler() -> None:
    model = make_model()
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)
    scaler = NativeScaler(device='cpu')
    images, target = batch(0)
    parameters = [p.clone() for p in model.parameters()]
    scaler(F.cross_entropy(model(images), target) * torch.inf, optimizer, parameters=model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert_sane(model)  # the batch itself was sound, and stays written


def test_compiled_steps_do_not_recompile_and_agree_with_eager() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    eager, model = make_model(), make_model()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(4):
        images, target = batch(i)
        for m in (eager, compiled):
            m.zero_grad()
            F.cross_entropy(m(images), target).backward()
        torch.testing.assert_close(memories(model), memories(eager), rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.compile(model.eval(), backend='aot_eager')(images), eager.eval()(images))


def test_layer_decay_gives_every_block_its_own_rate() -> None:
    model = vit_layout(depth=3)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    group_of = {id(p): group for group in optimizer.param_groups for p in group['params']}
    names = dict(model.named_parameters())
    assert {id(p) for p in names.values()} == set(group_of)
    rates = [group_of[id(names[f'blocks.{i}.mlp.key.weight'])]['lr_scale'] for i in range(3)]
    assert rates[0] < rates[1] < rates[2] < group_of[id(names['head.weight'])]['lr_scale'] == 1.0
    assert group_of[id(names['pos_embed'])]['weight_decay'] == 0.0
    assert group_of[id(names['blocks.0.mlp.linear_transform.bias'])]['weight_decay'] == 0.0
    assert group_of[id(names['blocks.0.mlp.linear_transform.weight'])]['weight_decay'] == 0.1


SWITCHES: dict[str, Callable[[], nn.Module]] = {
    'drop path': lambda: make_model(drop_path_rate=0.3),
    'layer scale': lambda: vit_layout(init_values=1e-2),
    'channels last': lambda: make_model().to(memory_format=torch.channels_last),
    'bfloat16 model': lambda: make_model().to(torch.bfloat16),
    'patch drop': lambda: vit_layout(patch_drop_rate=0.5),
    'register tokens': lambda: vit_layout(reg_tokens=2),
    'average pool': lambda: vit_layout(global_pool='avg', class_token=False),
    'attention pool': lambda: vit_layout(global_pool='map'),
    'a ViT with a workspace': lambda: vit_layout(retrieval_scale=0.0),
    'detached write': lambda: make_model(write_grad=False),
    'three retrieval steps': lambda: make_model(retrieval_steps=3),
}


@pytest.mark.parametrize('make', SWITCHES.values(), ids=SWITCHES)
def test_the_loss_falls_with(make: Callable[[], nn.Module]) -> None:
    model = make()
    dtype = model.patch_embed.proj.weight.dtype
    optimizer = create_optimizer_v2(model, opt='adamw', lr=3e-3)
    images, target = batch(0)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(images.to(dtype)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_sane(model)
    assert all(memory.dtype == torch.float32 for memory in memories(model))


def test_a_vit_teaches_an_ait() -> None:
    teacher = timm.create_model('test_vit', img_size=32, num_classes=CLASSES)
    model = make_model()
    twin = copy.deepcopy(model)
    images, target = batch(0)
    task = LogitDistillationTask(
        model, teacher, criterion=nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=2.0, verbose=False
    )
    task(images, target)['loss'].backward()

    twin.auto_balance = False
    by_hand = LogitDistillationTask(
        twin, teacher, criterion=nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=2.0, verbose=False
    )
    (by_hand(images, target)['loss'] + twin.balance_loss()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_image_sizes_may_change_from_step_to_step() -> None:
    model = vit_layout(dynamic_img_size=True)
    for size in (32, 48, 24):
        loss = F.cross_entropy(model(torch.randn(B, 3, size, size)), batch(0)[1])
        loss.backward()
        assert_sane(model)
