"""Images: CIFAR-10 (JPEG) for the tests that need real ones, which are skipped where its file is absent; and noise."""

import tarfile
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

CIFAR10 = Path(__file__).parents[2] / 'shared' / 'data' / 'cifar10-jpeg.tar.xz'
needs_photographs = pytest.mark.skipif(not CIFAR10.is_file(), reason=f'no images: there is no file {CIFAR10}')


@cache
def photographs(split: str, per_class: int) -> tuple[list[Image.Image], list[int]]:
    """The first images of each class, class after class in the order of their names, and their labels."""
    found: dict[str, list[Image.Image]] = defaultdict(list)
    with tarfile.open(CIFAR10) as archive:
        for member in archive:
            folder, _, name = str(PurePosixPath(member.name).parent).partition('/')  # train/airplane/0000.jpg
            if member.isfile() and folder == split and len(found[name]) < per_class:
                content = archive.extractfile(member)
                assert content is not None
                found[name].append(Image.open(content).copy())
    labels = [label for label, name in enumerate(sorted(found)) for _ in found[name]]
    return [image for name in sorted(found) for image in found[name]], labels


def write_noise(folder: Path, classes: Iterable[object], count: int) -> None:
    """Write ``count`` images of 32x32 random pixels for each class, as timm reads them: ``folder/<class>/<i>.png``."""
    for label in classes:
        (folder / str(label)).mkdir(parents=True)
        for i in range(count):
            to_pil_image(torch.rand(3, 32, 32)).save(folder / str(label) / f'{i}.png')
