"""Fine-tune an AiT on real handwritten digits with the parts of timm: ``python -m timm_ait.demo``.

scikit-learn brings 1,797 digits, which are written as an image folder of 32x32 PNG files. The demo trains on four
fifths of them, then saves, reloads and validates the checkpoint as any user of timm would. At the end it draws a
picture of the predictions and of the use of the memory.
"""

import argparse
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, CheckpointSaver, accuracy, random_seed
from torch import Tensor, nn
from tqdm import tqdm  # comes with huggingface-hub

from timm_ait import BlockReport, format_report
from timm_ait.report import watch

MODEL = 'ait_tiny_conv4_32'
CLASSES = 10
LR, WEIGHT_DECAY = 1e-3, 0.05
MARKER = 'written by timm_ait.demo'  # a file beside the images, so that no others are ever replaced
SCRIPTS = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{version}'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='python -m timm_ait.demo', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=Path, default=Path('output/demo'), help='folder for images and checkpoints')
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--workers', type=int, default=1, help='number of processes that load images')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads; 1 gives the same results on every run')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--min-accuracy', type=float, default=95.0, help='in percent; the demo fails below it')
    args = parser.parse_args(argv)
    for name, least in dict(epochs=1, batch_size=1, threads=1, workers=0, seed=0).items():
        if getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} must be at least {least}, got {getattr(args, name)}')
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition('. ')[0]
        parser.error(f'PyTorch cannot compute on --device {args.device} here; take cpu. {why}')
    return args


