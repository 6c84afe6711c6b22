"""The models: sizes, what timm asks of a model, and that the memory is safe in all of it."""

import ast
import copy
import importlib
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_notrace_functions, get_notrace_modules, save_for_hf
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import timm_ait
from timm_ait import AssociativeBlock, AssociativeTransformer, GlobalWorkspace, NormalizedPatchEmbed

CLASSES, SIDE = 13, 32
PAPER = ['ait_small_patch4_32', 'ait_medium_patch4_32', 'ait_base_patch4_32', 'test_ait']
VIT = ['ait_small', 'ait_medium', 'ait_base']
SMALL = dict(
    img_size=SIDE, patch_size=8, embed_dim=34, depth=2, num_heads=2, num_classes=CLASSES,
    num_slots=7, slot_dim=5, write_heads=3, bottleneck=11,
)  # fmt: skip
LAYOUTS = pytest.mark.parametrize('layout', ['paper', 'vit'])


def make_model(layout: str = 'paper', **kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(1)
    name = dict(paper='ait_small_patch4_32', vit='ait_small')[layout]
    return timm.create_model(name, **dict(SMALL, **kwargs)).train()


def images(count: int = 3, seed: int = 0, side: int = SIDE, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def memories(model: nn.Module) -> list[Tensor]:
    return [block.mlp.memory.clone() for block in model.blocks]


def train_step(model: nn.Module, seed: int = 0) -> Tensor:
    logits = model(images(seed=seed))
    F.cross_entropy(logits, torch.arange(len(logits))).backward()
    return logits


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


# Sizes and names


def test_timm_lists_the_models_of_this_module() -> None:
    assert {*PAPER, *VIT} <= set(timm.list_models(module='ait'))
    assert 'vit_base_patch16_224' not in timm.list_models(module='ait')


@pytest.mark.parametrize(
    ('name', 'count'),
    list(zip(PAPER[:3], (15_673_322, 45_761_770, 90_894_442), strict=True)),
)
def test_the_papers_models_have_its_number_of_parameters(name: str, count: int) -> None:
    model = timm.create_model(name, num_classes=10, write_grad=True, device='meta')
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_test_model_is_small() -> None:
    assert sum(p.numel() for p in timm.create_model('test_ait', device='meta').parameters()) < 1_000_000


@pytest.mark.parametrize(('name', 'depth'), list(zip(PAPER[:3] + VIT, (2, 6, 12) * 2, strict=True)))
def test_the_layouts_are_the_papers_and_that_of_vit_b16(name: str, depth: int) -> None:
    model = timm.create_model(name, device='meta')
    mlp = model.blocks[-1].mlp
    assert (len(model.blocks), model.embed_dim, mlp.fc1.out_features) == (depth, 768, 3072)
    assert model.blocks[0].attn.num_heads == 12
    assert all(isinstance(block.mlp, GlobalWorkspace) and isinstance(block, AssociativeBlock) for block in model.blocks)
    assert (mlp.num_slots, mlp.slot_dim, mlp.write_heads, mlp.bottleneck, mlp.beta) == (32, 32, 8, 512, 1.0)
    assert (mlp.memory_decay, mlp.balance_weight, mlp.retrieval_steps, mlp.write_mode) == (0.9, 0.01, 1, 'train')
    if name in VIT:
        vit = timm.create_model('vit_base_patch16_224', depth=depth, device='meta')
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: shapes.get(key) for key in vit.state_dict()} == {k: v.shape for k, v in vit.state_dict().items()}
        assert model.default_cfg['input_size'] == (3, 224, 224)
    else:
        assert model.cls_token is model.pos_embed is model.blocks[0].attn.qkv.bias is None
        assert isinstance(model.norm, nn.Identity)
        assert isinstance(model.patch_embed, NormalizedPatchEmbed)
        assert model.head.in_features == 64 * 768
        assert {m.eps for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and 'write' not in n} == {1e-5}
        assert model.default_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(num_slots=3),
        dict(slot_dim=4),
        dict(write_heads=5),
        dict(bottleneck=6),
        dict(beta=0.25),
        dict(memory_decay=0.75),
        dict(balance_weight=0.5),
        dict(retrieval_steps=2),
        dict(write_mode='always'),
        dict(write_grad=False),
        dict(retrieval_scale=0.125),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', [*PAPER, *VIT])
def test_a_keyword_of_create_model_reaches_every_workspace(name: str, kwargs: dict[str, Any]) -> None:
    model = timm.create_model(name, depth=2, device='meta', **kwargs)
    ((key, value),) = kwargs.items()
    assert [getattr(block.mlp, key) for block in model.blocks] == [value, value]


@LAYOUTS
def test_an_unknown_keyword_is_a_type_error_that_names_it(layout: str) -> None:
    with pytest.raises(TypeError, match='num_slotz'):
        make_model(layout, num_slotz=7)


@pytest.mark.parametrize(
    ('layout', 'kwargs', 'message'),
    [
        ('vit', dict(bottleneck=0), 'bottleneck must be an integer of at least 1, got 0; leave it out'),
        ('vit', dict(num_slots=0), 'num_slots must be an integer of at least 1, got 0; leave it out'),
        ('paper', dict(beta=0), 'beta must be a finite number above 0, got 0; the paper uses 1.0'),
        ('paper', dict(memory_decay=2), r'memory_decay must lie in \[0, 1\], got 2; the paper uses 0.9'),
        ('paper', dict(write_mode='sometimes'), r"must be one of \('train', 'always', 'never'\), got 'sometimes'"),
        (
            'vit',
            dict(img_size=30),
            r'divisible by patch_size, got \(30, 30\) and \(8, 8\); the nearest sizes below are \(24, 24\)',
        ),
        ('paper', dict(img_size=(32, 31)), r'got \(32, 31\) and \(8, 8\); the nearest sizes below are \(32, 24\)'),
        ('paper', dict(dynamic_img_size=True), r"'flatten' needs a fixed .* got dynamic_img_size=True .* take .*'avg'"),
        ('paper', dict(patch_drop_rate=0.25), r"'flatten' needs a fixed .* and patch_drop_rate=0.25; .* take .*'avg'"),
        ('paper', dict(dynamic_img_size=True, global_pool='avg'), 'takes images of one size: leave dynamic_img_size'),
    ],
    ids=str,
)
def test_a_wrong_argument_says_what_was_expected_and_what_came(
    layout: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(layout, **kwargs)


@LAYOUTS
@pytest.mark.parametrize('shape', [(2, 1, SIDE, SIDE), (2, 4, SIDE, SIDE), (3, SIDE, SIDE)], ids=str)
def test_images_of_other_channels_are_refused_with_the_remedy(layout: str, shape: tuple[int, ...]) -> None:
    message = rf'expected images of shape \(B, 3, H, W\), got {re.escape(str(shape))}; .* in_chans='
    with pytest.raises(ValueError, match=message):
        make_model(layout)(torch.randn(shape))


def test_images_of_another_size_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r'expected images of \(32, 32\), got \(40, 40\); .* img_size='):
        make_model()(images(side=40))


# Evaluation


@LAYOUTS
def test_batches_of_1_7_and_64_agree_and_two_runs_are_bit_identical(layout: str) -> None:
    model, x = make_model(layout), images(64)
    train_step(model)
    model.eval()
    with torch.no_grad():
        whole = model(x)
        assert torch.equal(model(x), whole)
        for size in (1, 7):
            parts = torch.cat([model(part) for part in x.split(size)])
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize('grad', [True, False])
def test_evaluation_writes_nothing_and_training_writes_every_memory(layout: str, grad: bool) -> None:
    model = make_model(layout).eval()
    before = copy.deepcopy(model)
    with torch.set_grad_enabled(grad):
        model(images())
        model.forward_features(images(seed=1))
        assert_same_state(model, before)
        model.train()(images())
    assert not any(torch.equal(a, b) for a, b in zip(memories(model), memories(before), strict=True))


@pytest.mark.parametrize(('mode', 'in_training', 'in_evaluation'), [('always', True, True), ('never', False, False)])
def test_a_mode_that_is_not_train_holds_for_training_and_evaluation(
    mode: str, in_training: bool, in_evaluation: bool
) -> None:
    for training, writes in ((True, in_training), (False, in_evaluation)):
        model = make_model(write_mode=mode).train(training)
        before = memories(model)
        model(images())
        assert [torch.equal(a, b) for a, b in zip(memories(model), before, strict=True)] == [not writes] * 2


# Training


@LAYOUTS
@pytest.mark.parametrize('kwargs', [{}, dict(write_grad=False), dict(write_mode='never')], ids=str)
def test_every_parameter_that_is_not_frozen_gets_a_gradient(layout: str, kwargs: dict[str, Any]) -> None:
    model = make_model(layout, **kwargs)
    train_step(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
        assert p.grad is None or p.grad.abs().max() > 0, name
    assert all(p.requires_grad for p in model.parameters()) == (not kwargs)


def test_the_balance_loss_is_summed_over_blocks_weighted_and_plain() -> None:
    model, twice = make_model(), make_model(balance_weight=0.02)
    assert model.balance_loss().item() == 0
    outputs = model(images()), twice(images())
    loss = model.balance_loss()
    assert all(x.requires_grad for x in outputs)
    assert type(loss) is Tensor
    assert loss.shape == ()
    assert loss.requires_grad
    assert loss.item() > 0
    torch.testing.assert_close(loss, model.blocks[0].mlp.balance_loss() + model.blocks[1].mlp.balance_loss())
    torch.testing.assert_close(twice.balance_loss(), 2 * loss)
    assert make_model(balance_weight=0.0).balance_loss().item() == 0


@LAYOUTS
@pytest.mark.parametrize(
    'kwargs',
    [{}, dict(write_grad=False), dict(write_mode='never'), dict(proj_drop_rate=0.2, drop_path_rate=0.2)],
    ids=str,
)
def test_checkpointing_writes_once_and_changes_nothing(layout: str, kwargs: dict[str, Any]) -> None:
    """Two forwards before one backward, in which all activations are recomputed."""
    results = []
    for enable in (False, True):
        model = make_model(layout, **kwargs)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        logits = [model(images(seed=seed)) for seed in (0, 1)]
        after_forward = memories(model)
        sum(F.cross_entropy(x, torch.arange(3)) for x in logits).backward()
        assert all(map(torch.equal, after_forward, memories(model)))
        results.append((logits, after_forward, model))
    (plain, memory, model), (checkpointed, same_memory, twin) = results
    torch.testing.assert_close([x.detach() for x in checkpointed], [x.detach() for x in plain])
    torch.testing.assert_close(same_memory, memory)
    torch.testing.assert_close(twin.balance_loss(), model.balance_loss())
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, msg=name)


@pytest.mark.parametrize('mode', ['train', 'always'])
def test_checkpointing_in_evaluation_changes_nothing(mode: str) -> None:
    model = make_model(write_mode=mode).eval()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for m in (model, twin):
        train_step(m)
    torch.testing.assert_close(memories(twin), memories(model))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    assert torch.equal(twin(images()), model(images()))


def test_checkpointing_recomputes_the_blocks_and_can_be_turned_off() -> None:
    model, calls = make_model(), []
    model.blocks[1].norm2.register_forward_hook(lambda *_: calls.append(1))
    for enable, count in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        train_step(model)
        assert len(calls) == count


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
@LAYOUTS
def test_a_cast_model_answers_in_its_dtype_and_keeps_the_memory_wide(layout: str, dtype: torch.dtype) -> None:
    model = make_model(layout).to(dtype)
    logits = model(images().to(dtype))
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert logits.dtype == dtype
    assert {x.dtype for x in memories(model)} == {torch.promote_types(dtype, torch.float32)}
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


# The life of a model


@LAYOUTS
def test_from_the_meta_device_it_starts_as_if_made_here(layout: str) -> None:
    sizes = dict(embed_dim=128, num_slots=61, slot_dim=31, num_classes=CLASSES)
    made, model = make_model(layout, **sizes), make_model(layout, device='meta', **sizes)
    assert all(x.is_meta for x in model.state_dict().values())
    model.to_empty(device='cpu')
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)
    model.init_weights()
    for (name, x), y in zip(model.state_dict().items(), made.state_dict().values(), strict=True):
        assert x.isfinite().all(), name
        assert x.mean().item() == pytest.approx(y.mean().item(), abs=0.15 * y.abs().max().item() + 1e-6), name
        if y.numel() > 500:
            assert x.std().item() == pytest.approx(y.std().item(), rel=0.1), name
    train_step(model)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=['copy', 'pickle']
)
def test_a_copy_after_a_training_step_trains_on_alike(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = make_model()
    train_step(model)
    model(images(seed=5))  # whose graph is alive
    twin = copied(model)
    for m in (model, twin):
        m.zero_grad()
        train_step(m, seed=1)
    assert_same_state(model, twin)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@LAYOUTS
def test_a_state_dict_goes_round_to_the_bit(layout: str, tmp_path: Path) -> None:
    model = make_model(layout)
    train_step(model)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    torch.manual_seed(9)
    other = timm.create_model(
        dict(paper='ait_small_patch4_32', vit='ait_small')[layout], checkpoint_path=str(tmp_path / 'model.pth'), **SMALL
    )
    assert_same_state(other, model)
    assert torch.equal(other.eval()(images()), model.eval()(images()))


# What timm asks of a model


@LAYOUTS
def test_intermediates_features_and_layers_are_the_blocks_outputs(layout: str) -> None:
    model, x = make_model(layout, depth=3).eval(), images()
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: outputs.append(out[:, model.num_prefix_tokens :]))
    final, intermediates = model.forward_intermediates(x, indices=[0, 2], output_fmt='NLC')
    assert torch.equal(final, model.forward_features(x))
    assert all(map(torch.equal, intermediates, [outputs[0], outputs[2]]))
    layers = model.get_intermediate_layers(x, n=2, reshape=True)
    assert [tuple(y.shape) for y in layers] == [(3, 34, 4, 4)] * 2
    assert torch.equal(layers[1].flatten(2).transpose(1, 2), outputs[2])

    features = make_model(layout, depth=3, features_only=True, out_indices=(0, 2)).eval()
    assert features.feature_info.channels() == [34, 34]
    assert features.feature_info.reduction() == [8, 8]
    for y, expected in zip(features(x), (outputs[0], outputs[2]), strict=True):
        torch.testing.assert_close(y.flatten(2).transpose(1, 2), expected)


