"""Is an AiT that starts from a ViT's weights as good a start as the ViT itself?

Trains a small ViT on one part of the images, then fine-tunes it on another part: as it is, and as the AiT that keeps
the ViT's own path. Same batches, same learning rate, several seeds; the accuracy is that on the test images.

    python benchmarks/upcycle.py DIR --out benchmarks/results    (DIR/train/<class>/*, DIR/test/<class>/*)
"""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.io import read_image
from tqdm import tqdm

import timm_ait  # noqa: F401

SHAPE: dict[str, Any] = dict(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=10)
BATCH = 128
Images = tuple[Tensor, Tensor]


def load(folder: Path, first: int, count: int) -> Images:
    """Images ``first`` to ``first + count`` of every class: (N, 3, 32, 32) in [-1, 1], labels (N,)."""
    samples: dict[int, list[str]] = {}
    for path, label in ImageFolder(str(folder)).samples:
        samples.setdefault(label, []).append(path)
    chosen = [(path, label) for label, paths in samples.items() for path in paths[first : first + count]]
    images = torch.stack([read_image(path) for path, _ in tqdm(chosen, desc=f'reading {folder.name}')])
    return images.float() / 127.5 - 1, torch.tensor([label for _, label in chosen])


def fit(model: nn.Module, data: Images, epochs: int, lr: float, seed: int, what: str) -> None:
    """Train with AdamW, a cosine schedule, random flips and shifts by up to two pixels."""
    torch.manual_seed(seed)
    images, labels = data
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=lr / 100)
    model.train()
    order = torch.cat([torch.randperm(len(images))[: len(images) // BATCH * BATCH] for _ in range(epochs)])
    for step, batch in enumerate(tqdm(order.split(BATCH), desc=what)):
        schedule.step(step)
        dx, dy = torch.randint(0, 5, (2,)).tolist()
        x = F.pad(images[batch], (2, 2, 2, 2), mode='reflect')[:, :, dy : dy + 32, dx : dx + 32]
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(-1))
        loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Images) -> float:
    """Share of images classified right, in percent."""
    model.eval()
    right = sum(
        int((model(x).argmax(-1) == y).sum()) for x, y in zip(data[0].split(250), data[1].split(250), strict=True)
    )
    return 100 * right / len(data[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path)
    parser.add_argument('--out', type=Path, default=Path('output'))
    parser.add_argument('--pretrain-images', type=int, default=1500, help='per class')
    parser.add_argument('--finetune-images', type=int, default=800, help='per class, others than those')
    parser.add_argument('--test-images', type=int, default=500, help='per class')
    parser.add_argument('--epochs', type=int, nargs=2, default=(4, 2), help='of the ViT, of fine-tuning')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.time()
    first = load(args.data / 'train', 0, args.pretrain_images)
    second = load(args.data / 'train', args.pretrain_images, args.finetune_images)
    test = load(args.data / 'test', 0, args.test_images)

    torch.manual_seed(0)
    vit = timm.create_model('vit_base_patch16_224', **SHAPE)
    fit(vit, first, args.epochs[0], lr=1e-3, seed=0, what='ViT')
    results: dict[str, Any] = {'vit': accuracy(vit, test), 'finetuned': {'vit': [], 'ait': []}}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, 'vit.safetensors')
        save_file(vit.state_dict(), weights)
        starts = {'vit': 'vit_base_patch16_224', 'ait': 'ait_vit_base_patch16_224'}
        for seed in range(1, args.seeds + 1):
            for name, entry in starts.items():
                torch.manual_seed(seed)
                file = dict(file=str(weights), num_classes=10)
                model = timm.create_model(entry, pretrained=True, pretrained_cfg_overlay=file, **SHAPE)
                results.setdefault(f'{name} at the start', accuracy(model, test))
                fit(model, second, args.epochs[1], lr=3e-4, seed=seed, what=f'{name}, seed {seed}')
                results['finetuned'][name].append(accuracy(model, test))
    for name, values in results['finetuned'].items():
        print(f'{name}: {statistics.mean(values):.2f} % ({", ".join(f"{x:.2f}" for x in values)})')
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    results |= {
        key: value if isinstance(value, int) else str(value) for key, value in vars(args).items() if key != 'data'
    }
    results |= {'seconds': round(time.time() - start), 'commit': commit, 'torch': torch.__version__}
    results |= {'timm': timm.__version__, 'machine': f'{platform.processor() or platform.machine()}, CPU'}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'upcycle.json').write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main()
