"""Fixtures of several test files: a small Hub on this machine, a process that uses it, and a checkpoint."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_child import Child
from hub_models import ARGS, REPO, make_model, save
from hub_server import LoopbackHub
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_ait import balance


@pytest.fixture(autouse=True)
def nothing_is_pending() -> None:
    """What the last backward pass of a test could not tell is told by the next forward, which may be another test's."""
    balance._pending.clear()


@pytest.fixture(scope='module')
def served() -> Iterator[LoopbackHub]:
    server = LoopbackHub()
    yield server
    server.stop()


@pytest.fixture(scope='module')
def child(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    one = Child(tmp_path_factory.mktemp('home'), HF_ENDPOINT=served.url)
    yield one
    one.pool.shutdown()


@pytest.fixture
def remote(served: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """The small Hub, with the repository ``REPO`` alone."""
    served.repos, served.faults = {REPO: save(make_model(), tmp_path / 'saved')}, {}
    served.requests.clear()
    served.tokens.clear()
    return served


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    return tmp_path / 'cache'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as timm's train.py writes it: weights of seed 1, averaged weights of seed 2, arguments."""
    args = argparse.Namespace(
        model='test_ait', num_classes=None, model_kwargs={k: v for k, v in ARGS.items() if k != 'num_classes'}, gp=None,
        img_size=None, in_chans=None, input_size=None, crop_pct=0.9, mean=[0.5, 0.4, 0.3], opt='adamw', lr=1e-3,
        smoothing=0.0, amp=False, epochs=3, data_dir='/home/somebody/secret/path', experiment='mine',
    )  # fmt: skip
    model, average = make_model(1), make_model(2)
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args,
        ModelEmaV3(average),
        checkpoint_dir=str(tmp_path),
        max_history=1,
    )
    saver.save_checkpoint(5, metric=71.25)
    return tmp_path / 'model_best.pth.tar'