@LAYOUTS
def test_pruned_to_its_first_blocks_it_gives_their_intermediates(layout: str) -> None:
    model, x = make_model(layout, depth=3).eval(), images()
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers(indices=[1]) == [1]
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)


@LAYOUTS
def test_the_head_is_what_forward_head_applies_to_features(layout: str) -> None:
    model, x = make_model(layout).eval(), images()
    features = model.forward_features(x)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (3, model.head_hidden_size)
    assert torch.equal(model.head(hidden), model(x))
    assert model.get_classifier() is model.head


def test_flattened_tokens_go_side_by_side_into_the_classifier() -> None:
    model = make_model()
    tokens = torch.randn(3, 16, 34)
    assert torch.equal(model.pool(tokens), tokens.reshape(3, 16 * 34))
    assert model.head_hidden_size == model.head.in_features == model.fc_norm.normalized_shape[0] == 16 * 34


@LAYOUTS
@pytest.mark.parametrize(
    ('pools', 'final'),
    [
        ([None], None),
        (['flatten'], 'flatten'),
        (['avg'], 'avg'),
        (['avg', None], 'avg'),
        (['avg', 'flatten'], 'flatten'),
        (['flatten', 'avg', 'flatten', None], 'flatten'),
        (['max', 'avg'], 'avg'),
    ],
    ids=str,
)
def test_the_classifier_can_be_reset_along(layout: str, pools: list[str | None], final: str | None) -> None:
    model = make_model(layout)
    final = final or dict(paper='flatten', vit='token')[layout]
    width = (16 + model.num_prefix_tokens) * 34 if final == 'flatten' else 34
    for pool in pools:
        model.reset_classifier(5, pool)
    assert (model.global_pool, model.num_classes) == (final, 5)
    assert model.head_hidden_size == model.head.in_features == width
    assert train_step(model).shape == (3, 5)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    # and the features of a model without classifier are what its classifier would read
    hidden = model.eval().forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model.global_pool == final
    assert torch.equal(model(images()), hidden)
    assert model.num_features == width
    model.reset_classifier(CLASSES)
    assert model(images()).shape == (3, CLASSES)


