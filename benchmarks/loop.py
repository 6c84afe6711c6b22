"""The training loop of the experiments: a classifier, from images in memory or from a data set.

A run may be stopped at any time. It goes on from its last checkpoint and ends with the same weights, on a CPU bit for
bit. That is why batches come from `images.py` and not from timm's loaders, which cannot start within an epoch.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images import Data, augment, batches, checksum, in_order, length, turn
from record import commit, write_whole
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    """What decides the result of a training run, apart from model and data.

    Attributes:
        lr: Highest learning rate.
        epochs: Passes over the data. Ignored if ``steps`` is given.
        steps: Number of batches.
        batch_size: The last images of an epoch are left out if they fill no batch.
        opt: Optimizer, as timm calls it.
        weight_decay: Not applied to norms and biases.
        warmup_lr: First learning rate. It grows in the first tenth of the steps, then falls to 0.
        flip: Mirror every image with probability 1/2.
        shift: Move every image by up to so many pixels in x and y; its edge is reflected.
        turn: Turn every image by 0, 90, 180 or 270 degrees. With ``flip``, one of the eight symmetries of a square.
        mean: Of the pixels, for each channel; pixels lie in 0..1.
        std: Standard deviation of the pixels, for each channel.
        seed: Of the order of the images, the augmentation and the model's dropout.
        bfloat16: Compute with bfloat16 autocast.
    """

    lr: float
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 128
    opt: str = 'adamw'
    weight_decay: float = 0.05
    warmup_lr: float = 1e-5
    flip: bool = True
    shift: int = 2
    turn: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    seed: int = 0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        for name in ('epochs', 'steps', 'batch_size'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')


class OutOfTimeError(Exception):
    """A run was stopped at its deadline."""


class DivergedError(ValueError):
    """A run has a loss that is not finite."""


def fit(
    model: nn.Module,
    data: Data,
    settings: Settings,
    checkpoint: Path | None = None,
    save_every: int | None = None,
    workers: int = 0,
    name: str = '',
    deadline: float | None = None,
) -> 'Run':
    """Train a classifier. If the checkpoint exists, go on from there.

    Args:
        model: On the device to train on, with its first weights. Parts of it with a method ``start_epoch`` are told
            when an epoch starts.
        data: See :data:`Data`. A data set with a method ``set_epoch`` is told the number of each epoch. With workers,
            its items may depend on index and epoch alone, or a run that was stopped within an epoch ends elsewhere.
        settings: See :class:`Settings`.
        checkpoint: File to save to and to go on from.
        save_every: Steps between two checkpoints; an epoch by default. The last step is always saved.
        workers: Processes that load a data set.
        name: Title of the progress bar.
        deadline: When to stop before the end, after a step and a checkpoint; seconds of ``time.monotonic``.

    Returns:
        The run, at its last step.

    Raises:
        OutOfTimeError: At the deadline, unless that step was the last.
        ValueError: If there are fewer images than a batch, if the checkpoint is of another run, or if the loss is not
            finite.
    """
    images = length(data)
    per_epoch = images // settings.batch_size
    if per_epoch == 0:
        raise ValueError(f'expected at least one batch of {settings.batch_size} images, got {images}; lower batch_size')
    steps = settings.epochs * per_epoch if settings.steps is None else settings.steps
    run = Run(model, settings, steps, images, checksum(data))
    with torch.random.fork_rng([run.device] if run.device.type == 'cuda' else []):
        torch.manual_seed(settings.seed)
        if checkpoint is not None and checkpoint.exists():
            run.load(checkpoint)
        bar = tqdm(total=run.steps, initial=run.step, desc=name, disable=None)
        while run.step < run.steps:
            epoch, done = divmod(run.step, per_epoch)
            if done == 0:
                start_epoch(model)
            for batch in batches(data, settings.batch_size, settings.seed, epoch, done, workers):
                run.train(batch)
                bar.update()
                is_last = run.step == run.steps
                if run.step % per_epoch == 0 or is_last:
                    bar.set_postfix(seen := run.end_epoch())
                    if bar.disable:  # no terminal, but perhaps a log
                        print(f'{name}: {run.step} of {run.steps} steps, {seen}', file=sys.stderr, flush=True)
                is_late = deadline is not None and time.monotonic() >= deadline and not is_last
                if checkpoint is not None and (run.step % (save_every or per_epoch) == 0 or is_last or is_late):
                    write_whole(checkpoint, partial(torch.save, run.state()))
                if is_late:
                    raise OutOfTimeError(f'stopped after step {run.step} of {run.steps}')
                if is_last:
                    break
        bar.close()
    run.seconds = run._elapsed()
    return run


def start_epoch(model: nn.Module) -> None:
    """Tell the parts of a model that an epoch starts."""
    for module in model.modules():
        if hasattr(module, 'start_epoch'):
            module.start_epoch()


class Run:
    """A training run: its state, one step, and the way to save and load it.

    Attributes:
        log: For each epoch, the mean training loss and the training accuracy in percent.
        seconds: How long it has taken, over all its sittings, up to the last end of one.
        commits: Of the code of each sitting that trained.
        data: Checksum of the data, None where they are drawn.
        first_weights: A number that stands for them.
    """

    def __init__(self, model: nn.Module, settings: Settings, steps: int, images: int, data: str | None) -> None:
        self.model, self.settings, self.steps, self.data = model.train(), settings, steps, data
        self.first_weights = weight_sum(model)
        own = dict(steps=steps, images=images, data=data, first_weights=self.first_weights)
        self.identity = {**asdict(settings), **own}
        self.optimizer = create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            sched='cosine',
            num_epochs=steps,  # for timm, each step is an epoch of one update
            updates_per_epoch=1,
            step_on_epochs=False,
            warmup_epochs=int(0.1 * steps),
            warmup_lr=settings.warmup_lr,
        )
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.seconds, self._start = 0.0, time.monotonic()
        self.commits = [commit()]
        self.device = next(model.parameters()).device
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct images, images

    def train(self, batch: list[Tensor]) -> None:
        """Train on one batch: images (B, 3, H, W), other inputs if there are any, labels (B,)."""
        settings = self.settings
        self.schedule.step_update(self.step)
        images, *others, labels = (x.to(self.device, non_blocking=True) for x in batch)
        if settings.flip or settings.shift:
            images = augment(images, settings.flip, settings.shift)
        if settings.turn:
            images = turn(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bfloat16):
            logits = self.model(normalize(images, settings), *others)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        correct = (logits.argmax(dim=-1) == labels).sum()
        self.sums += torch.stack([loss.detach().double() * len(labels), correct, correct.new_tensor(len(labels))])

    def end_epoch(self) -> dict[str, float]:
        """Add the means of this epoch to the log and start the next one."""
        self._check()
        loss, correct, images = self.sums.tolist()
        self.sums.zero_()
        self.log.append({'loss': loss / images, 'accuracy': 100 * correct / images})
        return self.log[-1]

    def state(self) -> dict[str, Any]:
        """Return all that a run needs to go on."""
        self._check()
        return {
            'identity': self.identity,
            'step': self.step,
            'log': self.log,
            'seconds': self._elapsed(),
            'commits': self.commits,
            'sums': self.sums,
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'cpu_rng': torch.get_rng_state(),
            'cuda_rng': torch.cuda.get_rng_state(self.device) if self.device.type == 'cuda' else None,
        }

    def record(self) -> dict[str, Any]:
        """Return what is written beside a result."""
        return {
            'log': self.log,
            'seconds': round(self.seconds, 2),
            'commits': self.commits,
            'data': self.data,
            'first_weights': self.first_weights,
        }

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._start

    def _check(self) -> None:
        loss = self.sums[0].item()
        if not math.isfinite(loss):
            raise DivergedError(f'expected a finite loss, got {loss} before step {self.step}; lower the learning rate')

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it was made with other settings, images or first weights, or by an older version, or if it is
                damaged.
        """
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
        except Exception as error:  # of many kinds: whatever the file holds is taken for a pickle
            raise ValueError(f'{path} is damaged; remove it to start anew: {error}') from error
        missing = [key for key in self.state() if not isinstance(state, dict) or key not in state]
        if missing:
            raise ValueError(f'{path} lacks {", ".join(missing)}: an older version wrote it; remove the file')
        saved = state['identity']
        differ = [f'{key}={saved[key]}' for key, value in self.identity.items() if saved.get(key, value) != value]
        if differ:
            raise ValueError(f'{path} is of a run with {", ".join(differ)}; use the same settings or remove the file')
        self.step, self.log, self.seconds = state['step'], state['log'], state['seconds']
        here = self.commits if self.step < self.steps else []
        self.commits = list(dict.fromkeys(state['commits'] + here))
        self.sums.copy_(state['sums'])
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        torch.set_rng_state(state['cpu_rng'])
        if state['cuda_rng'] is not None:
            torch.cuda.set_rng_state(state['cuda_rng'], self.device)


