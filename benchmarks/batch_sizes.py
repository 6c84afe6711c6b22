"""Does the test accuracy depend on the batch size of the evaluation? Ours does not, the authors' way does.

    python benchmarks/batch_sizes.py cifar10 DIR --width 256 --epochs 4    # the arguments of tables.py
    python benchmarks/batch_sizes.py cifar10 DIR --weights test_ait        # published weights

Trains the row 'ait', or loads weights, and evaluates it at several batch sizes, twice: as it is, and with the same
weights in the workspace as the authors compute it, which writes into its memory in evaluation too. The images come
class by class, as validate.py reads them.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import tables
import timm
import torch
from contenders import LoopedWorkspace
from loop import Data, Settings, evaluate, normalize
from record import write_record
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_ait import GlobalWorkspace  # and registers the models
from timm_ait.card import batch_table

BATCH_SIZES = (1, 7, 64, 512)


def loop_heads(model: nn.Module) -> nn.Module:
    """A copy of a trained AiT that computes and writes as the authors do, with the same weights and memory."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mlp = looped(block.mlp)
    return model


def looped(ours: GlobalWorkspace) -> LoopedWorkspace:
    """The workspace as the authors compute it, with the weights of ``ours``."""
    sizes = (ours.num_slots, ours.slot_dim, ours.write_heads, ours.bottleneck)
    layer = LoopedWorkspace(ours.in_features, ours.fc1.out_features, *sizes)
    pairs: list[tuple[Any, Any]] = [
        *zip(layer.feed_forward[0::2], (ours.fc1, ours.fc2), strict=True),
        *(
            (layer.feed_forward[3], ours.norm),
            (layer.linear_transform, ours.linear_transform),
            (layer.write_norm, ours.write_norm),
        ),
        *((getattr(layer, name), getattr(ours, name)) for name in ('query', 'key', 'value', 'proj')),
    ]
    for theirs, mine in pairs:
        theirs.load_state_dict(mine.state_dict())
    layer.memory.copy_(nn.functional.normalize(ours.memory, dim=-1))  # unit rows, as they are once written
    return layer.to(ours.memory.device)


@torch.inference_mode()
def logits_of(model: nn.Module, data: Data, settings: Settings, batch_size: int) -> Tensor:
    """Logits (N, num_classes) of all images, in batches."""
    device = next(model.parameters()).device
    count = len(data[-1]) if isinstance(data, tuple) else len(data)  # type: ignore[arg-type]
    found = []
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        if isinstance(data, Dataset):
            images, *others, _ = torch.utils.data.default_collate([data[i] for i in indices])
        else:
            images, *others, _ = (x[start : start + batch_size] for x in data)
        found.append(model(normalize(images.to(device), settings), *(x.to(device) for x in others)))
    return torch.cat(found)


def measure(model: nn.Module, data: Data, settings: Settings) -> dict[str, dict[str, float]]:
    """Accuracy in percent, and the largest difference of a logit to those at the first batch size, by batch size.

    Every batch size starts from the same memory.
    """
    found: dict[str, dict[str, float]] = {}
    first = None
    for batch_size in BATCH_SIZES:
        top1 = evaluate(copy.deepcopy(model), data, settings, batch_size)
        logits = logits_of(copy.deepcopy(model).eval(), data, settings, batch_size)
        first = logits if first is None else first
        found[str(batch_size)] = {'top1': top1, 'difference': (logits - first).abs().max().item()}
    return found


def load(name: str) -> tuple[nn.Module, Settings, list[Any]]:
    """A model with its pretrained weights, how its images are normalized, and no log of a training run."""
    model = timm.create_model(name, pretrained=True)
    pixels = timm.data.resolve_model_data_config(model)
    return model, Settings(lr=0.0, mean=pixels['mean'], std=pixels['std']), []


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate both ways, print the table and write ``batch_sizes.json``."""
    parser = tables.make_parser(__doc__)
    parser.set_defaults(out=Path('output/batch_sizes'), seeds=[1])
    parser.add_argument('--weights', metavar='MODEL', help='evaluate the pretrained weights of this model')
    args: argparse.Namespace = parser.parse_args(argv)
    if args.table is None or len(args.seeds) != 1:
        parser.error('give a table and one seed')
    tables.complete(args, argv, 'batch_sizes.py')
    torch.set_num_threads(args.threads)
    (seed,), data = args.seeds, tables.TASKS[args.table].data
    arguments = tables.settings_of(args)
    try:
        if args.weights is None:
            trained = tables.train('ait', seed, args, data(args, 'train', args.train))
        else:
            trained = load(args.weights)
            arguments = {'table': args.table, 'test': args.test, 'weights': args.weights}
        test = data(args, 'test', args.test)
    except ValueError as error:
        parser.error(str(error))
    model, settings = trained[0].eval(), trained[1]
    found = {'ours': measure(model, test, settings), "the authors' way": measure(loop_heads(model), test, settings)}
    print(batch_table(found))
    results = {'seed': seed, 'batch_sizes': found, 'log': trained[2], 'command': args.command}
    write_record(args.out / 'batch_sizes.json', arguments, results)


if __name__ == '__main__':
    main()
