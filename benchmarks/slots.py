"""Does the memory of a trained model tell tokens apart? A table with one row for each block.

    python benchmarks/slots.py DIR --model test_ait                        # DIR/<class>/*.jpg, the model's own weights
    python benchmarks/slots.py DIR --model ait_small --checkpoint output/own/model_best.pth.tar
    python benchmarks/slots.py --writes 100 --model ait_small_patch4_32    # an untrained memory, written with noise

A retrieval that is the same for every token is a bias, even if it is long. So look at the columns *varies* first.
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from images import sample_folder
from record import positive, told
from torch.utils.data import DataLoader

from timm_ait import BlockReport, format_report, memory_report
from timm_ait.checkpoint import is_path, load_model


@torch.no_grad()
def write_noise(model: Any, writes: int) -> dict[int, BlockReport]:
    """Write random images. Return a report on the first block by the number of writes."""
    size = (32, *model.pretrained_cfg['input_size'])
    seen = {}
    for i in range(writes + 1):
        if str(i).strip('0') in ('', '1', '3') or i == writes:
            seen[i] = memory_report(model, torch.randn(size))[0]
        model.forward_features(torch.randn(size))
    return seen


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', help='images, one folder for each class')
    parser.add_argument('--model', default='test_ait')
    parser.add_argument('--checkpoint', type=Path, help="take these weights instead of the model's own")
    parser.add_argument('--images', type=positive, default=1000, help='number of images, spread evenly over the folder')
    parser.add_argument('--writes', type=positive, help='write so many batches to an untrained memory instead')
    args = parser.parse_args(argv)
    if args.writes and (is_path(args.model) or not timm.is_model(args.model)):
        parser.error(f'--writes needs the name of a model, got --model {args.model}')
    if args.writes and (args.folder or args.checkpoint):
        parser.error('--writes takes an untrained model and no images: leave out the folder and --checkpoint')
    if args.writes:
        torch.manual_seed(0)
        with told(parser):
            seen = write_noise(timm.create_model(args.model).train(), args.writes)
        lines = (f'| {i} | {report.mean_cosine:.4f} | {report.effective_rank:.1f} |' for i, report in seen.items())
        print('| writes | slots: mean cosine | effective rank |\n|---|---|---|', *lines, sep='\n')
        return
    if args.folder is None:
        parser.error('give a folder of images, or --writes')
    with told(parser):
        model = load_model(args.model, args.checkpoint).eval()
        images = DataLoader(sample_folder(args.folder, model, args.images), batch_size=100)
        print(format_report(memory_report(model, images)))


if __name__ == '__main__':
    main()
