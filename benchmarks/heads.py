"""How many tokens the heads of a trained ViT or AiT attend to (Figure 5 of the paper).

    python benchmarks/heads.py DIR --model vit_base_patch16_224    # DIR/<class>/*.jpg, the model's own weights
    python benchmarks/heads.py DIR --model ait_medium --checkpoint output/own/model_best.pth.tar --output heads.png

For each head: the smallest share of the tokens that holds 90 % of the attention, a mean over queries and images; of the
tokens of a window, where a model attends within windows. The paper sorts heads into three groups by it: at most 50 % of
the tokens, under 80 %, and the rest. The shares stand in a JSON file beside the picture.
"""

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from images import sample_folder
from matplotlib.figure import Figure
from record import check_device, check_model, check_new, positive, told, write_record
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.utils.data import DataLoader

import timm_ait  # noqa: F401  registers the models

MASS, LIMITS = 0.9, (0.5, 0.8)
GROUPS = ('at most 50 %', 'under 80 %', 'the rest')
COLOURS = ('tab:blue', 'tab:orange', 'tab:gray')


def token_share(attention: Tensor, mass: float = MASS) -> Tensor:
    """The smallest share of the tokens that holds ``mass`` of the attention, a mean over queries.

    Args:
        attention: (..., Q, N), rows that sum to one.
        mass: In (0, 1].

    Returns:
        (...) in (0, 1].
    """
    held = attention.double().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    # as many tokens as stay under the mass, and the one that reaches it; float32 attention is right to some 1e-7
    counts = (held < mass - 1e-5).sum(dim=-1) + 1
    return counts.double().mean(dim=-1) / attention.shape[-1]


@torch.inference_mode()
def head_shares(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Token share of each head, a mean over images: name of the attention -> (H,), from the first layer on.

    Raises:
        ValueError: For a model without attention that timm can extract.
    """
    model = copy.deepcopy(model)  # timm's hooks would stay
    modules: list[Any] = [module for module in model.modules() if hasattr(module, 'fused_attn')]
    for module in modules:
        module.fused_attn = False  # a fused attention never exists as a matrix
    try:
        extract = AttentionExtract(model, method='hook')
    except RuntimeError as error:
        raise ValueError(f'expected a model with attention (modules named attn_drop), got {type(model)}') from error
    totals = dict.fromkeys(extract.names, torch.zeros(()))
    num_images = 0
    for images in batches:
        attentions = extract(images)
        for name in totals:
            if name not in attentions or attentions[name].ndim != 4:
                raise ValueError(f'expected attention of shape (B, heads, queries, tokens) at {name}, got none')
            shares = token_share(attentions[name]).cpu()  # (B, H); with windows (B*windows, H)
            totals[name] = totals[name] + len(images) * shares.mean(dim=0)
        num_images += len(images)
    if num_images == 0:
        raise ValueError('expected at least one image, got none')
    return {name.removesuffix('.attn_drop'): total / num_images for name, total in totals.items()}


def group(share: float) -> int:
    """0 for at most 50 % of the tokens, 1 for under 80 %, 2 for the rest."""
    return 0 if share <= LIMITS[0] else 1 if share < LIMITS[1] else 2


def print_table(shares: dict[str, Tensor]) -> None:
    """Print for each layer how many heads fall in each group, and the sums."""
    print(
        f'| layer | heads: {GROUPS[0]} | {GROUPS[1]} | {GROUPS[2]} | mean share of tokens, % |\n|---|---|---|---|---|'
    )
    rows = {**shares, 'all': torch.cat([*shares.values()])}
    for name, layer in rows.items():
        groups = [group(share) for share in layer.tolist()]
        counts = ' | '.join(str(groups.count(i)) for i in range(3))
        print(f'| {name} | {counts} | {100 * layer.mean():.1f} |')


def draw(path: Path, shares: dict[str, Tensor], title: str) -> None:
    """Draw a point a head, layer by layer, in the colour of its group."""
    figure = Figure(figsize=(max(7, 0.5 * len(shares)), 4), layout='constrained')
    axes = figure.subplots()
    points = [(i, share) for i, layer in enumerate(shares.values()) for share in layer.tolist()]
    for number, (name, colour) in enumerate(zip(GROUPS, COLOURS, strict=True)):
        mine = [(i, 100 * share) for i, share in points if group(share) == number]
        label = f'{name}: {len(mine)} heads'
        axes.scatter([x for x, _ in mine], [y for _, y in mine], color=colour, alpha=0.7, label=label)
    for limit in LIMITS:
        axes.axhline(100 * limit, color='black', linestyle='--', linewidth=0.8)
    axes.set(xlabel='layer', ylabel=f'tokens with {MASS:.0%} of the attention, %', ylim=(0, 102), title=title)
    axes.set_xticks(range(len(shares)))
    figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize='small')
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Print the table, draw the figure, and write the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='of images, one folder a class')
    parser.add_argument('--model', default='vit_base_patch16_224')
    parser.add_argument('--checkpoint', default='', help="instead of the model's own weights")
    parser.add_argument('--num-classes', type=int, help='of the checkpoint, where the model has another number')
    parser.add_argument('--images', type=positive, default=500, help='spread evenly over the folder')
    parser.add_argument('--batch-size', type=int, default=20)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--output', type=Path, default=Path('heads.png'))
    args = parser.parse_args(argv)
    arguments = {key: value for key, value in vars(args).items() if key not in ('folder', 'output')}
    formats = Figure().canvas.get_supported_filetypes()
    if args.output.suffix and args.output.suffix[1:].lower() not in formats:
        parser.error(f'--output must end with one of {", ".join(sorted(formats))}, got {args.output}')
    with told(parser, args.output.parent):
        check_model(args.model)
        check_device(args.device)
        check_new(args.output.with_suffix('.json'), arguments)
        try:
            model = timm.create_model(
                args.model, not args.checkpoint, checkpoint_path=args.checkpoint, num_classes=args.num_classes
            )
        except (RuntimeError, FileNotFoundError) as error:
            reason = ' '.join(str(error).split('\n')[:2]) or 'there is no such file'
            raise ValueError(f'{args.model} cannot load {args.checkpoint or "its weights"}: {reason}') from error
        chosen = sample_folder(args.folder, model, args.images)
        loader = DataLoader(chosen, args.batch_size)
        shares = head_shares(model.to(args.device), (images.to(args.device) for images, _ in loader))
        print_table(shares)
        draw(args.output, shares, f'{args.model}, {len(chosen)} images')
        results = {'shares': {name: layer.tolist() for name, layer in shares.items()}}
        write_record(args.output.with_suffix('.json'), arguments, results)


if __name__ == '__main__':
    main()
