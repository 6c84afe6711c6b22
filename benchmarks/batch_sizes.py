"""Does the test accuracy depend on the batch size of the evaluation? Ours does not, the authors' way does.

    python benchmarks/batch_sizes.py cifar10 DIR --width 256 --epochs 4    # the arguments of tables.py
    python benchmarks/batch_sizes.py cifar10 DIR --weights test_ait        # published weights

Trains the row 'ait', or loads weights, and evaluates it at several batch sizes, twice: as it is, and with the same
weights in the workspace as the authors compute it, which writes into its memory in evaluation too. A model with another
memory than the paper's, or with other numbers for it, has only the first. The images come class by class, as
validate.py reads them.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import tables
import timm
import torch
from contenders import LoopedWorkspace
from images import Data
from loop import Settings, accuracy, predict
from record import check_new, told, write_record
from torch import nn

from timm_ait import GlobalWorkspace
from timm_ait.card import batch_table
from timm_ait.checkpoint import load_model

BATCH_SIZES = (1, 7, 64, 512)
RESULT = 'batch_sizes.json'


def loop_heads(model: nn.Module) -> nn.Module:
    """A copy of a trained AiT that computes and writes as the authors do, with the same weights and memory."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mlp = looped(block.mlp)
    return model


def is_published(layer: GlobalWorkspace) -> bool:
    """Whether this is the paper's workspace: one memory for the batch, with their rule and their numbers."""
    is_memory = layer.write_rule == 'published' and layer.write_scope == 'batch' and layer.scale is None
    return is_memory and (layer.memory_decay, layer.beta, layer.retrieval_steps) == (0.9, 1, 1)


def looped(ours: GlobalWorkspace) -> LoopedWorkspace:
    """The workspace as the authors compute it, with the weights of ``ours``."""
    sizes = (ours.num_slots, ours.slot_dim, ours.write_heads, ours.bottleneck)
    layer = LoopedWorkspace(ours.in_features, ours.fc1.out_features, *sizes)
    layer.load_state_dict(ours.state_dict())
    layer.memory.copy_(nn.functional.normalize(ours.memory, dim=-1))  # unit rows, as they are once written
    return layer.to(ours.memory.device)


def measure(model: nn.Module, data: Data, settings: Settings) -> dict[str, dict[str, float]]:
    """Accuracy in percent, and the largest difference of a logit to those at the first batch size, by batch size.

    Every batch size starts from the same memory.
    """
    found: dict[str, dict[str, float]] = {}
    first = None
    for batch_size in BATCH_SIZES:
        logits, labels = predict(copy.deepcopy(model), data, settings, batch_size)
        first = logits if first is None else first
        found[str(batch_size)] = {
            'top1': accuracy(logits, labels),
            'difference': (logits - first).abs().max().item(),
        }
    return found


def load(name: str) -> tuple[nn.Module, Settings]:
    """A model with its pretrained weights, and how its images are normalized."""
    model = load_model(name)
    pixels = timm.data.resolve_model_data_config(model)
    return model, Settings(lr=0.0, mean=pixels['mean'], std=pixels['std'])


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the result with published weights."""
    names = ('table', 'test', 'weights', *tables.OF_ONE_TABLE.get(args.table, ()))
    return {name: getattr(args, name) for name in names}


def main(argv: list[str] | None = None) -> None:
    """Read the command line, and run."""
    parser = tables.make_parser(__doc__)
    parser.set_defaults(out=Path('output/batch_sizes'), seeds=[1], rows=['ait'])
    parser.add_argument('--weights', metavar='MODEL', help='evaluate the pretrained weights of this model')
    args: argparse.Namespace = parser.parse_args(argv)
    if args.table is None or len(args.seeds) != 1:
        parser.error('give a table and one seed')
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.weights is None:
        wrong, does = [name for name in given if name in ('rows', 'minutes', 'show')], 'trains ait alone, to the end'
    else:
        used = ('data', 'out', 'threads', *arguments_of(args))
        wrong, does = [name for name in given if name not in used], f'evaluates {args.weights} as it is'
    if wrong:
        names = ', '.join(f'--{name.replace("_", "-")}' for name in wrong)
        parser.error(f'{names}: this script {does}; leave them out')
    with told(parser, args.out):
        run(tables.complete(args, argv, 'batch_sizes.py'))


def run(args: argparse.Namespace) -> None:
    """Train or load the model, evaluate it both ways, print the table and write the result."""
    torch.set_num_threads(args.threads)
    (seed,), data = args.seeds, tables.TASKS[args.table].data
    arguments = {**tables.settings_of(args), 'seed': seed} if args.weights is None else arguments_of(args)
    check_new(args.out / RESULT, arguments)
    training: dict[str, Any] = {}
    checkpoint = None
    if args.weights is None:
        model, settings, fitted, checkpoint = tables.train('ait', seed, args, data(args, 'train', args.train))
        training = fitted.record()
    else:
        model, settings = load(args.weights)
    ways = {'ours': model}
    if all(is_published(block.mlp) for block in model.blocks):
        ways["the authors' way"] = loop_heads(model)
    test = data(args, 'test', args.test)
    found = {way: measure(one, test, settings) for way, one in ways.items()}
    print(batch_table(found))
    results = {'seed': seed, 'batch_sizes': found, 'command': args.command, **training}
    write_record(args.out / RESULT, arguments, results)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


if __name__ == '__main__':
    main()
