"""Does the memory of a trained model tell tokens apart? A table with one row for each block.

    python benchmarks/slots.py DIR --model test_ait                        # DIR/<class>/*.jpg, the model's own weights
    python benchmarks/slots.py DIR --model ait_small --checkpoint output/own/model_best.pth.tar
    python benchmarks/slots.py --writes 100 --model ait_small_patch4_32    # an untrained memory, written with noise

A retrieval that is the same for every token is a bias, even if it is long. So look at the last column first.
"""

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from timm_ait.hopfield import hopfield_retrieval  # and registers the models

HEADING = '| block | slots, mean cosine | retrieval / state, length | retrieval varies over tokens, % |'


@torch.inference_mode()
def look(model: Any, batches: Any) -> list[tuple[float, float, float]]:
    """Run the model over all batches and return the numbers of :func:`measure` for each block."""
    states: list[list[Tensor]] = [[] for _ in model.blocks]
    pairs = list(zip((block.mlp for block in model.blocks), states, strict=True))
    hooks = [workspace.norm.register_forward_hook(_append_to(seen)) for workspace, seen in pairs]
    for images, _ in batches:
        model(images)
    for hook in hooks:
        hook.remove()
    return [measure(workspace, torch.cat(seen)) for workspace, seen in pairs]


def _append_to(seen: list[Tensor]) -> Callable[..., None]:
    return lambda _module, _args, h: seen.append(h.flatten(0, -2))  # (B, N, E) -> (B*N, E)


def measure(workspace: Any, h: Tensor) -> tuple[float, float, float]:
    """Measure one workspace with tokens ``h`` (T, E).

    Returns:
        Mean cosine between two slots, length of the retrieval relative to the token, and how much the retrieval varies
        over tokens, in percent of its length.
    """
    attractors = workspace.attractors(workspace.memory)  # (M, D) -> (M, E)
    r = hopfield_retrieval(torch.zeros_like(h), h, attractors, workspace.beta, workspace.retrieval_steps)
    length = r.norm(dim=-1).mean()
    varies = 100 * (r - r.mean(dim=0)).norm(dim=-1).mean() / length
    return mean_cosine(workspace.memory), (length / h.norm(dim=-1).mean()).item(), varies.item()


def mean_cosine(memory: Tensor) -> float:
    """Return the mean cosine between two slots of a memory (M, D)."""
    slots, M = F.normalize(memory, dim=-1), len(memory)
    return ((slots @ slots.t()).sum().item() - M) / max(M * (M - 1), 1)


@torch.no_grad()
def watch(model: Any, writes: int, batch_size: int = 32) -> dict[int, float]:
    """Write random images. Return the mean cosine between the slots of the first block by the number of writes."""
    size = (batch_size, model.in_chans, *model.patch_embed.img_size)
    memory, seen = model.blocks[0].mlp.memory, {}
    for i in range(writes + 1):
        if str(i).strip('0') in ('', '1', '3') or i == writes:
            seen[i] = mean_cosine(memory)
        model.forward_features(torch.randn(size))
    return seen


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', help='images, one folder for each class')
    parser.add_argument('--model', default='test_ait')
    parser.add_argument('--checkpoint', default='', help="take these weights instead of the model's own")
    parser.add_argument('--images', type=int, default=1000, help='number of images, spread evenly over the folder')
    parser.add_argument('--writes', type=int, help='write so many batches to an untrained memory instead')
    args = parser.parse_args(argv)
    if args.writes:
        torch.manual_seed(0)
        seen = watch(timm.create_model(args.model).train(), args.writes)
        print('| writes | slots, mean cosine |\n|---|---|', *(f'| {i} | {c:.4f} |' for i, c in seen.items()), sep='\n')
        return
    if args.folder is None:
        parser.error('give a folder of images, or --writes')
    model = timm.create_model(args.model, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint).eval()
    transform = create_transform(**resolve_model_data_config(model))
    dataset = ImageFolder(args.folder, transform)
    step = max(len(dataset) // args.images, 1)
    rows = look(model, DataLoader(Subset(dataset, range(0, len(dataset), step)), batch_size=100))
    print(f'{HEADING}\n|---|---|---|---|')
    for i, (cosine, length, varies) in enumerate(rows):
        print(f'| {i} | {cosine:.4f} | {length:.3f} | {varies:.2f} |')


if __name__ == '__main__':
    main()
