"""Is an AiT that starts from the weights of a ViT as good a start as the ViT itself?

Trains a small ViT on one part of the images. Then fine-tunes it on another part, once as it is and once as each of the
AiTs that compute what the ViT computes: with the published memory, with distinct slots, and with a memory for each
image. All see the same batches, with the same learning rate, for several seeds. Accuracies are those of test images.
Call again after a stop: each training goes on from its checkpoint, until the result is written.

    python benchmarks/upcycle.py DIR --out benchmarks/results    (DIR/train/<class>/*, DIR/test/<class>/*)
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from images import load
from loop import Settings, evaluate, fit
from record import check_new, positive, told, write_record
from safetensors.torch import save_file
from torch import Tensor
from variants import IMAGE

import timm_ait  # noqa: F401  registers the models

SHAPE: dict[str, Any] = dict(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=10)
AIT = 'ait_vit_base_patch16_224'
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    'vit': ('vit_base_patch16_224', {}),
    'ait': (AIT, {}),
    'ait_distinct': (AIT, dict(write_rule='distinct')),
    'ait_image': (AIT, IMAGE),
}
Images = tuple[Tensor, Tensor]


def compare(first: Images, second: Images, test: Images, args: argparse.Namespace) -> dict[str, Any]:
    """Train the ViT on ``first``, fine-tune it and :data:`STARTS` on ``second``; accuracies in percent on ``test``."""
    pretrain, finetune = (
        Settings(lr=lr, warmup_lr=lr / 100, epochs=epochs, batch_size=args.batch_size)
        for lr, epochs in zip((1e-3, 3e-4), args.epochs, strict=True)
    )
    torch.manual_seed(0)
    vit = timm.create_model(STARTS['vit'][0], **SHAPE)
    fit(vit, first, pretrain, checkpoint_of(args, 'vit', 0), name='ViT')
    results: dict[str, Any] = {'vit': evaluate(vit, test, pretrain), 'finetuned': {name: [] for name in STARTS}}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, 'vit.safetensors')
        save_file(vit.state_dict(), weights)
        overlay = dict(file=str(weights), num_classes=SHAPE['num_classes'])
        for seed in range(1, args.seeds + 1):
            for name, (entry, memory) in STARTS.items():
                torch.manual_seed(seed)
                model = timm.create_model(entry, pretrained=True, pretrained_cfg_overlay=overlay, **SHAPE, **memory)
                if seed == 1:
                    results[f'{name} at the start'] = evaluate(model, test, finetune)
                own = replace(finetune, seed=seed)
                fit(model, second, own, checkpoint_of(args, name, seed), name=f'{name}, seed {seed}')
                results['finetuned'][name].append(evaluate(model, test, finetune))
    return results


def checkpoint_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a training is kept until the result is written. The ViT that all start from has seed 0."""
    return Path(args.out, 'checkpoints', f'upcycle-{name}-{seed}.pt')


def main(argv: list[str] | None = None) -> None:
    """Run the comparison, print it and write ``upcycle.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path)
    parser.add_argument('--out', type=Path, default=Path('output'))
    parser.add_argument('--pretrain-images', type=int, default=1500, help='of each class')
    parser.add_argument('--finetune-images', type=int, default=800, help='of each class; other images')
    parser.add_argument('--test-images', type=int, default=500, help='of each class')
    parser.add_argument('--epochs', type=int, nargs=2, default=(4, 2), help='for the ViT, and for fine-tuning')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--seeds', type=positive, default=3)
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    with told(parser, args.out):
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Read the images, compare, and write the result before the checkpoints go."""
    torch.set_num_threads(args.threads)
    result = args.out / 'upcycle.json'
    arguments = {key: value for key, value in vars(args).items() if key != 'data'}
    check_new(result, arguments)
    start = time.monotonic()
    first = load(args.data / 'train', 0, args.pretrain_images)
    second = load(args.data / 'train', args.pretrain_images, args.finetune_images)
    test = load(args.data / 'test', 0, args.test_images)
    size, classes = tuple(first[0].shape[-2:]), len(first[1].unique())
    if size != (32, 32) or classes != SHAPE['num_classes']:
        raise ValueError(
            f'expected images of (32, 32) in {SHAPE["num_classes"]} classes in {args.data}, got {size} in {classes}'
        )
    results = compare(first, second, test, args)
    for name, values in results['finetuned'].items():
        print(f'{name}: {statistics.mean(values):.2f} % ({", ".join(f"{x:.2f}" for x in values)})')
    write_record(result, arguments, {**results, 'seconds': round(time.monotonic() - start)})
    for name, seed in (('vit', 0), *product(STARTS, range(1, args.seeds + 1))):
        checkpoint_of(args, name, seed).unlink()


if __name__ == '__main__':
    main()
