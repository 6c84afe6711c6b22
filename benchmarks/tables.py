"""The tables of the paper and more: models of `baselines.py` and `ablations.py`, over seeds.

    python benchmarks/tables.py cifar10 DIR --rows ait ait_no_memory vit_small    # DIR/{train,test}/<class>/*
    python benchmarks/tables.py sort_of_clevr --questions all --steps 20000 --minutes 60
    python benchmarks/tables.py --show output/tables                              # from the results alone

Each run writes one JSON file when it has finished, and checkpoints on its way. Call again after a stop: finished runs
stay, and the others go on. The name of a file depends on all settings, so results of other settings never mix.
"""

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ablations
import baselines
import torch
from images import Data, checksums, load
from loop import Run, Settings, evaluate, fit
from mixers import check_heads
from record import check_device, check_same, positive, read_records, told, write_record
from runs import count_parameters, draw_rows, format_mean, gains, run_each, top1_of
from timm.optim import list_optimizers
from torch import nn

from timm_ait.arguments import WORKSPACE_ARGS
from timm_ait.datasets import AssociativeRecall, SortOfClevr, Triangle
from timm_ait.hub import Pairs
from timm_ait.sort_of_clevr import KINDS

ROWS = (*ablations.NAMES, *baselines.CATALOGUE)
DEFAULT_ROWS = ('ait', 'ait_no_memory', 'vit_small', 'vit_registers', 'coordination', 'set_transformer', 'perceiver')


