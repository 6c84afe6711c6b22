"""Models for evaluation alone, as timm's ``--reparam`` makes them."""

from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode

from timm_ait import GlobalWorkspace
from timm_ait.fused import FusedWorkspace

KWARGS: list[dict[str, Any]] = [
    {},
    dict(beta=2.0, retrieval_steps=3),
    dict(retrieval_scale=0.5),
    dict(write_mode='never'),
    dict(scale_mlp_norm=True),
]


@pytest.mark.parametrize('kwargs', KWARGS, ids=str)
def test_a_fused_model_gives_the_same_logits_and_leaves_the_model_as_it_was(kwargs: dict[str, Any]) -> None:
    model = timm.create_model('test_ait', **kwargs).eval()
    for block in model.blocks:
        for p in block.mlp.hidden_norm.parameters():
            torch.nn.init.normal_(p)
    fused = reparameterize_model(model)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fused(images), model(images))
        assert torch.equal(fused.train()(images), model(images))  # it reads alone, in any mode
    assert all(isinstance(block.mlp, FusedWorkspace) for block in fused.blocks)
    assert all(isinstance(block.mlp, GlobalWorkspace) for block in model.blocks)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_fused_model_of_another_dtype_gives_the_same_logits(dtype: torch.dtype) -> None:
    model = timm.create_model('test_ait').eval().to(dtype)
    images = torch.randn(3, 3, 32, 32, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(reparameterize_model(model)(images), model(images))


def test_it_holds_nothing_of_the_write() -> None:
    fused = GlobalWorkspace(5, num_slots=3).eval().fuse()
    assert {name.split('.')[0] for name in fused.state_dict()} == {'fc1', 'fc2', 'norm', 'attractors'}


class Counter(TorchDispatchMode):
    names: list[str]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_left_but_the_feed_forward_part_its_norm_and_the_retrieval() -> None:
    fused = GlobalWorkspace(5, num_slots=3).eval().fuse()
    x = torch.randn(2, 7, 5)
    with torch.no_grad(), Counter() as counter:
        counter.names = []
        fused(x)
    views = {'t', 'view', '_unsafe_view', 'transpose', 'detach'}
    assert [name for name in counter.names if name not in views] == [
        *('addmm', 'gelu', 'addmm', 'native_layer_norm', 'mm', '_softmax', 'addmm'),
    ]


def test_a_workspace_that_writes_in_evaluation_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match="cannot be fused or scripted, got write_mode='always'; take 'train'"):
        GlobalWorkspace(5, write_mode='always').fuse()


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
def test_scripted_and_checkpointed_it_gives_the_same_logits() -> None:
    fused = reparameterize_model(timm.create_model('test_ait')).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = fused(images)
        torch.testing.assert_close(torch.jit.script(fused)(images), logits)
    fused.set_grad_checkpointing()
    torch.testing.assert_close(fused(images), logits)