def evaluate(model: nn.Module, data: Data, settings: Settings, batch_size: int = 250, workers: int = 0) -> float:
    """Measure the top-1 accuracy, in percent. The model is left in evaluation mode."""
    return accuracy(*predict(model, data, settings, batch_size, workers))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images whose highest logit (N, C) is that of their label (N,), in percent."""
    return 100 * (logits.argmax(dim=-1) == labels).double().mean().item()


@torch.inference_mode()
def predict(
    model: nn.Module, data: Data, settings: Settings, batch_size: int = 250, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of all images, in their order. The model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for batch in in_order(data, torch.arange(length(data)), batch_size, workers, torch.Generator()):
        images, *others, labels = (x.to(device) for x in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            found.append((model(normalize(images, settings), *others), labels))
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, labels


def normalize(images: Tensor, settings: Settings) -> Tensor:
    """Turn uint8 images (B, C, H, W) into floats of the given mean and standard deviation; leave floats as they are."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (settings.mean, settings.std))
    return (images / 255 - mean) / std


def weight_sum(model: nn.Module) -> float:
    """The absolute values of all weights, summed and rounded: another number for another start of a model.

    Rounded, since processors differ in the last digit of a random number.
    """
    return float(f'{sum(p.detach().double().abs().sum().item() for p in model.parameters()):.6g}')
