"""Tasks that are drawn, not downloaded: Triangle, Sort-of-CLEVR, and recall between the patches of one image.

    python -m timm_ait.datasets triangle DIR --train 50000 --test 10000   # DIR/<split>/<class>/<number>.png
    python -m timm_ait.datasets recall DIR --grid 32 --pairs 16

A sample follows from (seed, split, epoch, index) alone, whatever the machine, the order and the number of workers.
Triangle and Sort-of-CLEVR are those of Goyal et al., *Coordination Among Neural Modules Through a Shared Global
Workspace*, https://arxiv.org/abs/2103.01197.
"""

import argparse
import math
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm  # comes with huggingface-hub

from .sort_of_clevr import KINDS, Bytes, Ints, answer_questions, draw_centres, draw_questions, paint_scene

__all__ = ['AssociativeRecall', 'DrawnImages', 'SortOfClevr', 'Triangle', 'write_folders']

SPLITS = ('train', 'validation', 'test')


class DrawnImages(Dataset[tuple[Tensor, int]]):
    """A classification task: image ``index`` is of class ``index % num_classes`` and is drawn when it is asked for.

    Args:
        split: 'train', 'validation' or 'test', none of which repeats another.
        size: Number of images.
        seed: At least 0, under 2**32.

    Raises:
        ValueError: For an argument out of range.
    """

    num_classes: int
    img_size: int

    def __init__(self, split: str = 'train', size: int = 50_000, seed: int = 0) -> None:
        _check_sample(split, size, seed)
        self.split, self.size, self.seed = split, size, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on must see it change

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other training images from now on, in running workers too; the other splits stay as they are."""
        self.epoch.fill_(epoch if self.split == 'train' else 0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image (3, H, W) in [0, 1], class."""
        image, label = self.draw(index)
        return to_tensor(image).expand(3, -1, -1), label  # (1 or 3, H, W) -> (3, H, W)

    def draw(self, index: int) -> tuple[Image.Image, int]:
        """Image, class."""
        index = range(self.size)[index]  # an IndexError where it must be one
        label = index % self.num_classes
        return self.paint(_generator(self.seed, self.split, int(self.epoch), index), label), label

    def paint(self, rng: np.random.Generator, label: int) -> Image.Image:
        """Draw an image of class ``label``."""
        raise NotImplementedError


class Triangle(DrawnImages):
    """Do three clusters of points form an equilateral triangle (class 0), or are they anywhere (class 1)?

    64x64, white on black: a corner is a cluster of 8 points, up to a pixel away from it in x and in y, and each point a
    filled circle of radius 2. An equilateral triangle has a side longer than 0.
    """

    num_classes = 2
    img_size = 64

    def paint(self, rng: np.random.Generator, label: int) -> Image.Image:
        """Draw a triangle."""
        corners = equilateral_corners(rng, self.img_size) if label == 0 else rng.integers(self.img_size, size=(3, 2))
        points = corners[:, None] + rng.integers(-1, 2, size=(3, 8, 2))
        image = Image.new('L', (self.img_size, self.img_size))
        pen = ImageDraw.Draw(image)
        for x, y in points.reshape(-1, 2).tolist():  # (3, 8, 2) -> (24, 2)
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=255)
        return image


def equilateral_corners(rng: np.random.Generator, img_size: int) -> Ints:
    """Two random corners and the second one turned about the first by 60 degrees, rounded, all inside: (3, 2)."""
    cos, sin = math.cos(math.pi / 3), math.sin(math.pi / 3)
    while True:
        (x, y), (u, v) = rng.integers(img_size, size=(2, 2)).tolist()
        p, q = round(x + cos * (u - x) - sin * (v - y)), round(y + sin * (u - x) + cos * (v - y))
        if (u, v) != (x, y) and 0 <= p < img_size and 0 <= q < img_size:
            return np.array([(x, y), (u, v), (p, q)])


