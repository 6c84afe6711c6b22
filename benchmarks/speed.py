"""How fast is the workspace? Ratios of two sides, which take turns in one process.

    python benchmarks/speed.py --device cuda --peak-tflops 989
    python benchmarks/speed.py --threads 2
    python benchmarks/speed.py --threads 1 --rows variants --batch-sizes 128    # the models of memory.py

A training step is forward, loss, backward and AdamW. Beside each measured ratio stand the ratio of the matrix work
alone (floor) and that of the memory traffic alone. The script prints a table, and writes the numbers of every round and
a picture to the folder ``--out``.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import memory
import timm
import torch
import torch.nn.functional as F
from contenders import LoopedWorkspace, vit_like
from measure import (
    Row,
    Side,
    compare_bytes,
    draw,
    keep_freed_memory,
    release,
    table,
    time_sides,
)
from record import check_device, check_new, environment, positive, told, write_record
from timm.layers import Attention, use_fused_attn
from timm.utils import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm
from variants import ADDITIVE, COMPETING, IMAGE

from timm_ait import GlobalWorkspace

Args = argparse.Namespace
Case = tuple[str, Callable[[str], Row]]

RULES = {'distinct': IMAGE, 'additive': ADDITIVE, 'competing': COMPETING}  # of a memory for each image
ROWS = ('inference', 'training', 'memory', 'unfused', 'depth', 'tokens', 'authors', 'image', 'attention', 'variants')
SIZES = ('small', 'medium', 'base')
LAYOUTS: dict[str, dict[str, tuple[str, dict[str, int]]]] = {
    '32': {size: (f'ait_{size}_patch4_32', {}) for size in SIZES},
    '224': {size: (f'ait_{size}', {}) for size in SIZES},
    'toy': {size: ('test_ait', {'depth': depth}) for size, depth in zip(SIZES, (1, 2, 4), strict=True)},
}
TOKENS = dict(tokens=[4096, 16384, 65536, 262144], image_tokens=[256, 1024, 4096, 16384])
DEFAULTS: dict[str, dict[str, Any]] = {
    'cpu': dict(TOKENS, layouts=['32'], sizes=['small'], batch_sizes=[32, 128], dtype='float32', rounds=11),
    'cuda': dict(TOKENS, layouts=['32', '224'], sizes=SIZES, batch_sizes=[256], dtype='bfloat16', rounds=15),
}
QUICK = dict(layouts=['toy'], sizes=['small'], batch_sizes=[2], tokens=[64, 128], image_tokens=[8, 16], rounds=2)
TURN = 0.2  # seconds; long enough that the resolution of the clock and the delay of a launch do not matter
WIDTH, IMAGE_TOKENS, HEADS = 768, 64, 12  # of a layer alone, as in the paper


def create(layout: str, size: str, **workspace_args: Any) -> nn.Module:
    """Create the AiT of a layout and size."""
    name, model_args = LAYOUTS[layout][size]
    return timm.create_model(name, **model_args, **workspace_args)


def fuse(layout: str, size: str) -> nn.Module:
    """Create the AiT for evaluation alone, as ``--reparam`` of timm's scripts does."""
    return reparameterize_model(create(layout, size))


def unfuse(layout: str, size: str) -> nn.Module:
    """Create the AiT with self-attention as matrix products, as ``TIMM_FUSED_ATTN=0`` does."""
    model = create(layout, size)
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
    return model


def create_vit(layout: str, size: str) -> nn.Module:
    """Create the ViT of the same shape."""
    return vit_like(create(layout, size))


def images_for(model: nn.Module, batch: int, args: Args) -> Tensor:
    """Make random images (B, 3, H, W) of the size that the model takes."""
    return torch.randn(batch, 3, *model.patch_embed.img_size, device=args.device)


