"""See what the memories of a model hold, in one HTML file: ``python -m timm_ait.visualize MODEL FOLDER_OF_IMAGES``.

MODEL is the name of a model, a checkpoint of timm's train.py, or the folder that train.py has written. Such a folder
also gives pictures of the training: what the memories did by epoch. The file needs no network and no script.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from timm_ait import drawing
from timm_ait.card import MODES
from timm_ait.checkpoint import find_checkpoints, is_run, label_of, load_model
from timm_ait.history import Drift, follow_training, measure_drift, read_memories, write_csv
from timm_ait.page import Page, visualize
from timm_ait.pretrained import WeightsError

__all__ = ['Page', 'main', 'read_images', 'visualize']


def read_images(folder: str | os.PathLike[str], model: nn.Module, count: int) -> Tensor:
    """At most ``count`` images (B, C, H, W), evenly spread over a folder and its subfolders, as the model takes them.

    Raises:
        ValueError: If there is no such folder, no image in it, or one that cannot be read; if the model does not take
            one or three channels.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f'there is no folder {folder}; give a folder of images')
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise ValueError(f'{folder} holds no images; give a folder with .jpg or .png files, or folders of them')
    channels: Any = model.in_chans
    if channels not in MODES:
        raise ValueError(
            f'image files have 1 or 3 channels, the model takes {channels}; call visualize(model, images) with a tensor'
        )
    config, mode = resolve_model_data_config(model), MODES[channels]
    if mode == 'L':  # timm's config may still have the numbers of three channels
        config |= {key: (statistics.mean(config[key]),) for key in ('mean', 'std')}
    transform = create_transform(**config)
    chosen = torch.linspace(0, len(paths) - 1, min(count, len(paths))).long().tolist()
    return torch.stack([transform(_read_image(paths[i]).convert(mode)) for i in chosen])


def _read_image(path: Path) -> Any:
    try:
        return default_loader(str(path))
    except Exception as error:  # Pillow has many for damaged and for huge files, not always with their names
        raise ValueError(f'{path} cannot be read ({error}); remove it or copy it once more') from error


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_ait.visualize', description=(__doc__ or '').partition('\n')[0]
    )
    add = parser.add_argument
    add('model', help='name of a model, a checkpoint of train.py, or the folder that train.py or an export has written')
    add('folder', type=Path, help='images, in subfolders or not')
    add('--checkpoint', type=Path, help='weights for a model that is given by name')
    add(
        '--checkpoints',
        type=Path,
        nargs='+',
        metavar='PATH',
        help='for drift: files in order, or the folder of train.py',
    )
    add('--out', type=Path, default=Path('output/memory'), help='folder for memory.html (default: %(default)s)')
    add('--images', type=int, default=64, help='so many go through the model together (default: %(default)s)')
    add('--pictures', type=int, default=6, help='so many of them are drawn (default: %(default)s)')
    args = parser.parse_args(argv)
    for name in ('images', 'pictures'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    return args


def _run(args: argparse.Namespace) -> list[Path]:
    """Write the files that the command line asks for, and return their paths."""
    drawing.require_matplotlib()
    model = load_model(args.model, args.checkpoint)
    images = read_images(args.folder, model, args.images)
    run = Path(args.model) if is_run(args.model) else None
    drift = _drift(args.checkpoints or ([run] if run else []))
    args.out.mkdir(parents=True, exist_ok=True)  # before the long work
    history = follow_training(run, images) if run else []
    page = visualize(model, images, title=args.model, pictures=args.pictures, drift=drift, history=history)
    written = [args.out / 'memory.html']
    written[0].write_text(page, encoding='utf-8')
    if history:
        written.append(args.out / 'training.csv')
        write_csv(written[1], history)
    return written


def _drift(paths: list[Path]) -> Drift | None:
    """The drift over these checkpoints, or over those in one folder; None for a run that has kept one alone."""
    if not paths:
        return None
    is_folder = len(paths) == 1 and paths[0].is_dir()
    files = find_checkpoints(paths[0]) if is_folder else paths
    if is_folder and len(files) == 1:
        return None
    return measure_drift([label_of(path) for path in files], [read_memories(path) for path in files])


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        SystemExit: If it fails; the message is one sentence.
    """
    try:
        for path in _run(_parse(argv)):
            print(path)
    except (ValueError, WeightsError, OSError, ImportError) as error:
        sys.exit(f'python -m timm_ait.visualize: {error}')


if __name__ == '__main__':
    main()