def write_digits(folder: Path, seed: int) -> None:
    """Write scikit-learn's digits as ``folder/{train,val}/<digit>/<number>.png``, RGB, 32x32; four fifths are train.

    Raises:
        ValueError: If the folder holds files that the demo did not write.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    files = {path for path in folder.rglob('*') if not path.is_dir()}
    images = set(folder.glob('*/[0-9]/[0-9][0-9][0-9][0-9].png')) if (folder / MARKER).exists() else set()
    if others := sorted(files - images - {folder / MARKER}):
        raise ValueError(f'the demo did not write {others[0]}; remove it, or choose another folder with --output')
    for path in images:  # another seed splits them in another way
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    digits = load_digits()
    numbers = range(len(digits.target))
    splits = train_test_split(numbers, test_size=0.2, stratify=digits.target, random_state=seed)
    for split, chosen in zip(('train', 'val'), splits, strict=True):
        for number in chosen:
            path = folder / split / str(digits.target[number]) / f'{number:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[number] * (255 / 16)).astype('uint8')  # 8x8, grey levels 0..16
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert('RGB').save(path)


def make_loader(model: nn.Module, folder: Path, split: str, args: argparse.Namespace) -> Any:
    """Make a timm loader of ``folder/split``. Training crops the images a little, but never mirrors a digit."""
    config = resolve_data_config({}, model=model)
    is_training = split == 'train'
    return create_loader(
        create_dataset('', root=str(folder), split=split, is_training=is_training),
        input_size=config['input_size'],
        batch_size=args.batch_size,
        is_training=is_training,
        use_prefetcher=False,
        scale=(0.7, 1.0),
        hflip=0.0,
        color_jitter=None,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )


def train_epoch(
    task: ClassificationTask, loader: Any, optimizer: torch.optim.Optimizer, scheduler: Any, epoch: int, epochs: int
) -> None:
    """Train one epoch with a progress bar. The learning rate changes with every batch."""
    task.train()
    losses = AverageMeter()
    bar = tqdm(loader, desc=f'epoch {epoch + 1:2d}/{epochs}', leave=False, disable=None)  # None: only on a terminal
    for step, (images, targets) in enumerate(bar, start=epoch * len(loader) + 1):
        loss = task(images.to(task.device), targets.to(task.device))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step)
        losses.update(loss.item(), len(images))
        bar.set_postfix(loss=f'{losses.avg:.3f}')


@torch.inference_mode()
def validate(model: nn.Module, loader: Any, device: str) -> float:
    """Measure the top-1 accuracy, in percent."""
    model.eval()
    top1 = AverageMeter()
    for images, targets in loader:
        (acc,) = accuracy(model(images.to(device)), targets.to(device))
        top1.update(acc.item(), len(images))
    return float(top1.avg)


def fit(model: nn.Module, folder: Path, args: argparse.Namespace) -> float:
    """Train on ``folder``, save the best checkpoint in ``args.output``, return its validation accuracy in percent."""
    train_loader, val_loader = (make_loader(model, folder, split, args) for split in ('train', 'val'))
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device(args.device), verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=LR, weight_decay=WEIGHT_DECAY)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=warmup_epochs(args),
        warmup_lr=LR / 100,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(args.output), max_history=1)
    best = 0.0
    for epoch in range(epochs):
        start = time.monotonic()
        train_epoch(task, train_loader, optimizer, scheduler, epoch, epochs)
        top1 = validate(model, val_loader, args.device)
        best, _ = saver.save_checkpoint(epoch, metric=top1)
        print(f'epoch {epoch + 1:2d}/{epochs}  validation accuracy {top1:6.2f} %  {time.monotonic() - start:4.1f} s')
    return best


@torch.inference_mode()
def look_inside(model: Any, loader: Any, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[BlockReport]]:
    """Run the model over all images and record the retrieval attention of each block.

    Returns:
        Images (B, 3, H, W), labels (B,), predictions (B,), for each of the L blocks the mean attention that each of its
        M slots gets (L, M), and a report on each block.
    """
    with watch(model) as sums:
        batches = [(images, labels, model(images.to(device)).argmax(dim=-1).cpu()) for images, labels in loader]
    images, labels, predictions = (torch.cat(parts) for parts in zip(*batches, strict=True))
    usage = torch.stack([(seen.shares / seen.tokens).cpu() for seen in sums.values()])
    return images, labels, predictions, usage, [seen.report() for seen in sums.values()]


def draw(
    path: Path, images: Tensor, labels: Tensor, predictions: Tensor, usage: Tensor, reports: list[BlockReport]
) -> None:
    """Draw the digits (B, 3, H, W), errors first, and below them the use of the slots of each block (L, M)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout='constrained', facecolor='white')
    top, bottom = figure.subfigures(2, 1)  # type: ignore[misc]  # an array of them
    _draw_digits(top, images, labels, predictions)
    _draw_slots(bottom, usage, reports)
    figure.savefig(path, dpi=130)


def _draw_digits(figure: Any, images: Tensor, labels: Tensor, predictions: Tensor) -> None:
    is_wrong = labels != predictions
    wrong, right = is_wrong.nonzero()[:, 0], (~is_wrong).nonzero()[:, 0]
    axes = figure.subplots(3, 12).flat
    spread = torch.linspace(0, len(right) - 1, max(len(axes) - len(wrong), 0)).long()  # from all classes
    figure.suptitle(f'{len(right)} of {len(labels)} validation images are classified right; errors come first, in red')
    for axis, i in zip(axes, [*wrong.tolist(), *right[spread].tolist()], strict=False):
        grey = images[i].mean(dim=0).numpy()
        axis.imshow(grey, cmap='gray')
        colour = 'tab:red' if is_wrong[i] else 'tab:green'
        title = f'{predictions[i]} (is {labels[i]})' if is_wrong[i] else f'{predictions[i]}'
        axis.set_title(title, color=colour, fontsize=10, pad=3)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=2)