class AssociativeRecall(DrawnImages):
    """Which value belongs to the queried key? A task for memories: one symbol a patch, up to thousands of patches.

    Patches are read in rows. The first one shows the queried key. At random places among the others stand ``num_pairs``
    pairs: a patch with a key, and in the next patch (the first of the next row, at the end of one) its value. No key
    occurs twice. The class is the value of the queried key. What is left over shows values without a key, or nothing.
    All values are equally frequent and independent. So a model that does not relate query, key and value is right for
    one image in ``num_values``; it guesses better only where an image shows few values.

    With ``joined`` a patch shows a key and its value at once, so that a token of a model knows the pair from the start,
    and only the query must find it. A model that counts the values beside a key then guesses better than that.

    A symbol is a pattern of 4x4 cells: keys are red, values green, the query is the key's pattern in blue.

    Args:
        split: 'train', 'validation' or 'test', none of which repeats another.
        size: Number of images.
        seed: At least 0, under 2**32.
        grid: Patches a side: 16 for 256 patches, 64 for 4096.
        patch_size: Pixels a side of a patch, a multiple of 4.
        num_pairs: Pairs in an image.
        num_keys: Different keys, at least ``num_pairs``.
        num_values: Different values, the classes.
        distractors: Share of the patches left over that show a value without a key; the others are black.
        joined: Whether key and value of a pair stand in one patch.

    Raises:
        ValueError: For an argument out of range.
    """

    def __init__(
        self,
        split: str = 'train',
        size: int = 50_000,
        seed: int = 0,
        grid: int = 16,
        patch_size: int = 4,
        num_pairs: int = 8,
        num_keys: int = 32,
        num_values: int = 10,
        distractors: float = 1.0,
        joined: bool = False,
    ) -> None:
        super().__init__(split, size, seed)
        for value in (grid, patch_size, num_pairs, num_keys, num_values):
            _check(isinstance(value, int), 'a whole number', value)
        _check(grid > 1, 'a grid of at least 2', grid)
        room = (grid * grid - 1) // (1 if joined else 2)
        _check(0 < num_pairs <= room, f'num_pairs from 1 to {room}, what {grid}x{grid} patches hold', num_pairs)
        _check(num_pairs <= num_keys < 2**16, f'num_keys from num_pairs, {num_pairs}, to {2**16 - 1}', num_keys)
        _check(1 < num_values < 2**16, f'num_values from 2 to {2**16 - 1}', num_values)
        _check(patch_size > 0 and patch_size % 4 == 0, 'a patch_size that 4 divides', patch_size)
        _check(0 <= distractors <= 1, 'a share of distractors from 0 to 1', distractors)
        self.grid, self.patch_size, self.img_size = grid, patch_size, grid * patch_size
        self.num_pairs, self.num_keys, self.num_classes = num_pairs, num_keys, num_values
        self.distractors, self.joined = distractors, joined

    def paint(self, rng: np.random.Generator, label: int) -> Image.Image:
        """Draw an image whose queried key has the value ``label``."""
        num_patches, pairs = self.grid**2, np.arange(self.num_pairs)
        gap = 0 if self.joined else 1  # from a key to its value
        values = rng.integers(self.num_classes, size=num_patches)
        shows_value = rng.random(num_patches) < self.distractors
        # Choose among the places as if a pair took one, then move each pair on by the gap for every pair before it.
        free = num_patches - 1 - gap * self.num_pairs
        starts = 1 + gap * pairs + np.sort(rng.choice(free, self.num_pairs, replace=False))
        keys, queried = rng.permutation(self.num_keys)[pairs], rng.integers(self.num_pairs)
        values[starts[queried] + gap] = label
        shows_value[0] = shows_value[starts] = False
        shows_value[starts + gap] = True

        cells = np.zeros((num_patches, 4, 4, 3), dtype=np.uint8)
        key_patterns = symbol_patterns(keys)
        cells[starts, :, :, 0] = key_patterns
        cells[shows_value, :, :, 1] = symbol_patterns(values[shows_value])
        cells[0, :, :, 2] = key_patterns[queried]
        cells = cells.reshape(self.grid, self.grid, 4, 4, 3).swapaxes(1, 2)  # (N, 4, 4, 3) -> (grid, 4, grid, 4, 3)
        pixels = cells.reshape(4 * self.grid, 4 * self.grid, 3)  # (grid, 4, grid, 4, 3) -> (4*grid, 4*grid, 3)
        return Image.fromarray(pixels).resize((self.img_size, self.img_size), Image.Resampling.NEAREST)


