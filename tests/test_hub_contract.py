"""A model that is changed, saved and loaded is the same model, by timm's functions and by ``export``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_child import Child, fingerprint, load
from hub_models import ARGS
from hub_server import LoopbackHub
from timm.data import resolve_model_data_config
from timm.models import push_to_hf_hub, save_for_hf
from torch import Tensor, nn

from timm_ait import RelationalTransformer, hub
from timm_ait.arguments import WORKSPACE_ARGS

Change = Callable[[nn.Module], Any]
VIT: dict[str, Any] = dict(class_token=True, pos_embed='learn', global_pool='token', final_norm=True)
PLAIN: dict[str, Any] = dict(model_name='ait_small', img_size=32, patch_size=8)  # its stem takes other patch sizes
ASKED: dict[str, Any] = dict(model_name='test_ait_relational')
CONV: dict[str, Any] = dict(model_name='ait_tiny_conv4_32')


def head(num_classes: int, global_pool: str | None = None) -> Change:
    return lambda model: model.reset_classifier(num_classes, global_pool)


def size(*img_size: int, **kwargs: Any) -> Change:
    return lambda model: model.set_input_size(img_size or None, **kwargs)


# Keywords of the model, then what is done to it.
CASES: dict[str, tuple[Any, ...]] = {
    'nothing': ({},),
    'no self-attention': (dict(attention=False, write_rule='additive', write_scope='image'),),
    'write': (dict(write_rule='distinct', write_scope='image', write_mode='never', write_grad=False),),
    'memory': (dict(num_slots=3, slot_dim=7, beta=2.0, memory_decay=0.5, balance_weight=0.0, retrieval_steps=2),),
    'retrieval scale': (dict(retrieval_scale=0.0),),
    'depth': (dict(depth=3, mlp_ratio=3.0, qkv_bias=True, qk_norm=True, init_values=0.1),),
    'channels': (dict(in_chans=1),),
    'two channels': (dict(in_chans=2),),
    'four channels': (dict(in_chans=4),),
    'image': (dict(img_size=(16, 24)),),
    'patch': (dict(patch_size=8),),
    'tokens': (dict(VIT, reg_tokens=2, no_embed_class=True),),
    'flattened tokens': (dict(class_token=True, reg_tokens=2),),
    'average': (dict(global_pool='avg'),),
    'average without norm': (dict(global_pool='avg', fc_norm=False),),
    'flattened without norm': (dict(fc_norm=False),),
    'attention pool': (dict(global_pool='map'),),
    'no pool': (dict(global_pool=''),),
    'no classes': (dict(num_classes=0),),
    'any size': (dict(VIT, **PLAIN, dynamic_img_size=True),),
    'question': (dict(ASKED, question_dim=5),),
    'convolutions': (CONV,),
    'convolutions, channels': (dict(CONV, in_chans=1),),
    'other classes': ({}, head(7)),
    'classes removed': ({}, head(0)),
    'classes removed and put back': ({}, head(0), head(7)),
    'to average': ({}, head(7, 'avg')),
    'to maximum, without norm': (dict(fc_norm=False), head(7, 'max')),
    'to no pool': ({}, head(7, '')),
    'to token': (dict(class_token=True), head(7, 'token')),
    'to flattened': (dict(global_pool='avg'), head(7, 'flatten')),
    'to flattened with final norm': (VIT, head(7, 'flatten')),
    'average to flattened with final norm': (dict(VIT, global_pool='avg'), head(7, 'flatten')),
    'average to token': (dict(VIT, global_pool='avg'), head(7, 'token')),
    'attention pool to flattened': (dict(global_pool='map', final_norm=True), head(7, 'flatten')),
    'there and back': ({}, head(7, 'avg'), head(5, 'flatten')),
    'there and back with final norm': (VIT, head(7, 'flatten'), head(5, 'avg')),
    'question to average': (ASKED, head(7, 'avg')),
    'question to flattened': (dict(ASKED, global_pool='avg'), head(7, 'flatten')),
    'other image': (VIT, size(16, 24)),
    'other image, averaged': ({}, head(7, 'avg'), size(48, 48)),
    'other image, no classes': ({}, head(0), size(48, 48)),
    'other image, then classes': ({}, head(0), size(48, 48), head(7)),
    'other image and patch': (dict(VIT, **PLAIN), size(48, 48, patch_size=(4, 4))),
    'other patch': (dict(VIT, **PLAIN), size(patch_size=(8, 16))),
    'convolutions, other image, classes and pool': (CONV, size(48, 32), head(7, 'flatten')),
    'question, other image': (ASKED, head(0), size(45, 45)),
}


def make_changed(case: str) -> nn.Module:
    """Build a model, change it, then move every weight: what is new at creation must be in the file."""
    kwargs, *changes = CASES[case]
    torch.manual_seed(1)
    model = timm.create_model(**{'model_name': 'test_ait', **ARGS, **kwargs})
    for change in changes:
        change(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    image = torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(3))
    question = [torch.ones(2, model.question_dim)] if isinstance(model, RelationalTransformer) else []
    return model(image, *question)


def parts(model: nn.Module) -> list[str]:
    return sorted(line for line in repr(model).splitlines() if not line.endswith(': None'))  # no order, no empty place


def assert_same_model(loaded: nn.Module, model: nn.Module) -> None:
    state, expected = loaded.eval().state_dict(), model.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    assert fingerprint(loaded) == fingerprint(model)
    assert torch.equal(logits(loaded), logits(model))
    assert parts(loaded) == parts(model)
    for name in ('num_classes', 'num_features', 'head_hidden_size', 'global_pool', 'num_prefix_tokens', 'in_chans'):
        assert getattr(loaded, name) == getattr(model, name), name
    for name in WORKSPACE_ARGS:
        assert getattr(loaded.blocks[-1].mlp, name) == getattr(model.blocks[-1].mlp, name), name
    if not model.dynamic_img_size:
        size = (model.in_chans, *model.patch_embed.img_size)
        assert tuple(resolve_model_data_config(loaded)['input_size']) == size


@pytest.mark.parametrize('case', CASES)
def test_a_changed_model_is_saved_and_loaded_by_timm_and_by_export(case: str, tmp_path: Path) -> None:
    model = make_changed(case)
    save_for_hf(model, str(tmp_path / 'timm'), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True)
    assert_same_model(loaded, model)
    save_for_hf(loaded, str(tmp_path / 'again'), safe_serialization=True)
    assert_same_model(timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True), model)
    folder = hub.export(tmp_path / 'timm' / 'model.safetensors', tmp_path / 'test_ait.toy')
    assert_same_model(timm.create_model(f'local-dir:{folder}', pretrained=True), model)


def push_changed(case: str, repo: str) -> str:
    """Push with timm. It runs in the child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_TOKEN', 'hf_onlyForThisTestOfLoopback')
        model = make_changed(case)
        push_to_hf_hub(model, repo, safe_serialization=True)
    return fingerprint(model)


@pytest.mark.parametrize('case', ['write', 'to average', 'other patch'])
def test_a_changed_model_is_pushed_by_timm_and_loads_from_the_hub(
    case: str, remote: LoopbackHub, child: Child, hub_cache: Path
) -> None:
    repo = f'me/test_ait.{len(case)}'
    pushed = child(push_changed, case, repo)
    assert child(load, f'hf-hub:{repo}', cache_dir=hub_cache)['fingerprint'] == pushed