@pytest.mark.parametrize('num_classes', [0, 5])
def test_a_flattened_model_of_so_many_classes_tells_the_width_it_hands_on(num_classes: int) -> None:
    model = make_model(num_classes=num_classes).eval()
    made_so = (model.num_features, model.head_hidden_size, model(images()).shape[1])
    assert made_so == ((34, 16 * 34, 5) if num_classes else (16 * 34,) * 3)
    other = make_model().eval()
    other.reset_classifier(num_classes)
    assert (other.num_features, other.head_hidden_size, other(images()).shape[1]) == made_so


@pytest.mark.skipif(not find_spec('timm.models._input'), reason='this timm saves no arguments of a model by itself')
@pytest.mark.parametrize('pools', [['avg'], ['flatten'], ['avg', 'flatten'], ['flatten', 'avg']], ids=str)
@pytest.mark.parametrize(
    ('layout', 'made_with'), [('paper', 'flatten'), ('paper', 'avg'), ('vit', 'token'), ('vit', 'avg')]
)
def test_a_model_saved_after_a_reset_is_rebuilt_alike(
    layout: str, made_with: str, pools: list[str], tmp_path: Path
) -> None:
    model = make_model(layout, global_pool=made_with)
    for pool in pools:
        model.reset_classifier(5, pool)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    rebuilt = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert_same_state(rebuilt, model)
    assert torch.equal(rebuilt.eval()(images()), model.eval()(images()))