def symbol_patterns(symbols: Ints) -> Bytes:
    """The pattern of each symbol, from 0 to 2**16 - 2: (N,) -> (N, 4, 4), 0 or 255; no two alike, none empty."""
    codes = (symbols + 1) * 40503 % 2**16  # an odd factor permutes the numbers of 16 bits, and spreads these
    bits = codes[:, None] >> np.arange(16) & 1
    return (255 * bits).astype(np.uint8).reshape(-1, 4, 4)  # (N, 16) -> (N, 4, 4)


class SortOfClevr(Dataset[tuple[Tensor, Tensor, int]]):
    """Questions about six objects, and 30 of them about each scene: ten of each kind.

    Scenes are 75x75 on white ground. There is one object a colour (red, green, blue, orange, grey, yellow, drawn in
    this order), a square or a circle that reaches 5 pixels from its centre; centres lie in 5 to 69 and at least 10
    apart. How questions and answers are written stands at :func:`answer_questions`.

    Args:
        split: 'train', 'validation' or 'test', none of which repeats another.
        size: Number of scenes; 9,800 for training and 200 for test are usual.
        seed: At least 0, under 2**32.
        kinds: Which kinds of question to ask, out of 'nonrelational', 'binary' and 'ternary'.

    Attributes:
        images: (size, 3, 75, 75) uint8.
        questions: (size, 10 * kinds, 18) float32.
        answers: (size, 10 * kinds) in [0, 10).
        centres: (size, 6, 2), x and y.
        squares: (size, 6), whether the object is a square.

    Raises:
        ValueError: For an argument out of range.
    """

    def __init__(
        self, split: str = 'train', size: int = 9800, seed: int = 0, kinds: Sequence[str] = ('binary',)
    ) -> None:
        _check_sample(split, size, seed)
        is_known = bool(kinds) and not isinstance(kinds, str) and set(kinds) <= set(KINDS)
        _check(is_known, f'some of the kinds {KINDS}', kinds)
        centres, squares, questions, images = [], [], [], []
        for index in range(size):
            rng = _generator(seed, split, 0, index)
            centres.append(draw_centres(rng))
            squares.append(rng.random(6) < 0.5)
            questions.append(draw_questions(rng))
            images.append(paint_scene(centres[-1], squares[-1]))
        self.centres, self.squares = np.stack(centres), np.stack(squares)
        asked = np.stack(questions)  # (size, 3, 10, 18)
        asked = asked[:, [KINDS.index(kind) for kind in kinds]].reshape(size, -1, 18)  # -> (size, 10 * kinds, 18)
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # (size, H, W, 3) -> CHW
        self.questions = torch.from_numpy(asked.astype(np.float32))
        self.answers = torch.from_numpy(answer_questions(self.centres, self.squares, asked))

    def __len__(self) -> int:
        return self.answers.numel()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Image (3, 75, 75) in [0, 1], question (18,), answer."""
        scene, number = divmod(range(len(self))[index], self.answers.shape[1])
        return self.images[scene] / 255, self.questions[scene, number], int(self.answers[scene, number])


def _generator(seed: int, split: str, epoch: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), epoch, index])


def _check_sample(split: str, size: int, seed: int) -> None:
    _check(split in SPLITS, f'a split out of {SPLITS}', split)
    _check(size > 0, 'a size of at least 1', size)
    _check(0 <= seed < 2**32, 'a seed from 0 to 2**32 - 1', seed)


def _check(is_right: bool, expected: str, got: object) -> None:
    if not is_right:
        raise ValueError(f'expected {expected}, got {got!r}')


def write_folders(folder: Path, splits: Mapping[str, DrawnImages]) -> None:
    """Write ``folder/<split>/<class>/<number>.png``, as timm's scripts read them; all of it or nothing.

    Raises:
        ValueError: Where the folder exists, or a split has a class without image, which would shift the others.
    """
    _check(not folder.exists(), 'a folder that does not exist yet', str(folder))
    for split, dataset in splits.items():
        least = dataset.num_classes
        _check(len(dataset) >= least, f'at least {least} images in {split}, one a class', len(dataset))
    partial = folder.with_name(f'.{folder.name}.{os.getpid()}')
    try:
        for split, dataset in splits.items():
            label_width, width = len(str(dataset.num_classes - 1)), len(str(len(dataset) - 1))
            names = [f'{label:0{label_width}d}' for label in range(dataset.num_classes)]
            for name in names:
                (partial / split / name).mkdir(parents=True)
            for index in tqdm(range(len(dataset)), desc=split, disable=None):  # None: on a terminal alone
                image, label = dataset.draw(index)
                image.save(partial / split / names[label] / f'{index:0{width}d}.png')
        partial.rename(folder)
    except BaseException:  # an interrupt too
        shutil.rmtree(partial, ignore_errors=True)
        raise


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('folder', type=Path, help='to write, must not exist')
    for split, size in zip(SPLITS, (50_000, 10_000, 10_000), strict=True):
        common.add_argument(f'--{split}', type=int, default=size, help=f'images, {size} by default, 0 for no folder')
    common.add_argument('--seed', type=int, default=0)
    parser = argparse.ArgumentParser(prog='python -m timm_ait.datasets', description=(__doc__ or '').split('\n')[0])
    tasks = parser.add_subparsers(dest='task', required=True)
    tasks.add_parser('triangle', parents=[common], help='equilateral triangle or not')
    recall = tasks.add_parser('recall', parents=[common], help='the value that belongs to a key')
    recall.add_argument('--grid', type=int, default=16, help='patches a side')
    recall.add_argument('--patch-size', type=int, default=4, help='pixels a side of a patch')
    recall.add_argument('--pairs', dest='num_pairs', type=int, default=8, help='of key and value in an image')
    recall.add_argument('--keys', dest='num_keys', type=int, default=32, help='different keys')
    recall.add_argument('--values', dest='num_values', type=int, default=10, help='different values, the classes')
    recall.add_argument('--distractors', type=float, default=1.0, help='share of the other patches that show a value')
    recall.add_argument('--joined', action='store_true', help='key and value of a pair stand in one patch')
    return parser


def make_splits(task: str, seed: int, sizes: Mapping[str, int], **options: float) -> dict[str, DrawnImages]:
    """A dataset of ``task`` for each split whose size is not 0; ``options`` are arguments of the task."""
    dataset = {'triangle': Triangle, 'recall': AssociativeRecall}[task]
    _check(any(sizes.values()), 'images in one split at least', dict(sizes))
    return {split: dataset(split, size, seed, **options) for split, size in sizes.items() if size != 0}


def main(argv: list[str] | None = None) -> None:
    """Write the folders of a task, and say what train.py needs to know of them."""
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    folder, sizes = options.pop('folder'), {split: options.pop(split) for split in SPLITS}
    try:
        splits = make_splits(sizes=sizes, **options)
        write_folders(folder, splits)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    one = next(iter(splits.values()))
    side = one.img_size
    size = (
        f'--num-classes {one.num_classes} --input-size 3 {side} {side} --img-size {side} --model-kwargs img_size={side}'
    )
    # where there is no such folder, train.py would validate on all that it finds
    val_split = ' --val-split test' if 'test' in splits and 'validation' not in splits else ''
    print(f'train.py reads it with --data-dir {shlex.quote(str(folder))} {size} --no-aug{val_split}')
    if splits.keys() == {'train'}:
        print('It holds no images to validate on: write some with --validation before you train')


if __name__ == '__main__':
    main()