def autocast(args: Args) -> torch.autocast:
    """Return the context of mixed precision, which does nothing for float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == 'bfloat16')


def inference(build: Callable[[], nn.Module], batch: int, args: Args) -> Side:
    """Compute the logits of a batch in evaluation mode."""
    model = build().to(args.device).eval()
    images = images_for(model, batch, args)

    def step() -> None:
        with torch.inference_mode(), autocast(args):
            model(images)

    return Side(model, step, batch)


def training(build: Callable[[], nn.Module], batch: int, args: Args) -> Side:
    """Do a training step with a batch."""
    model = build().to(args.device).train()
    images = images_for(model, batch, args)
    labels = torch.randint(model.num_classes, (batch,), device=args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with autocast(args):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(model, step, batch)


def layer_alone(build: Callable[[], nn.Module], images: int, tokens: int, is_training: bool, args: Args) -> Side:
    """Run a layer on images of so many tokens, in training also backward, with its balance loss if it has one."""
    model = build().to(args.device).train(is_training)
    x = torch.randn(images, tokens, WIDTH, device=args.device, requires_grad=is_training)
    grad = torch.randn_like(x)

    def step() -> None:
        with torch.set_grad_enabled(is_training), autocast(args):
            y = model(x)
        if is_training:
            losses = [model.balance_loss()] if hasattr(model, 'balance_loss') else []
            torch.autograd.backward([y, *losses], [grad.to(y.dtype), *[None for _ in losses]])
            model.zero_grad()
            x.grad = None

    return Side(model, step, images * tokens)


def workspace(layer: Callable[[int, int], nn.Module], tokens: int, is_training: bool, args: Args) -> Side:
    """Run a workspace on a batch. A feed-forward part of width 1 costs almost nothing."""
    return layer_alone(partial(layer, WIDTH, 1), tokens // IMAGE_TOKENS, IMAGE_TOKENS, is_training, args)


def model_cases(args: Args) -> Iterator[Case]:
    """Compare AiT with the ViT of the same shape: inference, training and memory; and with its attention not fused."""
    timed = time_with(args)
    for layout, size, batch in product(args.layouts, args.sizes, args.batch_sizes):
        label = f'{LAYOUTS[layout][size][0]}, batch {batch}'
        vit = partial(create_vit, layout, size)
        if 'inference' in args.rows:
            for kind, ait in (('inference', partial(create, layout, size)), ('fused', partial(fuse, layout, size))):
                sides = tuple(partial(inference, build, batch, args) for build in (ait, vit))
                yield f'{kind}, {label}', partial(timed, sides=sides, goal=1.02)
        for write_grad, goal in ((False, 1.07), (True, 1.10)):
            ait = partial(create, layout, size, write_grad=write_grad)
            sides = tuple(partial(training, build, batch, args) for build in (ait, vit))
            name = f'write_grad={write_grad}, {label}'
            if 'training' in args.rows:
                yield f'training, {name}', partial(timed, sides=sides, goal=goal)
            if 'memory' in args.rows:
                yield f'peak memory, {name}', partial(compare_bytes, sides=sides, compiled=args.compile, goal=1.10)
        if 'unfused' in args.rows:
            sides = tuple(partial(training, partial(build, layout, size), batch, args) for build in (unfuse, create))
            yield f'speed in training, attention not fused / fused, {label}', partial(timed, sides=sides, at_least=True)


def depth_cases(args: Args) -> Iterator[Case]:
    """Compare AiT-Medium with ViT-Base, which is twice as deep."""
    for layout, batch, kind in product(args.layouts, args.batch_sizes, (inference, training)):
        builds = (partial(create, layout, 'medium'), partial(create_vit, layout, 'base'))
        sides = tuple(partial(kind, build, batch, args) for build in builds)
        name = f'throughput in {kind.__name__}, medium {layout} / ViT-Base, batch {batch}'
        yield name, partial(time_with(args), sides=sides, goal=1.9, at_least=True)


def workspace_cases(args: Args) -> Iterator[Case]:
    """Compare a workspace layer for more and more tokens, and with the authors' way."""
    timed = time_with(args)
    first, *others = args.tokens
    for tokens in others if 'tokens' in args.rows else []:
        sides = tuple(partial(workspace, GlobalWorkspace, n, True, args) for n in (tokens, first))
        yield f'cost per token, {tokens} / {first} tokens', partial(timed, sides=sides, goal=1.10)
    ours = partial(GlobalWorkspace, write_grad=False)  # as in the authors' code
    for tokens, is_training in product(args.tokens if 'authors' in args.rows else [], (False, True)):
        sides = tuple(partial(workspace, layer, tokens, is_training, args) for layer in (ours, LoopedWorkspace))
        name = f"speed in {'training' if is_training else 'inference'}, ours / authors' way, {tokens} tokens"
        yield name, partial(timed, sides=sides, goal=2.0 if args.device == 'cuda' else None, at_least=True)


def image_cases(args: Args) -> Iterator[Case]:
    """Compare a memory for each image with one for the batch, and with self-attention, for longer and longer images."""
    timed = time_with(args)
    kinds = (inference, training) if 'image' in args.rows else ()
    for layout, size, batch, rule, kind in product(args.layouts, args.sizes, args.batch_sizes, args.rules, kinds):
        builds = (partial(create, layout, size, **RULES[rule]), partial(create, layout, size))
        sides = tuple(partial(kind, build, batch, args) for build in builds)
        model = LAYOUTS[layout][size][0]
        name = f'{kind.__name__}, {rule} memory of each image / memory of the batch, {model}, batch {batch}'
        yield name, partial(timed, sides=sides)
    lengths = args.image_tokens if 'attention' in args.rows else []
    for tokens, rule, is_training in product(lengths, args.rules, (False, True)):
        builds = (partial(GlobalWorkspace, WIDTH, 1, **RULES[rule]), partial(Attention, WIDTH, HEADS))
        sides = tuple(partial(layer_alone, build, 1, tokens, is_training, args) for build in builds)
        use = 'training' if is_training else 'inference'
        name = f'speed in {use}, {rule} memory of an image / self-attention, {tokens} tokens'
        yield name, partial(timed, sides=sides, at_least=True)


