"""The images of the experiments: what is read, and how they are mirrored and moved."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from images import augment, load, turn
from PIL import Image

N, SIDE = 23, 8


def save_images(folder: Path, sides: dict[str, int]) -> Path:
    for name, side in sides.items():
        (folder / name).mkdir(parents=True)
        Image.new('RGB', (side, side)).save(folder / name / '0.png')
    return folder


def test_images_of_other_classes_or_sizes_are_refused(tmp_path: Path) -> None:
    train = save_images(tmp_path / 'train', {'ant': 8, 'bee': 8, 'cat': 9})
    with pytest.raises(ValueError, match=r'expected images of one size in .*train, got \(8, 8\) and \(9, 9\)'):
        load(train, 0, 1)
    test = save_images(tmp_path / 'test', {'bee': 8, 'cat': 8})
    for folder in (train, test):
        with pytest.raises(ValueError, match=r"has the classes \['.*'\], other ones than .*(train|test)$"):
            load(folder, 0, 1)


def test_an_image_is_moved_with_its_edge_reflected() -> None:
    x = torch.randint(256, (N, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = F.pad(x.float(), (2, 2, 2, 2), mode='reflect').to(torch.uint8)
    moves = [(dy, dx) for dy in range(5) for dx in range(5)]
    crops = torch.stack([padded[:, :, dy : dy + SIDE, dx : dx + SIDE] for dy, dx in moves], dim=1)
    torch.manual_seed(0)
    matches = (augment(x, flip=False, shift=2)[:, None] == crops).flatten(2).all(-1)  # (N, 25)
    assert matches.sum(-1).tolist() == [1] * N
    assert matches.any(0).sum() > 7  # each image has its own move


def test_an_image_is_moved_as_far_as_the_limit_in_each_direction() -> None:
    x = torch.arange(SIDE * SIDE).view(1, 1, SIDE, SIDE).expand(1000, 1, -1, -1)
    torch.manual_seed(0)
    middle = augment(x, flip=False, shift=2)[:, 0, 4, 4]
    assert middle.unique().tolist() == [SIDE * (4 + dy) + 4 + dx for dy in range(-2, 3) for dx in range(-2, 3)]


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.arange(3).expand(1000, 2, 5, 3)
    torch.manual_seed(0)
    y = augment(x, flip=True, shift=0)
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(y == x).flatten(1).all(1))
    assert 400 < mirrored.sum() < 600


def test_each_image_is_turned_by_its_own_quarters() -> None:
    x = torch.arange(9).view(3, 3).expand(1000, 2, 3, 3)
    torch.manual_seed(0)
    y = turn(x)
    matches = torch.stack([(y == x.rot90(quarters, dims=(-2, -1))).flatten(1).all(1) for quarters in range(4)])
    assert torch.equal(matches.sum(0), torch.ones(1000, dtype=torch.long))
    assert 200 < matches.sum(1).min()
