"""Does a memory pay? Models that differ in the memory alone, over seeds, and what the memory holds.

    python benchmarks/memory.py DIR --out benchmarks/results/memory    (DIR/train/<class>/*, DIR/test/<class>/*)
    python benchmarks/memory.py --show benchmarks/results/memory       (the table and the picture, out of the results)

Each run writes one JSON file when it has finished, and a checkpoint on its way: call again after a stop. PROTOCOL.md
says what is tested, and what counts as a gain.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from images import checksums, load
from loop import Settings, evaluate, fit
from record import check_same, positive, read_records, told, write_record
from runs import count_parameters, draw_rows, format_mean, gains, run_each, top1_of
from variants import ADDITIVE, COMPETING, IMAGE, NoMemory, WholeCopy, WideGain

from timm_ait import AssociativeTransformer, GlobalWorkspace, memory_report

FROZEN: dict[str, Any] = dict(write_mode='never', write_rule='distinct')
VARIANTS: dict[str, tuple[type[GlobalWorkspace], dict[str, Any]]] = {
    'none': (NoMemory, dict(write_mode='never')),
    'wider_mlp': (NoMemory, dict(write_mode='never', mlp_ratio=3.375)),  # as many trained parameters as 'additive'
    'registers': (NoMemory, dict(write_mode='never', reg_tokens=32)),
    'frozen': (GlobalWorkspace, FROZEN),
    'frozen_wide': (WideGain, FROZEN),
    'published': (GlobalWorkspace, {}),
    'published_detached': (GlobalWorkspace, dict(write_grad=False)),
    'distinct': (GlobalWorkspace, dict(write_rule='distinct')),
    'distinct_wide': (WideGain, dict(write_rule='distinct')),
    'image': (GlobalWorkspace, IMAGE),
    'image_whole': (WholeCopy, IMAGE),
    'image_wide': (WideGain, IMAGE),
    'additive': (GlobalWorkspace, ADDITIVE),
    'competing': (GlobalWorkspace, COMPETING),
    'image_wide_detached': (WideGain, dict(IMAGE, write_grad=False)),
}
PAIRS = (  # a trained write and a detached one; as many trained parameters with a memory and without
    ('published', 'published_detached'),
    ('image_wide', 'image_wide_detached'),
    ('image', 'wider_mlp'),
    ('additive', 'wider_mlp'),
    ('competing', 'additive'),
)
SHAPE: dict[str, Any] = dict(
    img_size=32, patch_size=4, num_heads=4, mlp_ratio=2.0, num_classes=10, class_token=False, global_pool='avg'
)
RESULT = ('variant', 'seed', 'top1', 'memory', 'arguments')
SETTINGS = ('images', 'test_images', 'epochs', 'batch_size', 'lr')  # that the name of a run does not tell
COSTS = Path(__file__).parent / 'results' / 'variants' / 'speed-cpu-float32.json'  # of speed.py --rows variants
WORKSPACE: dict[str, Any] = dict(num_slots=32, slot_dim=32, write_heads=4, bottleneck=512)


def create(variant: str, attention: bool, width: int, depth: int) -> AssociativeTransformer:
    """A small model in the layout of a ViT, with positions and a pooled head.

    Args:
        variant: Key of :data:`VARIANTS`.
        attention: Whether the blocks have self-attention.
        width: E.
        depth: Number of blocks.
    """
    layer, workspace = VARIANTS[variant]
    model_class = type('Variant', (AssociativeTransformer,), {'workspace_layer': layer})
    return model_class(embed_dim=width, depth=depth, attention=attention, **{**SHAPE, **WORKSPACE, **workspace})


def run(args: argparse.Namespace, data: dict[str, Any], variant: str, seed: int, deadline: float | None) -> float:
    """Train and test one model, and write its result before the checkpoint goes; the test accuracy in percent."""
    torch.manual_seed(seed)
    model = create(variant, args.attention, args.width, args.depth)
    settings = Settings(lr=args.lr, epochs=args.epochs, batch_size=args.batch_size, seed=seed)
    checkpoint = args.out / 'checkpoints' / f'{title(args, variant, seed)}.pt'
    fitted = fit(model, data['train'], settings, checkpoint, name=title(args, variant, seed), deadline=deadline)
    test = data['test']
    top1 = evaluate(model, test, settings)
    images = test[0][:500] / 127.5 - 1
    report = [] if VARIANTS[variant][0] is NoMemory else [vars(block) for block in memory_report(model, images)]
    arguments = {key: value for key, value in vars(args).items() if key not in ('data', 'out', 'show')}
    results: dict[str, Any] = {'variant': variant, 'seed': seed, 'top1': top1, 'memory': report}
    results |= {'parameters': count_parameters(model), **checksums(data), **fitted.record()}
    write_record(args.out / f'{title(args, variant, seed)}.json', arguments, results)
    checkpoint.unlink(missing_ok=True)
    return top1


def title(args: argparse.Namespace, variant: str, seed: int) -> str:
    """Name of a run."""
    return f'{variant}-{"attention" if args.attention else "alone"}-w{args.width}-d{args.depth}-{seed}'


def setting_of(width: int, depth: int, attention: bool) -> str:
    """The setting of a run, as tables say it."""
    return f'width {width}, depth {depth}, {"with" if attention else "without"} self-attention'


def cost_name(kind: str, variant: str, setting: str) -> str:
    """Name of a row of speed.py: what a variant costs beside no memory, in training or inference."""
    return f'{kind}, {variant} / none, {setting}'


def read_costs(path: Path = COSTS) -> dict[str, float]:
    """What speed.py has measured, by name; nothing without its file."""
    records = read_records(path.parent, ['rows'], path.name).values()
    return {row['name']: row['ratio'] for record in records for row in record['rows']}


def gather(folder: Path) -> dict[str, dict[str, dict[int, Any]]]:
    """Results by setting, then by variant, then by seed.

    Raises:
        ValueError: If there are none, or if they may not be compared.
    """
    records = read_records(folder, RESULT)
    if not records:
        raise ValueError(f'expected results in {folder}, got none; run something with --out {folder} first')
    check_same(records, SETTINGS, within='arguments')
    check_same(records, ['data', 'test_data'])
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for record in records.values():
        arguments = record['arguments']
        setting = setting_of(arguments['width'], arguments['depth'], arguments['attention'])
        found.setdefault(setting, {name: {} for name in VARIANTS})[record['variant']][record['seed']] = record
    return {setting: {name: seeds for name, seeds in rows.items() if seeds} for setting, rows in found.items()}


def table(found: dict[str, dict[str, dict[int, Any]]]) -> str:
    """Accuracy with its interval, the difference to no memory over the same seeds, and the cost beside it."""
    costs = read_costs()
    heading = '| setting | memory | trained parameters, M | seeds | top-1, % | less that of no memory | training loss '
    lines = [f'{heading}| slots: cosine, rank | retrieval varies, % | cost: training, inference |']
    lines.append('|---|---|---|---|---|---|---|---|---|---|')
    for setting, rows in found.items():
        for variant, seeds in rows.items():
            top1, control = top1_of(seeds), top1_of(rows.get('none', {}))
            loss = statistics.mean(record['log'][-1]['loss'] for record in seeds.values())
            blocks = [block for record in seeds.values() for block in record['memory']]
            mean = {key: statistics.mean(block[key] for block in blocks) for key in (blocks[0] if blocks else ())}
            slots = f'{mean["mean_cosine"]:.2f}, {mean["effective_rank"]:.1f}' if mean else ''
            varies = f'{100 * mean["varies_over_tokens"]:.0f}' if mean else ''
            less = '' if variant == 'none' else format_mean(gains(top1, control), '+')
            parameters = next(iter(seeds.values()))['parameters'] / 1e6
            names = [cost_name(kind, variant, setting) for kind in ('training', 'inference')]
            cost = ', '.join(f'{costs[name]:.2f}' for name in names if name in costs)
            lines.append(
                f'| {setting} | {variant} | {parameters:.2f} | {len(seeds)} '
                f'| {format_mean(list(top1.values()))} | {less} | {loss:.3f} | {slots} | {varies} | {cost} |'
            )
    lines += ['', '| setting | memory | less that of | difference |', '|---|---|---|---|']
    for setting, rows in found.items():
        for variant, other in (pair for pair in PAIRS if set(pair) <= rows.keys()):
            less = format_mean(gains(top1_of(rows[variant]), top1_of(rows[other])), '+')
            lines.append(f'| {setting} | {variant} | {other} | {less} |')
    return '\n'.join(lines)


def draw(found: dict[str, dict[str, dict[int, Any]]], path: Path) -> None:
    """Draw the difference to no memory: each seed, the mean and its interval."""
    from matplotlib.figure import Figure

    heights = [len(rows) for rows in found.values()]  # a row each, and the title in the place of the control
    figure = Figure(figsize=(8, 1 + 0.3 * sum(heights)), layout='constrained', facecolor='white')
    panels = figure.subplots(len(found), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (setting, rows) in zip(panels, found.items(), strict=True):
        control = top1_of(rows.get('none', {}))
        less = {name: gains(top1_of(seeds), control) for name, seeds in rows.items() if name != 'none'}
        draw_rows(axes, less)
        axes.axvline(0, color='black', linewidth=1)
        axes.set_title(setting, fontsize='medium')
    panels[-1].set_xlabel('top-1 accuracy less that without memory, points: each seed, mean and 95 % interval')
    figure.savefig(path, dpi=110)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, nargs='?')
    parser.add_argument('--show', type=Path, help='folder of results to print and draw; no training')
    parser.add_argument('--out', type=Path, default=Path('output/memory'))
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument('--attention', action='store_true', help='with self-attention')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--minutes', type=float, help='stop after so many, to go on at the next call')
    parser.add_argument('--width', type=positive, default=128)
    parser.add_argument('--depth', type=positive, default=2)
    parser.add_argument('--images', type=positive, default=1000, help='for training, per class')
    parser.add_argument('--test-images', type=int, default=1000, help='per class')
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads())
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run what has no result yet, seed by seed; or show the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.data is None and args.show is None:
        parser.error('give a folder of images, or --show')
    with told(parser, None if args.show else args.out):
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Run what has no result yet until the time is over; or show the results."""
    if args.show is not None:
        found = gather(args.show)
        print(table(found))
        draw(found, args.show / 'memory.png')
        return
    if args.width % SHAPE['num_heads']:
        raise ValueError(f'--width must be a multiple of the {SHAPE["num_heads"]} heads, got {args.width}')
    torch.set_num_threads(args.threads)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    this, there = Path('this run'), read_records(args.out, RESULT, '*-w*-d*.json')
    check_same({this: {'arguments': vars(args)}, **there}, SETTINGS, within='arguments')
    runs = [(variant, seed) for seed in dict.fromkeys(args.seeds) for variant in dict.fromkeys(args.variants)]
    data = {
        'train': load(args.data / 'train', 0, args.images),
        'test': load(args.data / 'test', 0, args.test_images),
    }
    images = checksums(data)
    check_same({this: images, **there}, images)
    missing = (one for one in runs if not Path(args.out, f'{title(args, *one)}.json').exists())
    run_each(missing, lambda variant, seed: run(args, data, variant, seed, deadline))


if __name__ == '__main__':
    main()