def test_a_paper_model_with_tokens_of_a_vit_starts_finite() -> None:
    model = make_model(pos_embed='learn', class_token=True, reg_tokens=2)
    assert all(p.isfinite().all() for p in model.parameters())
    assert 0 < model.pos_embed.std() < 0.1


def test_a_model_of_dynamic_size_cannot_be_reset_to_flatten() -> None:
    model = make_model('vit', dynamic_img_size=True)
    with pytest.raises(ValueError, match="'flatten' needs a fixed number of tokens, got dynamic_img_size=True"):
        model.reset_classifier(5, 'flatten')
    assert model(images(side=40)).shape == (3, CLASSES)


def test_a_flattened_model_without_classifier_takes_another_size_and_stays_frozen() -> None:
    model = make_model().requires_grad_(False).eval()
    model.reset_classifier(0)
    side = 2 * model.patch_embed.img_size[0]
    model.set_input_size((side, side))
    assert model(images(side=side)).shape == (3, model.num_features)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_leaving_flatten_without_pooling_returns_the_tokens() -> None:
    model = make_model().eval()
    model.reset_classifier(0, '')
    assert torch.equal(model(images()), model.forward_features(images()))


@pytest.mark.parametrize('global_pool', ['flatten', 'avg', None])
def test_a_reset_classifier_keeps_dtype_and_device(global_pool: str | None) -> None:
    model = make_model().to(torch.bfloat16)
    model.reset_classifier(5, global_pool)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16