def variant_cases(args: Args) -> Iterator[Case]:
    """Compare the small models of memory.py with the one without memory."""
    variants = [name for name in memory.VARIANTS if name != 'none']
    for attention, variant, batch, kind in product((False, True), variants, args.batch_sizes, (training, inference)):
        builds = [partial(memory.create, name, attention, 128, 2) for name in (variant, 'none')]
        sides = tuple(partial(kind, build, batch, args) for build in builds)
        name = memory.cost_name(kind.__name__, variant, memory.setting_of(128, 2, attention))
        yield name, partial(time_with(args), sides=sides)


def time_with(args: Args) -> Callable[..., Row]:
    """Return :func:`time_sides` with the options of the command line."""
    turn = 0.0 if args.quick else TURN
    return partial(time_sides, rounds=args.rounds, seconds=turn, threads=args.threads, compiled=args.compile)


def measure(cases: list[Case]) -> Iterator[Row]:
    """Measure one case after the other. Leave out those that do not fit in memory."""
    for name, run in (progress := tqdm(cases)):
        progress.set_postfix_str(name)
        try:
            yield run(name)
        except torch.OutOfMemoryError:
            tqdm.write(f'left out, because it does not fit in memory: {name}')
        release()


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='bfloat16 means autocast')
    parser.add_argument('--compile', action='store_true', help='compile both sides with torch.compile')
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=ROWS[:-1])
    parser.add_argument('--layouts', nargs='+', choices=tuple(LAYOUTS))
    parser.add_argument('--sizes', nargs='+', choices=SIZES)
    parser.add_argument('--batch-sizes', nargs='+', type=positive)
    parser.add_argument('--tokens', nargs='+', type=positive, help=f'for a layer alone; multiples of {IMAGE_TOKENS}')
    parser.add_argument('--image-tokens', nargs='+', type=positive, help='of one image, for rows "attention"')
    parser.add_argument('--rules', nargs='+', choices=tuple(RULES), default=tuple(RULES), help='of such a memory')
    parser.add_argument('--rounds', type=positive)
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads())
    parser.add_argument('--peak-tflops', type=float, help='peak of the device, to print the share that is reached')
    parser.add_argument('--quick', action='store_true', help='use toy sizes, for a test')
    parser.add_argument('--out', type=Path, default=Path('output/speed'))
    return parser


def complete(args: Args) -> Args:
    """Fill in the defaults of the device.

    Raises:
        ValueError: For a device that this machine has not, for tokens that fill no images, and for rows that would
            share a name.
    """
    check_device(args.device)
    for name, value in {**DEFAULTS[args.device], **(QUICK if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    wrong = [n for n in args.tokens if n % IMAGE_TOKENS]
    if wrong:
        raise ValueError(f'--tokens must be multiples of {IMAGE_TOKENS}, got {wrong}')
    if 'variants' in args.rows and len(args.batch_sizes) > 1:
        raise ValueError(f'--rows variants names no batch size; give one --batch-sizes, got {args.batch_sizes}')
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and write numbers and picture. Each row is written when it is there: a stop keeps it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with told(parser, args.out):
        run_all(complete(args))


def run_all(args: Args) -> None:
    """Measure all rows.

    Raises:
        ValueError: If there is nothing to measure, or if there are older numbers.
    """
    stem = args.out / f'speed-{args.device}-{args.dtype}{"-compiled" if args.compile else ""}'
    arguments = {key: value for key, value in vars(args).items() if key != 'out'}
    arguments['fused_attention'] = use_fused_attn() > 0  # TIMM_FUSED_ATTN
    check_new(stem.with_suffix('.json'), arguments)
    torch.manual_seed(0)
    keep_freed_memory()
    depth = depth_cases(args) if 'depth' in args.rows else []
    variants = variant_cases(args) if 'variants' in args.rows else []
    cases = [*model_cases(args), *depth, *workspace_cases(args), *image_cases(args), *variants]
    if not cases:
        raise ValueError(f'--rows tokens compares with the first of --tokens, got {args.tokens} alone; give two')
    rows: list[Row] = []
    for row in measure(cases):
        rows.append(row)
        write_record(stem.with_suffix('.json'), arguments, {'rows': [asdict(row) for row in rows]})
    print(table(rows, args.peak_tflops))
    machine = environment()
    title = f'{machine["gpu"] if args.device == "cuda" else machine["cpu"]}, {stem.name}, {machine["commit"]}'
    if rows:
        draw(rows, title).savefig(stem.with_suffix('.png'), dpi=120)


if __name__ == '__main__':
    main()
