"""What the memory of a trained model tells tokens apart, block by block.

    python benchmarks/slots.py DIR --model test_ait                        # DIR/<class>/*.jpg, the model's own weights
    python benchmarks/slots.py DIR --model ait_small --checkpoint output/own/model_best.pth.tar
    python benchmarks/slots.py --writes 100 --model ait_small_patch4_32    # how an untrained memory moves, on noise

A retrieval that is the same for every token is a bias, whatever its length: the column to read is *varies*.
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
    """Mean cosine between slots, length of the retrieval beside the token's, and its variation in percent, a block."""
    states: list[list[Tensor]] = [[] for _ in model.blocks]
    pairs = list(zip((block.mlp for block in model.blocks), states, strict=True))
    hooks = [workspace.norm.register_forward_hook(_keep(kept)) for workspace, kept in pairs]
    for images, _ in batches:
        model(images)
    for hook in hooks:
        hook.remove()
    return [measure(workspace, torch.cat(kept)) for workspace, kept in pairs]


def _keep(kept: list[Tensor]) -> Callable[..., None]:
    return lambda _module, _args, h: kept.append(h.flatten(0, -2))


def measure(workspace: Any, h: Tensor) -> tuple[float, float, float]:
    """The three numbers of one workspace, for tokens ``h`` (T, E)."""
    attractors = workspace.attractors(workspace.memory)  # (M, D) -> (M, E)
    r = hopfield_retrieval(torch.zeros_like(h), h, attractors, workspace.beta, workspace.retrieval_steps)
    length = r.norm(dim=-1).mean()
    varies = 100 * (r - r.mean(dim=0)).norm(dim=-1).mean() / length
    return mean_cosine(workspace.memory), (length / h.norm(dim=-1).mean()).item(), varies.item()


def mean_cosine(memory: Tensor) -> float:
    """Mean cosine between two slots of a memory (M, D)."""
    slots, M = F.normalize(memory, dim=-1), len(memory)
    return ((slots @ slots.t()).sum().item() - M) / max(M * (M - 1), 1)


@torch.no_grad()
def watch(model: Any, writes: int, batch_size: int = 32) -> dict[int, float]:
    """Mean cosine between the slots of the first block after so many writes of random images."""
    size = (batch_size, model.in_chans, *model.patch_embed.img_size)
    memory, seen = model.blocks[0].mlp.memory, {}
    for i in range(writes + 1):
        if str(i).strip('0') in ('', '1', '3') or i == writes:
            seen[i] = mean_cosine(memory)
        model.forward_features(torch.randn(size))
    return seen


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', help='of images, one folder a class')
    parser.add_argument('--model', default='test_ait')
    parser.add_argument('--checkpoint', default='', help="instead of the model's own weights")
    parser.add_argument('--images', type=int, default=1000, help='spread evenly over the folder')
    parser.add_argument('--writes', type=int, help='instead of looking at a trained memory, write to an untrained one')
    args = parser.parse_args(argv)
    if args.writes:
        torch.manual_seed(0)
        seen = watch(timm.create_model(args.model).train(), args.writes)
        print('| writes | slots, mean cosine |\n|---|---|', *(f'| {i} | {c:.4f} |' for i, c in seen.items()), sep='\n')
        return
    if args.folder is None:
        parser.error('name a folder of images, or --writes')
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