def _draw_slots(figure: Any, usage: Tensor, reports: list[BlockReport]) -> None:
    M = usage.shape[1]
    figure.suptitle('Mean retrieval attention on each memory slot (dashed: all slots alike)')
    axes = figure.subplots(1, len(usage), sharey=True, squeeze=False)[0]
    for axis, shares, report in zip(axes, usage, reports, strict=True):
        axis.bar(range(M), (100 * shares).numpy(), color='tab:blue')
        axis.axhline(100 / M, color='black', linestyle='--', linewidth=1)
        axis.set_title(f'block {report.block}: {report.slots_in_use:.1f} of {M} slots in use (perplexity)', fontsize=10)
        axis.set(xlabel='slot', xticks=range(0, M, 5))
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].set_ylabel('mean attention, %')


def warmup_epochs(args: argparse.Namespace) -> int:
    """One, unless it were the only epoch."""
    return min(1, args.epochs - 1)


def commands(data: Path, args: argparse.Namespace) -> list[str]:
    """List the commands that do the same with the scripts of timm, for the image folder ``data``."""
    common = (
        f'--data-dir {shlex.quote(str(data))} --model {MODEL} --num-classes {CLASSES} '
        f'--device {args.device} --workers {args.workers}'
    )
    scripts = SCRIPTS.format(version=timm.__version__)
    return [
        f'curl --remote-name-all {scripts}/train.py {scripts}/validate.py',
        f'python train.py --device-modules timm_ait {common} --pretrained '
        f'--epochs {args.epochs} --batch-size {args.batch_size} '
        f'--opt adamw --lr {LR} --weight-decay {WEIGHT_DECAY} --sched-on-updates --warmup-epochs {warmup_epochs(args)} '
        f'--warmup-lr {LR / 100} --cooldown-epochs 0 --scale 0.7 1.0 --hflip 0 --color-jitter 0 '
        '--train-interpolation bicubic --smoothing 0 --output output --experiment own',
        f'python -m timm_ait validate.py {common} --checkpoint output/own/model_best.pth.tar',
    ]


def find_fault(trained: float, reloaded: float, minimum: float) -> str:
    """Compare the accuracies, in percent, of the trained and the reloaded model; '' if both are as they should be."""
    if reloaded != trained:
        return f'the reloaded checkpoint must have the accuracy of the trained model, {trained} %, got {reloaded} %'
    if not reloaded >= minimum:
        return f'expected an accuracy of at least {minimum} %, got {reloaded:.2f} %; train longer with --epochs'
    return ''


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    args = parse_args(argv)
    if missing := [name for name in ('matplotlib', 'sklearn') if find_spec(name) is None]:
        needed = ', '.join(missing)
        print(f"error: the demo needs {needed}: pip install '.[demo]' in a checkout of timm_ait", file=sys.stderr)
        return 2
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    random_seed(args.seed)
    data = args.output / 'digits'
    try:
        write_digits(data, args.seed)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2

    model = timm.create_model(MODEL, pretrained=True, num_classes=CLASSES).to(args.device)
    print(f'{MODEL}: {sum(p.numel() for p in model.parameters()):,} parameters; images in {data}')
    trained = fit(model, data, args)

    checkpoint = args.output / 'model_best.pth.tar'
    model = timm.create_model(MODEL, num_classes=CLASSES, checkpoint_path=str(checkpoint)).to(args.device)
    loader = make_loader(model, data, 'val', args)
    reloaded = validate(model, loader, args.device)
    print(f'best epoch {trained:.2f} %; {checkpoint}, reloaded: {reloaded:.2f} %')

    picture = args.output / 'demo.png'
    seen = look_inside(model, loader, args.device)
    draw(picture, *seen)
    print(f'what the memory holds:\n{format_report(seen[-1])}')
    print(f'{picture}: predictions and use of the memory; {time.monotonic() - start:.0f} s in total')
    if fault := find_fault(trained, reloaded, args.min_accuracy):
        print(f'error: {fault}', file=sys.stderr)
        return 1
    print('\nThe scripts of timm do the same. For your own images, change --num-classes and --data-dir, a folder with')
    print('train/<class>/* and val/<class>/*:\n')
    print('\n\n'.join(commands(data, args)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
