"""Features of an AiT, as timm, torchvision and decoders for dense prediction take them."""

from typing import Any

import pytest
import timm
import torch
from models import memories
from timm.models import get_notrace_functions, get_notrace_modules
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import timm_ait  # noqa: F401  registers the models

SIDE, WIDTH, CLASSES = 48, 34, 13
LAYOUTS = pytest.mark.parametrize('layout', ['ait_small_patch4_32', 'ait_small'])


def make_model(layout: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = dict(img_size=SIDE, patch_size=16, embed_dim=WIDTH, depth=4, num_heads=2, num_classes=CLASSES)
    sizes.update(num_slots=7, slot_dim=5, write_heads=3, bottleneck=11)
    return timm.create_model(layout, **dict(sizes, **kwargs)).eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@LAYOUTS
def test_features_only_has_one_map_for_each_asked_block_with_what_feature_info_says(layout: str) -> None:
    features = make_model(layout, features_only=True, out_indices=(1, -1))
    maps = features(images())
    assert [tuple(x.shape) for x in maps] == [(3, WIDTH, 3, 3)] * 2
    assert features.feature_info.channels() == [WIDTH] * 2
    assert features.feature_info.reduction() == [16] * 2
    assert features.feature_info.module_name() == ['blocks.1', 'blocks.3']


@LAYOUTS
def test_features_train_the_memory_and_get_the_balance_loss(layout: str) -> None:
    features = make_model(layout, features_only=True, out_indices=(3,), write_grad=False).train()
    before = memories(features)
    features(images())[0].square().mean().backward()
    assert not any(map(torch.equal, before, memories(features)))
    assert all(block.mlp.query.weight.grad.abs().max() > 0 for block in features.model.blocks)


@LAYOUTS
@pytest.mark.parametrize('output_fmt', ['NCHW', 'NLC'])
def test_intermediates_in_both_formats_are_the_same_numbers(layout: str, output_fmt: str) -> None:
    model = make_model(layout)
    final, (first, last) = model.forward_intermediates(images(), indices=[0, 3], output_fmt=output_fmt)
    assert final.shape == (3, 9 + model.num_prefix_tokens, WIDTH)
    tokens = last.flatten(2).transpose(1, 2) if output_fmt == 'NCHW' else last  # (B, E, h, w) -> (B, N, E)
    torch.testing.assert_close(model.norm(tokens), final[:, model.num_prefix_tokens :])
    assert first.shape == last.shape
    assert not torch.equal(first, last)


@LAYOUTS
def test_torchvisions_extractor_gives_what_the_model_computes_there(layout: str) -> None:
    model, seen = make_model(layout), []
    model.blocks[2].mlp.register_forward_hook(lambda _module, _args, out: seen.append(out))
    model(images())
    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    extractor = create_feature_extractor(model, {'blocks.2.mlp': 'update', 'head': 'logits'}, tracer_kwargs=tracer)
    found = extractor(images())
    torch.testing.assert_close(found['update'], seen[0])
    torch.testing.assert_close(found['logits'], model(images()))


@pytest.mark.parametrize('feature_cls', ['getter', 'fx'])
def test_maps_of_blocks_without_self_attention(feature_cls: str) -> None:
    made = dict(attention=False, features_only=True, out_indices=(1,), feature_cls=feature_cls)
    (found,) = make_model('ait_small_patch4_32', **made)(images())
    assert found.shape[0] == 3
    assert WIDTH in found.shape


@LAYOUTS
@pytest.mark.parametrize('method', ['hook', 'fx'])
def test_timms_attention_maps_are_shares_of_tokens(layout: str, method: str) -> None:
    model = make_model(layout)
    for block in model.blocks:
        block.attn.fused_attn = False  # the fused attention never has the map in memory
    maps = AttentionExtract(model, method=method)(images())
    assert len(maps) == 4
    tokens = 9 + model.num_prefix_tokens
    for attention in maps.values():
        assert attention.shape == (3, 2, tokens, tokens)
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 2, tokens))


def test_the_shares_of_the_retrieval_can_be_read_by_a_hook() -> None:
    model, seen = make_model('ait_small'), []
    model.blocks[0].mlp.retrieval.softmax.register_forward_hook(lambda _module, _args, out: seen.append(out))
    model(images())
    (shares,) = seen
    assert shares.shape == (3 * 10, 7)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(30))
