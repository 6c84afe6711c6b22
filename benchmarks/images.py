"""The images of the experiments: read from folders, mirrored and shifted, and given out in batches."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

# Either tensors: images (N, 3, H, W) first, labels (N,) last, and other inputs of the model between them. Or a data set
# with such items. Images are uint8, or floats that are already normalized.
Data = tuple[Tensor, ...] | Dataset[Any]


def load(folder: Path, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Read the images ``first`` to ``first + count`` of every class: uint8 (N, 3, H, W) and labels (N,).

    Raises:
        ValueError: If a class has fewer images, if none are asked for, if a folder train or test beside this one has
            other classes, or if the images differ in size.
    """
    dataset = ImageFolder(str(folder))
    for beside in (folder.with_name('train'), folder.with_name('test')):
        if beside.is_dir() and find_classes(str(beside))[0] != dataset.classes:
            raise ValueError(f'{folder} has the classes {dataset.classes}, other ones than {beside}')
    samples: dict[int, list[str]] = {}
    for path, label in dataset.samples:
        samples.setdefault(label, []).append(path)
    fewest, label = min((len(paths), label) for label, paths in samples.items())
    if count < 1 or fewest < first + count:
        raise ValueError(
            f'expected 1 to {fewest - first} images of each class of {folder}, asked for {count}: '
            f'{dataset.classes[label]} has {fewest}' + (f', and {first} are taken' if first else '')
        )
    chosen = [(path, label) for label, paths in samples.items() for path in paths[first : first + count]]
    paths = tqdm([path for path, _ in chosen], desc=f'reading {folder.name}', disable=None)
    read = [pil_to_tensor(dataset.loader(path)) for path in paths]
    if sizes := {tuple(x.shape[1:]) for x in read} - {tuple(read[0].shape[1:])}:
        raise ValueError(f'expected images of one size in {folder}, got {tuple(read[0].shape[1:])} and {sizes.pop()}')
    images = torch.stack(read)
    return images, torch.tensor([label for _, label in chosen])


def sample_folder(folder: str | Path, model: nn.Module, count: int) -> Subset[Any]:
    """At most ``count`` images and labels, as a model takes them, evenly spread over a folder of folders of classes."""
    dataset = ImageFolder(str(folder), create_transform(**resolve_model_data_config(model)))
    return Subset(dataset, torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist())


def length(data: Data) -> int:
    return len(data[-1]) if isinstance(data, tuple) else len(data)  # type: ignore[arg-type]


def batches(data: Data, batch_size: int, seed: int, epoch: int, done: int, workers: int) -> Iterator[list[Tensor]]:
    """Return the batches of an epoch without those that are done. Their order depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    if hasattr(data, 'set_epoch'):
        data.set_epoch(epoch)
    order = torch.randperm(length(data), generator=generator)
    last = len(order) // batch_size * batch_size
    return in_order(data, order[done * batch_size : last], batch_size, workers, generator)


def in_order(
    data: Data, order: Tensor, batch_size: int, workers: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Return the items of these numbers (N,), in batches. The generator gives the workers their seeds."""
    groups = order.split(batch_size)
    if isinstance(data, tuple):
        for batch in groups:
            yield [x[batch.to(x.device)] for x in data]
    else:  # the generator seeds the workers: without it, each loader would take a number from the run's own
        sampler = [batch.tolist() for batch in groups]
        yield from DataLoader(data, batch_sampler=sampler, num_workers=workers, generator=generator)


def augment(images: Tensor, flip: bool, shift: int) -> Tensor:
    """Mirror images (B, C, H, W) with probability 1/2, and move each by up to ``shift`` pixels in x and y."""
    B, _, H, W = images.shape
    dx, dy = torch.randint(-shift, shift + 1, (2, B, 1)).to(images.device)
    x, y = torch.arange(W, device=images.device), torch.arange(H, device=images.device)
    x, y = _reflect(x + dx, W), _reflect(y + dy, H)  # (B, W), (B, H)
    if flip:
        x = torch.where(torch.rand(B, 1).to(x.device) < 0.5, x, x.flip(-1))
    image = torch.arange(B, device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[image, y[:, :, None], x[:, None, :]]  # (B, C, H, W) -> (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def turn(images: Tensor) -> Tensor:
    """Turn each of the square images (B, C, H, H) by 0, 90, 180 or 270 degrees."""
    turned = torch.stack([images.rot90(quarters, dims=(-2, -1)) for quarters in range(4)])
    image = torch.arange(len(images), device=images.device)
    return turned[torch.randint(4, (len(images),)).to(images.device), image]


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflect an index that lies outside of 0..size-1: -1 becomes 1, and size becomes size-2."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def checksum(data: Data) -> str | None:
    """Eight digits that stand for tensors; None for a data set, which is drawn."""
    if not isinstance(data, tuple):
        return None
    total = 0
    for x in data:
        total = zlib.crc32(x.cpu().contiguous().numpy(), total)
    return f'{total:08x}'


def checksums(data: dict[str, Data]) -> dict[str, str | None]:
    """What must be alike in results that stand in one table; older ones have that of the training images alone."""
    return {'data': checksum(data['train']), 'test_data': checksum(data['test'])}
