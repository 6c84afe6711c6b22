"""What each exported form of a model costs: size, difference of the logits, speed, and accuracy where images are given.

    python benchmarks/export.py                       # test_ait with its weights
    python benchmarks/export.py --data DIR/test       # and its accuracy on 2,000 images, DIR/test/<class>/*
    python benchmarks/export.py --formats eager 'int8 dynamic, torch'  # some alone

All forms take turns in one process; a turn of all is a round. Speeds are medians over the rounds. The script prints a
table, and writes the numbers to the file ``--out``.
"""

import argparse
import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import timm
import torch
from images import sample_folder
from loop import accuracy
from record import check_model, positive, told, write_record
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import timm_ait  # noqa: F401  registers the models

Run = Callable[[Tensor], Tensor]
Form = tuple[Run, Path]
ANY_BATCH = ({0: torch.export.Dim('batch', min=1, max=4096)},)


@dataclass
class Row:
    """One form of the model.

    Attributes:
        name: Of the form.
        megabytes: Size of its file, 10^6 bytes.
        difference: Largest difference of a logit from the eager model's, over all images.
        images_per_second: Median over the rounds.
        relative: Median over the rounds of the speed relative to the eager model's in the same round.
        accuracy: Top-1, %; None where no labelled images were given.
    """

    name: str
    megabytes: float
    difference: float
    images_per_second: float = 0.0
    relative: float = 0.0
    accuracy: float | None = None


def _saved(model: nn.Module, path: Path) -> Form:
    torch.save(model.state_dict(), path)
    return model, path


def _dynamic(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images,), dynamic_shapes=ANY_BATCH)


def _onnx(model: nn.Module, images: Tensor, path: Path, dynamo: bool) -> Form:
    from onnxruntime import InferenceSession, SessionOptions

    if dynamo:
        options = dict(dynamic_shapes=ANY_BATCH, external_data=False)
    else:
        options = dict(input_names=['images'], dynamic_axes={'images': {0: 'batch'}})
    torch.onnx.export(model, (images,), path, dynamo=dynamo, verbose=False, **options)
    threads = SessionOptions()
    threads.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(path, threads, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), path


def _exported(model: nn.Module, images: Tensor, path: Path) -> Form:
    torch.export.save(_dynamic(model, images), path)
    return torch.export.load(path).module(), path


def _aotinductor(model: nn.Module, images: Tensor, path: Path) -> Form:
    path = path.with_suffix('.pt2')
    torch._inductor.aoti_compile_and_package(_dynamic(model, images), package_path=str(path))
    return torch._inductor.aoti_load_package(str(path)), path


def _scripted(model: nn.Module, images: Tensor, path: Path) -> Form:
    torch.jit.script(model).save(path)
    return torch.jit.load(path).eval(), path


def _torchao(model: nn.Module, path: Path, config: str) -> Form:
    from torchao import quantization

    quantization.quantize_(model, getattr(quantization, config)())
    return _saved(model, path)


def _quantised(model: nn.Module, path: Path) -> Form:
    return _saved(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), path)


# Each makes a form of a model of its own, which it may change: (model, images, path).
FORMATS: dict[str, Callable[[nn.Module, Tensor, Path], Form]] = {
    'eager': lambda model, images, path: _saved(model, path),
    'reparameterize_model': lambda model, images, path: _saved(reparameterize_model(model), path),
    'TorchScript': _scripted,
    'torch.export': _exported,
    'AOTInductor': _aotinductor,
    'ONNX': lambda model, images, path: _onnx(model, images, path, dynamo=True),
    'ONNX, legacy': lambda model, images, path: _onnx(model, images, path, dynamo=False),
    'int8 weights, torchao': lambda model, images, path: _torchao(model, path, 'Int8WeightOnlyConfig'),
    'int8 dynamic, torchao': lambda model, images, path: _torchao(model, path, 'Int8DynamicActivationInt8WeightConfig'),
    'int8 dynamic, torch': lambda model, images, path: _quantised(model, path),
}


