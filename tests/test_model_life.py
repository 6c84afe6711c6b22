"""Copies, saved and loaded models, and what timm asks of a model: features, heads and image sizes."""

import copy
import math
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from models import CLASSES, LAYOUTS, SMALL, assert_same_state, images, make_model, train_step
from timm.models import save_for_hf
from torch import Tensor, nn

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


def test_a_number_of_classes_that_is_none_changes_nothing() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="num_classes must be an integer, got '3'"):
        model.reset_classifier('3')
    assert (model.num_classes, model.global_pool) == (CLASSES, 'flatten')
    assert model(images()).shape[1] == CLASSES


def test_a_paper_model_with_tokens_of_a_vit_starts_finite() -> None:
    model = make_model(pos_embed='learn', class_token=True, reg_tokens=2)
    assert all(p.isfinite().all() for p in model.parameters())
    assert 0 < model.pos_embed.std() < 0.1


def test_a_model_of_dynamic_size_cannot_be_reset_to_flatten() -> None:
    model = make_model('vit', dynamic_img_size=True)
    with pytest.raises(ValueError, match="'flatten' needs a fixed number of tokens, got dynamic_img_size=True"):
        model.reset_classifier(5, 'flatten')
    assert model(images(side=40)).shape == (3, CLASSES)


@pytest.mark.parametrize('pools', [('flatten', 'avg'), ('avg', 'flatten'), ('flatten', 'flatten')])
def test_a_new_head_has_the_mode_of_the_model(pools: tuple[str, str]) -> None:
    for training in (True, False):
        model = make_model(global_pool=pools[0]).train(training)
        model.reset_classifier(4, pools[1])
        assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize(('pool', 'layout'), [('avgg', 'paper'), ('map', 'paper'), ('token', 'paper'), ('map', 'vit')])
def test_a_pooling_that_cannot_be_had_is_refused_and_the_model_stays_as_it_was(pool: str, layout: str) -> None:
    model = make_model(layout).eval()
    before = model(images())
    with pytest.raises(ValueError, match=f'global_pool must be one of .* in this model, got {pool!r}; create'):
        model.reset_classifier(5, pool)
    assert torch.equal(model(images()), before)


def test_a_model_that_drops_patches_cannot_be_reset_to_flatten() -> None:
    model = make_model('vit', patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"'flatten' needs a fixed number of tokens, .* and patch_drop_rate=0\.5"):
        model.reset_classifier(5, 'flatten')
    assert train_step(model).shape == (3, CLASSES)


def test_behind_a_stem_of_convolutions_flattened_tokens_are_counted_after_the_stem() -> None:
    model = timm.create_model('ait_tiny_conv4_32', global_pool='flatten', depth=1).eval()
    model.set_input_size((32, 32))
    with pytest.raises(ValueError, match=r'a grid of \(8, 8\) flattened tokens, .* gives \(10, 10\)'):
        model.set_input_size((40, 40))
    assert model(images()).shape == (3, 10)


@pytest.mark.parametrize('attention', [True, False])
def test_timms_scaling_of_the_first_weights_takes_what_a_block_has(attention: bool) -> None:
    plain, fixed = (make_model('vit', fix_init=fix_init, attention=attention) for fix_init in (False, True))
    for depth in (1, 2):
        blocks = plain.blocks[depth - 1], fixed.blocks[depth - 1]
        for part in ('mlp.fc2', 'attn.proj') if attention else ('mlp.fc2',):
            first, scaled = (block.get_submodule(part).weight.std() for block in blocks)
            torch.testing.assert_close(scaled * (2 * depth) ** 0.5, first, rtol=0.2, atol=0)


@pytest.mark.parametrize('fc_norm', [None, False])
def test_a_flattened_model_has_a_norm_unless_it_is_told_not_to(fc_norm: bool | None) -> None:
    model = make_model(fc_norm=fc_norm)
    expected = nn.LayerNorm if fc_norm is None else nn.Identity
    assert type(model.fc_norm) is expected
    model.reset_classifier(0)
    model.set_input_size((48, 48))
    assert type(model.fc_norm) is expected


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


def test_a_model_without_classifier_that_leaves_flatten_returns_one_token() -> None:
    model = make_model()
    model.reset_classifier(0)
    model.reset_classifier(0, 'avg')
    assert model(images()).shape[1:] == (model.num_features,) == (model.embed_dim,)


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
        r'a grid of \(4, 4\) flattened tokens, img_size=40 with patch_size=\(8, 8\) gives \(5, 5\); create the '
        r"model with img_size=40, or leave 'flatten' first: reset_classifier\(num_classes, global_pool='avg'\)"
    )
    with pytest.raises(ValueError, match=message):
        model.set_input_size(40)
    with pytest.raises(ValueError, match=r'gives \(2, 8\); create'):  # as many tokens, in other places
        model.set_input_size((16, 64))
    with pytest.raises(ValueError, match=r'divisible by patch_size, got \(33, 33\)'):
        model.set_input_size(33)
    with pytest.raises(ValueError, match=r'normalises patches of \(8, 8\), got patch_size=\(4, 4\); create the model'):
        model.set_input_size((16, 16), patch_size=(4, 4))
    assert_same_state(model, before)
    assert model(images()).shape == (3, CLASSES)


def test_set_input_size_takes_what_fits() -> None:
    flat = make_model()
    flat.set_input_size((32, 32))
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