def load_cifar10(args: argparse.Namespace, split: str, size: int) -> Data:
    """Read JPEG files into memory: uint8 (N, 3, 32, 32) and labels (N,), equally many of each class."""
    if args.data is None:
        raise ValueError('cifar10 needs a folder of images, with train/<class>/* and test/<class>/* in it')
    if size % 10:
        raise ValueError(f'--{split} must be a multiple of the ten classes, got {size}')
    images, labels = load(args.data / split, 0, size // 10)
    if len(labels.unique()) != 10:
        raise ValueError(f'cifar10 has ten classes, got {len(labels.unique())} in {args.data / split}')
    return images, labels


def draw_scenes(args: argparse.Namespace, split: str, size: int) -> Data:
    """Scenes with ten questions of each kind."""
    return SortOfClevr(split, size, kinds=KINDS if args.questions == 'all' else (args.questions,))


def draw_triangles(args: argparse.Namespace, split: str, size: int) -> Data:
    """Triangles, other ones in each epoch."""
    return Triangle(split, size)


def draw_recall(args: argparse.Namespace, split: str, size: int) -> Data:
    """Pairs of keys and values among patches of 4x4."""
    keys = max(args.pairs, 32)  # no key occurs twice
    return AssociativeRecall(split, size, grid=args.grid, num_pairs=args.pairs, num_keys=keys, joined=args.joined)


@dataclass(frozen=True)
class Task:
    """A table.

    Attributes:
        data: Makes a split, 'train' or 'test', of a size, from the arguments.
        img_size: Side of the images; None for four times the grid.
        patch_size: Side of a patch.
        num_classes: Classes or answers.
        sizes: Images, or scenes, for training and for test.
        question_dim: Bits of a question.
        augment: Whether training images are mirrored and shifted.
        batch_size: By default.
        pos_embed: Whether tokens say where they are, by default.
        head: What the classifier reads, by default.
        top_k: Tokens that a slot of Coordination may read.
    """

    data: Callable[[argparse.Namespace, str, int], Data]
    img_size: int | None
    patch_size: int
    num_classes: int
    sizes: tuple[int, int]
    question_dim: int = 0
    augment: bool = False
    batch_size: int = 128
    pos_embed: bool = False
    head: str = 'flatten'
    top_k: int = 20


TASKS: dict[str, Task] = {
    'cifar10': Task(load_cifar10, 32, 4, 10, (50_000, 10_000), augment=True),
    'sort_of_clevr': Task(draw_scenes, 75, 15, 10, (9_800, 200), question_dim=18, batch_size=64, top_k=5),
    'triangle': Task(draw_triangles, 64, 32, 2, (50_000, 10_000)),
    'triangle_small_patches': Task(draw_triangles, 64, 4, 2, (50_000, 10_000), pos_embed=True, head='avg'),
    'recall': Task(draw_recall, None, 4, 10, (50_000, 10_000), pos_embed=True, head='avg'),
}
SETTINGS = (
    *('table', 'train', 'test', 'width', 'depth', 'mlp_ratio', 'head', 'pos_embed'),
    *('batch_size', 'lr', 'weight_decay', 'bfloat16'),
)
RESULT = ('row', 'seed', 'top1', 'parameters', 'arguments', 'log')
# Later settings: results without them keep their names.
WHERE_GIVEN = ('heads', 'num_slots', 'opt', 'turn', 'model_kwargs')
OF_ONE_TABLE = {'sort_of_clevr': ('questions',), 'recall': ('grid', 'pairs', 'joined')}


def has_slots(row: str) -> bool:
    """Whether a model has slots, induced points, latents or registers."""
    return row in ablations.NAMES or 'num_slots' in baselines.CATALOGUE[row][1]


def create(row: str, args: argparse.Namespace) -> nn.Module:
    """Make the model of a row. A width, depth or MLP ratio that is None is the row's own."""
    task = TASKS[args.table]
    sizes: dict[str, Any] = dict(embed_dim=args.width, depth=args.depth, mlp_ratio=args.mlp_ratio)
    if args.width is not None:
        sizes['num_heads'] = args.heads or max(args.width // 64, 1)  # of the paper's width
        check_heads(args.width, sizes['num_heads'])
    if has_slots(row):
        sizes['num_slots'] = args.num_slots
    if row in ('coordination', 'coordination_h'):
        sizes['top_k'] = task.top_k
    make = ablations.create if row in ablations.NAMES else baselines.create
    return make(
        row,
        img_size=task.img_size or 4 * args.grid,
        patch_size=task.patch_size,
        num_classes=task.num_classes,
        question_dim=task.question_dim,
        pos_embed=args.pos_embed,
        head=args.head,
        **{name: size for name, size in sizes.items() if size is not None},
        **args.model_kwargs,
    )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a result, apart from row and seed."""
    length = 'epochs' if args.steps is None else 'steps'
    given = [name for name in WHERE_GIVEN if getattr(args, name)]
    return {name: getattr(args, name) for name in (*SETTINGS, *given, length, *OF_ONE_TABLE.get(args.table, ()))}


def title(args: argparse.Namespace, row: str, seed: int) -> str:
    """Name of a run, which differs for other settings."""
    return f'{args.table}-{row}-{seed}-{digest(settings_of(args))}'


def digest(settings: dict[str, Any]) -> str:
    """What stands for the settings in the names of files."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def train(
    row: str, seed: int, args: argparse.Namespace, data: Data, deadline: float | None = None
) -> tuple[nn.Module, Settings, Run, Path]:
    """Train the model of a row, from its checkpoint on if there is one.

    Returns:
        The model, its settings, the run and the checkpoint.

    Raises:
        OutOfTimeError: At the deadline.
    """
    task = TASKS[args.table]
    torch.manual_seed(seed)
    model = create(row, args).to(args.device)
    settings = Settings(
        lr=args.lr,
        epochs=args.epochs,
        steps=args.steps,
        batch_size=args.batch_size,
        opt=args.opt or Settings.opt,
        weight_decay=args.weight_decay,
        flip=task.augment or args.turn,
        turn=args.turn,
        shift=4 if task.augment else 0,
        seed=seed,
        bfloat16=args.bfloat16,
    )
    name = title(args, row, seed)
    checkpoint = args.out / 'checkpoints' / f'{name}.pt'
    fitted = fit(model, data, settings, checkpoint, args.save_every, args.workers, name, deadline)
    return model, settings, fitted, checkpoint


def run(row: str, seed: int, args: argparse.Namespace, data: dict[str, Data], deadline: float | None) -> float:
    """Train and test one model, and write its result before the checkpoint goes; the test accuracy in percent."""
    model, settings, fitted, checkpoint = train(row, seed, args, data['train'], deadline)
    top1 = evaluate(model, data['test'], settings, workers=args.workers)
    results: dict[str, Any] = {'row': row, 'seed': seed, 'top1': top1, 'command': args.command}
    results |= {'parameters': count_parameters(model), **checksums(data), **fitted.record()}
    write_record(args.out / f'{title(args, row, seed)}.json', settings_of(args), results)
    checkpoint.unlink(missing_ok=True)
    return top1


def gather(folder: Path) -> dict[str, dict[str, dict[int, Any]]]:
    """Results by their settings, as text, then by row, then by seed.

    Raises:
        ValueError: For a file that is no result, and for results of one table that are of other images.
    """
    tables: dict[str, dict[Path, Any]] = {}
    for path, record in read_records(folder, RESULT).items():
        if record['row'] not in ROWS:
            raise ValueError(f'{path} is of a row {record["row"]!r} that is not known here; remove it')
        arguments = {
            key: value for key, value in record['arguments'].items() if value is not None and value is not False
        }
        settings = ', '.join(f'{name} {value}' for name, value in arguments.items() if name != 'table')
        tables.setdefault(f'{arguments["table"]}: {settings}', {})[path] = record
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for heading, records in tables.items():
        check_same(records, ['data', 'test_data'])
        rows = found[heading] = {}
        for record in sorted(records.values(), key=lambda record: ROWS.index(record['row'])):
            rows.setdefault(record['row'], {})[record['seed']] = record
    return found


def less(row: str, control: str | None, rows: dict[str, dict[int, Any]]) -> str:
    """The accuracy of a row less that of another over the seeds that both have; '' if there are none."""
    return '' if control in (None, row) else format_mean(gains(top1_of(rows[row]), top1_of(rows.get(control, {}))), '+')


def format_table(rows: dict[str, dict[int, Any]]) -> str:
    """A table in Markdown. The differences are those to ait, and to the same model without memory."""
    heading = '| model | trained parameters, M | seeds | top-1, % | less that of ait | less that of no memory '
    lines = [f'{heading}| training loss |', '|---|---|---|---|---|---|---|']
    for row, seeds in rows.items():
        top1 = format_mean(list(top1_of(seeds).values()))
        loss = statistics.mean(record['log'][-1]['loss'] for record in seeds.values())
        parameters = next(iter(seeds.values()))['parameters'] / 1e6
        differences = f'{less(row, "ait", rows)} | {less(row, ablations.without_memory(row), rows)}'
        lines.append(f'| {row} | {parameters:.2f} | {len(seeds)} | {top1} | {differences} | {loss:.3f} |')
    return '\n'.join(lines)


def draw(rows: dict[str, dict[int, Any]], heading: str, path: Path) -> None:
    """Draw each run as a point, and each mean with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.4 * len(rows)), layout='constrained', facecolor='white')
    axes = figure.subplots()
    draw_rows(axes, {row: list(top1_of(seeds).values()) for row, seeds in rows.items()})
    axes.set(xlabel='top-1 accuracy, %: each seed, mean and 95 % interval')
    axes.set_title(heading, fontsize='small', wrap=True)
    figure.savefig(path, dpi=110)


def show(folder: Path) -> None:
    """Print one table for each setting, and draw those with several seeds."""
    found = gather(folder)
    if not found:
        raise ValueError(f'expected results in {folder}, got none; run a table with --out {folder} first')
    for heading, rows in found.items():
        arguments = next(iter(next(iter(rows.values())).values()))['arguments']
        print(f'{heading}\n\n{format_table(rows)}\n')
        if any(len(seeds) > 1 for seeds in rows.values()):  # single points are better read than looked at
            draw(rows, heading, folder / f'{arguments["table"]}-{digest(arguments)}.png')


def make_parser(doc: str | None = __doc__) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', nargs='?', choices=TASKS)
    parser.add_argument('data', nargs='?', type=Path, help='folder of images, for cifar10')
    parser.add_argument('--show', type=Path, metavar='DIR', help='print and draw the tables of these results')
    parser.add_argument('--out', type=Path, default=Path('output/tables'))
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=DEFAULT_ROWS, metavar='ROW', help=', '.join(ROWS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--minutes', type=float, help='stop after so many, to go on at the next call')
    parser.add_argument('--questions', choices=('all', *KINDS), default='binary', help='of sort_of_clevr')
    parser.add_argument('--turn', action='store_true', help='turn and mirror training scenes; for binary questions')
    parser.add_argument('--grid', type=int, default=16, help='patches a side of recall')
    parser.add_argument('--pairs', type=int, default=8, help='of recall')
    parser.add_argument('--joined', action='store_true', help='key and value of recall stand in one patch')
    parser.add_argument(
        '--train', type=positive, help="images or scenes to train on; by default the table's own number"
    )
    parser.add_argument('--test', type=positive, help='the same for the test')
    parser.add_argument('--width', type=positive, help="of a token; by default each row's own, as is depth")
    parser.add_argument('--depth', type=positive)
    parser.add_argument('--mlp-ratio', type=float)
    parser.add_argument('--heads', type=int, help='of self-attention, with --width; by default one for 64 of it')
    parser.add_argument('--num-slots', type=int, help="of the memory; by default each row's own")
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=Pairs,
        metavar='KEY=VALUE',
        help='of the workspaces, for rows of AiT, for instance bottleneck=64 beta=2',
    )
    parser.add_argument('--head', choices=baselines.HEADS, help="what the classifier reads; the table's own by default")
    parser.add_argument('--pos-embed', action=argparse.BooleanOptionalAction, help='whether tokens have positions')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--steps', type=int, help='instead of epochs')
    parser.add_argument('--batch-size', type=int)
    parser.add_argument('--opt', choices=list_optimizers(), metavar='OPT', help='as timm calls it; adamw by default')
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--weight-decay', type=float, default=0.05)
    parser.add_argument('--bfloat16', action='store_true')
    parser.add_argument('--save-every', type=positive, default=500, help='steps between checkpoints')
    parser.add_argument('--workers', type=int, default=0, help='processes that draw images')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads())
    return parser


def complete(args: argparse.Namespace, argv: list[str] | None, script: str = 'tables.py') -> argparse.Namespace:
    """Fill in what the table decides, and the command that was given.

    Raises:
        ValueError: For arguments that do not go together.
    """
    if args.heads is not None and (args.width is None or args.heads < 1 or args.width % args.heads):
        raise ValueError('give --heads, at least 1, together with --width, which it must divide')
    if args.mlp_ratio is not None and not args.mlp_ratio > 0:
        raise ValueError(f'--mlp-ratio must be above 0, got {args.mlp_ratio}')
    if args.num_slots is not None:
        without = [row for row in args.rows if not has_slots(row)]
        if args.num_slots < 1 or without:
            got = f'{", ".join(without)}, without slots' if without else args.num_slots
            raise ValueError(f'--num-slots must be at least 1, for --rows that have slots; got {got}')
    for row in args.rows if args.model_kwargs else ():
        fixed = ablations.ABLATIONS[row].args if row in ablations.ABLATIONS else WORKSPACE_ARGS
        free = [name for name in WORKSPACE_ARGS if name not in fixed and name != 'num_slots']
        wrong = [name for name in args.model_kwargs if name not in free]
        if wrong:
            raise ValueError(
                f'--model-kwargs of {row} may be {", ".join(free) or "none, as it is no AiT"}; got {", ".join(wrong)}'
            )
    check_device(args.device)
    if args.turn and (args.table != 'sort_of_clevr' or args.questions != 'binary'):
        raise ValueError('--turn is for sort_of_clevr --questions binary: other answers change as the scene turns')
    task = TASKS[args.table]
    defaults = dict(batch_size=task.batch_size, pos_embed=task.pos_embed, head=task.head)
    for name, value in {**defaults, 'train': task.sizes[0], 'test': task.sizes[1]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    words = sys.argv[1:] if argv is None else argv
    folders = {args.data: 'DIR', args.out: 'OUT'}  # those of one machine tell nobody anything
    args.command = shlex.join(['python', f'benchmarks/{script}', *(without_folders(word, folders) for word in words)])
    return args


def without_folders(word: str, folders: dict[Path, str]) -> str:
    """A word of a command line, FOLDER or --option=FOLDER, with the name of a folder in its place."""
    option, equals, value = word.partition('=') if word.startswith('--') else ('', '', word)
    return f'{option}{equals}{folders.get(Path(value), value)}'


def main(argv: list[str] | None = None) -> None:
    """Run what has no result yet, seed by seed; or show the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.show is not None:
        with told(parser):
            return show(args.show)
    if args.table is None:
        parser.error('give a table, or --show')
    with told(parser, args.out):
        run_all(complete(args, argv))


def run_all(args: argparse.Namespace) -> None:
    """Run what has no result yet, one seed after the other, until the time is over."""
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    there = read_records(args.out, RESULT, f'{args.table}-*-{digest(settings_of(args))}.json')
    runs = [(row, seed) for seed in dict.fromkeys(args.seeds) for row in dict.fromkeys(args.rows)]

    def is_missing(one: tuple[str, int]) -> bool:
        return not Path(args.out, f'{title(args, *one)}.json').exists()

    if not any(map(is_missing, runs)):
        print(f'all is there; python benchmarks/tables.py --show {args.out} prints it')
        return
    make = partial(TASKS[args.table].data, args)
    data = {'train': make('train', args.train), 'test': make('test', args.test)}
    images = checksums(data)
    check_same({Path('this run'): images, **there}, images)
    missing = filter(is_missing, runs)  # asked before each run: another process may have written some
    run_each(missing, lambda row, seed: run(row, seed, args, data, deadline))


if __name__ == '__main__':
    main()
