"""Positions and patches of a checkpoint are resampled to a model of other sizes, or the error says why not."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import SMALL, images, make_model
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from timm_ait import checkpoint_filter_fn

VIT = {key: SMALL[key] for key in ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'num_classes')}


def make_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(2)
    return VisionTransformer(**dict(VIT, **kwargs)).eval()


@pytest.mark.parametrize('size', [32, 48, (64, 32)])
def test_an_oblong_model_of_dynamic_size_that_was_saved_keeps_its_logits_at_another_size(
    size: int | tuple[int, int], tmp_path: Path
) -> None:
    model = make_model('vit', dynamic_img_size=True, img_size=(16, 64)).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=size).eval()
    x: Tensor = torch.nn.functional.interpolate(images(), size=size)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize('size', [SMALL['img_size'], (16, 64)], ids=str)
@pytest.mark.parametrize('is_own', [False, True])
def test_patches_are_resampled_as_those_of_timms_vit(size: Any, is_own: bool) -> None:
    vit = make_vit(img_size=size)
    expected = make_vit(img_size=(32, 64), patch_size=16)
    expected.pretrained_cfg = {'input_size': (3, *vit.patch_embed.img_size)}
    wanted = timm.models.vision_transformer.checkpoint_filter_fn(vit.state_dict(), expected)
    weights = vit.state_dict()
    if is_own:
        weights = {**make_model('vit', img_size=size).state_dict(), **weights}
    model = make_model('vit', img_size=(32, 64), patch_size=16)
    model.pretrained_cfg = expected.pretrained_cfg
    converted = checkpoint_filter_fn(weights, model)
    for key in ('patch_embed.proj.weight', 'pos_embed'):
        torch.testing.assert_close(converted[key], wanted[key])


def test_the_papers_stem_takes_no_other_patches() -> None:
    with pytest.raises(ValueError, match=r'patch_embed.* has the shape .* patch_size'):
        checkpoint_filter_fn(make_model('paper').state_dict(), make_model('paper', patch_size=16, img_size=64))


@pytest.mark.parametrize(
    ('kwargs', 'said'),
    [
        (dict(reg_tokens=4), 'has 1 class and register tokens, and the model has 5; create the model with the class'),
        (dict(class_token=False, global_pool='avg'), 'has 1 class and register tokens, and the model has 0'),
        (dict(no_embed_class=True), 'has 17 positions, also of the 1 class and register tokens; .* no_embed_class=Fal'),
    ],
    ids=str,
)
def test_other_tokens_than_those_of_the_checkpoint_are_named(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checkpoint_filter_fn(make_vit().state_dict(), make_model('vit', **kwargs))


def test_register_tokens_of_the_checkpoint_are_counted() -> None:
    with pytest.raises(ValueError, match='has 5 class and register tokens, and the model has 1'):
        checkpoint_filter_fn(make_model('vit', reg_tokens=4).state_dict(), make_model('vit'))
