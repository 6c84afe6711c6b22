"""Run the Hub client in a process of its own, since huggingface_hub reads its environment when it is imported."""

import hashlib
import logging
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_ait.pretrained import WeightsError


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def start_child() -> None:
    torch.set_num_threads(1)
    logging.basicConfig(filename=os.environ['LOG'], level=logging.WARNING)
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(seconds, 0.02))  # shortens the pauses of the client between two attempts


@torch.no_grad()
def load(name: str, file_limit: int = 0, **kwargs: Any) -> dict[str, Any]:
    """Create a model with its weights, and describe it."""
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    try:
        model = timm.create_model(name, pretrained=True, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    channels, size = kwargs.get('in_chans', 3), kwargs.get('img_size', 32)
    out = model.eval()(images(channels, size))
    return {
        'fingerprint': fingerprint(model),
        'logits': [o.tolist() for o in out] if isinstance(out, list) else out.tolist(),
        'shape': [tuple(o.shape) for o in out] if isinstance(out, list) else tuple(out.shape),
        'cfg': {key: model.pretrained_cfg.get(key) for key in ('hf_hub_id', 'source', 'file', 'notes')},
    }


class Child:
    """A process whose Hub client has the given environment."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.log = folder / 'log.txt'
        folder.mkdir(exist_ok=True)
        settings = {'HF_HOME': str(folder), 'HF_HUB_DISABLE_XET': '1', 'LOG': str(self.log), **environment}
        settings |= {'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
        self.pool = ProcessPoolExecutor(1, get_context('spawn'), start_child)
        with pytest.MonkeyPatch.context() as patch:
            for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_CACHE'):
                patch.delenv(name, raising=False)
            for name, value in settings.items():
                patch.setenv(name, value)
            self.pool.submit(time.time).result()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.pool.submit(function, *args, **kwargs).result(timeout=120)

    def fails(self, name: str, **kwargs: Any) -> str:
        """Load and return the error message. The error must be one of this package."""
        with pytest.raises((WeightsError, ValueError)) as caught:
            self(load, name, **kwargs)
        return str(caught.value)


def blobs(cache: Path) -> list[Path]:
    """List the weights in a cache: neither a small config.json, nor the partial files that older clients resume."""
    files = [path for path in cache.rglob('*') if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.stat().st_size > 5000 and path.suffix != '.incomplete']