def read_images(model: nn.Module, folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Read ``count`` images (T, C, H, W), as the model wants them, and labels (T,), evenly spread over the classes.

    Raises:
        ValueError: If the folder has not as many classes as the model.
    """
    chosen = sample_folder(folder, model, count)
    if len(chosen.dataset.classes) != model.num_classes:
        raise ValueError(
            f'expected {model.num_classes} folders of classes in {folder}, got {len(chosen.dataset.classes)}; give the '
            'folder of a split, such as DIR/test'
        )
    images, labels = zip(*DataLoader(chosen, batch_size=500), strict=True)
    return torch.cat(images), torch.cat(labels)


def compare(run: Run, expected: Tensor, images: Tensor, labels: Tensor | None) -> tuple[float, float | None]:
    """Return the largest difference from the logits ``expected`` (T, K), and with labels (T,) the accuracy in %."""
    logits = torch.cat([run(part) for part in images.split(250)])
    return (logits - expected).abs().max().item(), None if labels is None else accuracy(logits, labels)


def speeds(runs: list[Run], images: Tensor, rounds: int, turns: int) -> list[list[float]]:
    """Images per second of every form (outer list), in every round (inner list)."""
    found: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for run, seen in zip(runs, found, strict=True):
            start = time.perf_counter()
            for _ in range(turns):
                run(images)
            if round_:  # the first warms up
                seen.append(turns * len(images) / (time.perf_counter() - start))
    return found


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[Row]:
    """Make all forms, compare their logits and time them."""
    model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    images, labels = torch.randn(args.batch_size, *model.pretrained_cfg['input_size']), None
    if args.data:
        images, labels = read_images(model, args.data, args.images)
    batch = images[: args.batch_size]
    if len(batch) < args.batch_size:
        raise ValueError(f'--batch-size {args.batch_size} needs as many images, got {len(batch)}; raise --images')
    example = batch[:1].repeat(2, 1, 1, 1)  # two images, or exporters take the number of images for fixed
    expected = torch.cat([model(part) for part in images.split(250)])
    rows, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(args.formats):
            run, path = FORMATS[name](copy.deepcopy(model), example, Path(folder) / str(i))
            difference, top1 = compare(run, expected, images, labels)
            rows.append(Row(name, path.stat().st_size / 1e6, difference, accuracy=top1))
            runs.append(run)
        timed = speeds([model, *runs], batch, args.rounds, args.turns)
    for row, seen in zip(rows, timed[1:], strict=True):
        row.images_per_second = median(seen)
        row.relative = median(a / b for a, b in zip(seen, timed[0], strict=True))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ['| format | file, MB | largest difference of logits | images/s | beside eager | accuracy, % |']
    lines.append('|---|---|---|---|---|---|')
    for row in rows:
        top1 = '' if row.accuracy is None else f'{row.accuracy:.2f}'
        speed = f'{row.images_per_second:.0f} | {row.relative:.2f}'
        lines.append(f'| {row.name} | {row.megabytes:.2f} | {row.difference:.1e} | {speed} | {top1} |')
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_ait')
    parser.add_argument('--pretrained', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument('--formats', nargs='+', choices=FORMATS, default=list(FORMATS), metavar='FORMAT')
    parser.add_argument('--data', type=Path, help='folder with a folder of images for each class')
    parser.add_argument('--images', type=positive, default=2000, help='how many of them')
    parser.add_argument('--batch-size', type=positive, default=64)
    parser.add_argument('--rounds', type=positive, default=11)
    parser.add_argument('--turns', type=positive, default=5, help='batches in a turn')
    parser.add_argument('--threads', type=positive, default=1)
    parser.add_argument('--out', type=Path, help='JSON file for the numbers')
    args = parser.parse_args(argv)
    with told(parser, args.out and args.out.parent):
        check_model(args.model)
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Measure, print, and write the numbers where the command line says so."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with warnings.catch_warnings():  # what exporters say of themselves
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            rows = measure(args)
        finally:
            logging.disable(logging.NOTSET)
    print(table(rows))
    if args.out:
        write_record(args.out, vars(args), {'rows': [asdict(row) for row in rows]})


if __name__ == '__main__':
    main()
