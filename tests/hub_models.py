"""A toy model as a repository of the Hub, for the tests of loading and publishing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import timm
import torch
from hub_child import images
from hub_server import LoopbackHub
from timm.models import save_for_hf
from torch import nn

from timm_ait.pretrained import published

REPO = 'someone/test_ait.toy'
NAME = f'hf-hub:{REPO}'
# Distinct primes where possible: 7 slots of width 5, 3 heads, 11 classes.
ARGS: dict[str, Any] = dict(
    depth=2, embed_dim=32, num_heads=2, num_slots=7, slot_dim=5, write_heads=3, bottleneck=13, num_classes=11
)


def make_model(seed: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(**{'model_name': 'test_ait', **ARGS, **kwargs}).eval()


def save(model: nn.Module, folder: Path, **model_args: Any) -> dict[str, bytes]:
    """Save a model with timm. Return the files, by name, as a Hub holds them."""
    save_for_hf(model, str(folder), model_args=dict(ARGS, **model_args), safe_serialization=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edited(config: bytes, **changes: Any) -> bytes:
    content = json.loads(config)
    content['pretrained_cfg'].update(changes.pop('pretrained_cfg', {}))
    content['model_args'].update(changes.pop('model_args', {}))
    return json.dumps(dict(content, **changes)).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@torch.no_grad()
def logits(model: nn.Module) -> list[Any]:
    return model.eval()(images()).tolist()


def assert_same_logits(loaded: dict[str, Any], model: nn.Module) -> None:
    """Compare up to float rounding: another process may use another number of threads."""
    torch.testing.assert_close(torch.tensor(loaded['logits']), torch.tensor(logits(model)))


def overlay(remote: LoopbackHub, **changes: Any) -> dict[str, Any]:
    """Return the config of a tag whose weights are on the Hub, with their hash."""
    keys = published('test_ait.toy', sha256(remote.repos[REPO]['model.safetensors']))
    return dict(keys, hf_hub_id=REPO, num_classes=11, **changes)