@LAYOUTS
def test_an_image_size_at_creation_sizes_classifier_and_positions(layout: str) -> None:
    model = make_model(layout, img_size=(24, 40))
    assert model(torch.randn(2, 3, 24, 40)).shape == (2, CLASSES)
    assert model.head.in_features == (15 * 34 if layout == 'paper' else 34)
    assert model.pos_embed is None or model.pos_embed.shape == (1, 16, 34)


def test_set_input_size_refuses_what_the_flattened_classifier_cannot_read() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    message = (
        r'reads 16 flattened tokens, img_size=40 with patch_size=\(8, 8\) gives 25; create the model with img_size=40, '
        r"or leave 'flatten' first: reset_classifier\(num_classes, global_pool='avg'\)"
    )
    with pytest.raises(ValueError, match=message):
        model.set_input_size(40)
    with pytest.raises(ValueError, match=r'divisible by patch_size, got \(33, 33\)'):
        model.set_input_size(33)
    with pytest.raises(ValueError, match=r'normalises patches of \(8, 8\), got patch_size=\(4, 4\); create the model'):
        model.set_input_size((16, 16), patch_size=(4, 4))
    assert_same_state(model, before)
    assert model(images()).shape == (3, CLASSES)


def test_set_input_size_takes_what_fits() -> None:
    flat = make_model()
    flat.set_input_size((16, 64))  # another shape, as many tokens
    assert flat(torch.randn(2, 3, 16, 64)).shape == (2, CLASSES)
    flat.reset_classifier(CLASSES, 'avg')
    flat.set_input_size(40)
    assert flat(images(side=40)).shape == (3, CLASSES)

    vit = make_model('vit')
    vit.set_input_size((40, 40))
    assert vit.pos_embed.shape == (1, 26, 34)
    assert vit(images(side=40)).shape == (3, CLASSES)
    vit.set_input_size((40, 40), patch_size=(10, 10))
    assert vit(images(side=40)).shape == (3, CLASSES)


def test_a_vit_layout_of_dynamic_size_takes_any_image() -> None:
    model = make_model('vit', dynamic_img_size=True)
    for side in (24, 32, 40):
        assert model(images(side=side)).shape == (3, CLASSES)


@LAYOUTS
@pytest.mark.parametrize('channels', [1, 4])
def test_weights_for_three_channels_serve_others(layout: str, channels: int, tmp_path: Path) -> None:
    """What reads a sum of the channels reads one channel alike."""
    model = make_model(layout, in_chans=3).eval()
    torch.save(model.state_dict(), tmp_path / 'rgb.pth')
    overlay = dict(file=str(tmp_path / 'rgb.pth'), num_classes=CLASSES)
    other = make_model(layout, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert other.patch_embed.proj.weight.shape[1] == channels
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert name.startswith('patch_embed.') or torch.equal(x, y), name
    grey = images(channels=1)
    if channels == 1:
        torch.testing.assert_close(other(grey), model(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert other(grey.expand(-1, channels, -1, -1)).isfinite().all()


# Compilers


@LAYOUTS
def test_fx_traces_the_same_function(layout: str) -> None:
    model, x = make_model(layout).eval(), images()
    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    training, evaluation = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=[training[-1]], eval_return_nodes=[evaluation[-1]], tracer_kwargs=tracer
    )
    (logits,) = traced.eval()(x).values()
    torch.testing.assert_close(logits, model(x))
    (logits,) = traced.train()(x).values()
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.parametrize(('layout', 'grad'), [('paper', False), ('vit', True)])
def test_compiled_as_one_graph_evaluation_gives_the_same_logits(layout: str, grad: bool) -> None:
    torch._dynamo.reset()
    model, x = make_model(layout).eval(), images()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(images(7)), model(images(7)))


# The package


def test_every_name_taken_from_timm_is_public_and_there() -> None:
    """A private import would break with a release of timm without notice."""
    found = 0
    for path in Path(timm_ait.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom) or (node.module or '').split('.')[0] != 'timm':
                continue
            parts = node.module.split('.')
            assert len(parts) <= 2 or node.module == 'timm.models.vision_transformer', f'{path.name}: {node.module}'
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert not any(part.startswith('_') for part in [*parts, alias.name]), f'{path.name}: {alias.name}'
                assert hasattr(module, alias.name), f'{path.name}: {node.module} has no {alias.name}'
                found += 1
    assert found > 5


def test_importing_registers_the_models_and_does_nothing_else() -> None:
    script = """
        import random, torch, timm
        def state():
            return (torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
                    torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
                    torch.get_rng_state().sum().item(), random.getstate(), torch.cuda.is_initialized())
        before, models = state(), set(timm.list_models())
        import timm_ait
        assert state() == before
        assert {'ait_small', 'test_ait'} <= set(timm.list_models()) - models
    """
    script = '\n'.join(line.removeprefix(' ' * 8) for line in script.splitlines())
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
