"""The models: sizes, arguments, evaluation and training."""

import copy
import re
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import CONV, LAYOUTS, PAPER, SIDE, VIT, assert_same_state, images, make_model, memories, train_step
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timm_ait import AssociativeBlock, AssociativeTransformer, GlobalWorkspace, NormalizedPatchEmbed

# Sizes and names


def test_timm_lists_the_models_of_this_module() -> None:
    assert {*PAPER, *VIT, CONV} <= set(timm.list_models(module='ait'))
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


def test_a_stem_of_convolutions_takes_other_channels_sizes_and_dtypes() -> None:
    model = timm.create_model(CONV, in_chans=1, img_size=(32, 48), num_classes=5, dtype=torch.float64)
    assert model.patch_embed.grid_size == (8, 12)
    assert model.feature_info[0]['reduction'] == 4
    assert model(images(2, side=32, channels=1).repeat(1, 1, 1, 2)[..., :48].double()).shape == (2, 5)
    model.set_input_size((64, 64))
    assert model(images(2, side=64, channels=1).double()).shape == (2, 5)
    with pytest.raises(ValueError, match=r'expected images of shape \(B, 1, H, W\)'):
        model(images(2).double())


def test_each_model_has_a_stem_of_its_own() -> None:
    one, two = (timm.create_model(CONV) for _ in range(2))
    assert one.patch_embed.backbone is not two.patch_embed.backbone


@torch.no_grad()
def test_a_memory_for_each_image_gives_it_the_same_logits_alone() -> None:
    model = timm.create_model(CONV).eval()
    x = images(7)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-5, atol=1e-6)


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
@pytest.mark.parametrize('name', [*PAPER, *VIT, CONV])
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
        ('paper', dict(memory_decay=2), r'memory_decay must be a number in \[0, 1\], got 2; the paper uses 0.9'),
        ('paper', dict(write_mode='sometimes'), r"must be one of \('train', 'always', 'never'\), got 'sometimes'"),
        (
            'vit',
            dict(img_size=30),
            r'by patch_size, got \(30, 30\) and patches of \(8, 8\) pixels; the nearest sizes below are \(24, 24\)',
        ),
        ('paper', dict(img_size='48'), r"img_size must be an integer .* or a pair \(height, width\), got '48'"),
        ('vit', dict(img_size=(48,)), r'img_size must be an integer .* or a pair \(height, width\), got \(48,\)'),
        ('paper', dict(img_size=(32, 31)), r'got \(32, 31\) and .*; the nearest sizes below are \(32, 24\)'),
        ('paper', dict(dynamic_img_size=True), r"'flatten' needs a fixed .* got dynamic_img_size=True .* take .*'avg'"),
        ('paper', dict(patch_drop_rate=0.25), r"'flatten' needs a fixed .* and patch_drop_rate=0.25; .* take .*'avg'"),
        ('paper', dict(global_pool='bogus'), r"one of \['', 'avg', .*'flatten', 'map', 'prr'\] .*, got 'bogus'"),
        ('paper', dict(global_pool='token'), r"'max', 'flatten', 'map', 'prr'\] in this model, got 'token'"),
        ('vit', dict(mlp_layer=Mlp), 'mlp_layer is fixed here; take attention=, or set workspace_layer in a subclass'),
        ('vit', dict(block_fn=Block), 'block_fn is fixed here'),
        ('paper', dict(dynamic_img_size=True, global_pool='avg'), 'takes images of one size: leave dynamic_img_size'),
    ],
    ids=str,
)
def test_a_wrong_argument_says_what_was_expected_and_what_came(
    layout: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(layout, **kwargs)


@pytest.mark.parametrize('kwargs', [dict(output_fmt='NHWC'), dict(strict_img_size=False), dict(dynamic_img_pad=True)])
def test_the_papers_stem_refuses_what_it_cannot_do(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='takes images of one size'):
        NormalizedPatchEmbed(32, 8, **kwargs)


@pytest.mark.parametrize('layout', ['paper', 'vit'])
def test_narrow_weights_take_wide_images_under_autocast(layout: str) -> None:
    model = make_model(layout).to(torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        model(images()).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_size_that_the_convolutional_stem_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r'got \(33, 33\) and .*; the nearest sizes below are \(32, 32\)'):
        timm.create_model('ait_tiny_conv4_32', img_size=33)


@pytest.mark.parametrize('kwargs', [{}, dict(patch_size=2), dict(patch_size=2, dynamic_img_pad=True)], ids=str)
@pytest.mark.parametrize('size', [(32, 32), (33, 33), (41, 24), (35, 30)])
def test_the_convolutional_stem_tells_the_grid_of_any_image(size: tuple[int, int], kwargs: dict[str, Any]) -> None:
    model = timm.create_model('ait_tiny_conv4_32', dynamic_img_size=True, depth=1, **kwargs).eval()
    x, h, w = torch.randn(1, 3, *size), *model.patch_embed.dynamic_feat_size(size)
    with torch.no_grad():
        assert model.forward_features(x).shape == (1, h * w, 192)
        assert model.forward_intermediates(x, intermediates_only=True)[0].shape == (1, 192, h, w)


def test_the_convolutional_stem_has_channels_and_size_of_the_config() -> None:
    model = timm.create_model('ait_tiny_conv4_32', pretrained_cfg_overlay=dict(input_size=(1, 64, 48)))
    assert model.patch_embed.grid_size == (16, 12)
    assert model(torch.randn(2, 1, 64, 48)).shape == (2, 10)


@LAYOUTS
@pytest.mark.parametrize('shape', [(2, 1, SIDE, SIDE), (2, 4, SIDE, SIDE), (3, SIDE, SIDE)], ids=str)
def test_images_of_other_channels_are_refused_with_the_remedy(layout: str, shape: tuple[int, ...]) -> None:
    message = rf'expected images of shape \(B, 3, H, W\), got {re.escape(str(shape))}; .* in_chans='
    with pytest.raises(ValueError, match=message):
        make_model(layout)(torch.randn(shape))
    with pytest.raises(ValueError, match=message):
        make_model(layout).forward_intermediates(torch.randn(shape))


@pytest.mark.parametrize('name', ['test_ait', 'ait_small', CONV])
def test_every_stem_refuses_images_of_another_size(name: str) -> None:
    model = timm.create_model(name, img_size=SIDE, depth=1)
    with pytest.raises(ValueError, match=r'expected images of \(32, 32\), got \(32, 48\); resize them or create'):
        model(torch.randn(1, 3, SIDE, 48))


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


CAUSAL: dict[str, dict[str, Any]] = dict(
    flag=dict(is_causal=True), mask=dict(attn_mask=torch.ones(16, 16).tril().bool())
)
MASKS = pytest.mark.parametrize('mask', CAUSAL.values(), ids=CAUSAL)


@torch.no_grad()
@MASKS
def test_behind_a_causal_mask_a_token_sees_none_of_the_later_ones(mask: dict[str, Any]) -> None:
    model, x = make_model().eval(), images()
    other = x.clone()
    other[:, :, 24:, 24:] = 0  # the last patch
    first, second = (model.forward_features(y, **mask) for y in (x, other))
    torch.testing.assert_close(second[:, :-1], first[:, :-1])
    assert not torch.allclose(second[:, -1], first[:, -1], atol=1e-2)
    assert not torch.allclose(model.forward_features(other)[:, 0], model.forward_features(x)[:, 0], atol=1e-4)
    assert torch.equal(model(x, **mask), model.forward_head(first))


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
    [
        {},
        dict(write_grad=False),
        dict(write_mode='never'),
        dict(init_values=0.1),
        dict(proj_drop_rate=0.2, drop_path_rate=0.2),
    ],
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


@pytest.mark.parametrize('kwargs', [{}, dict(write_scope='image')], ids=str)
@pytest.mark.parametrize('modes', [(False, True), (True, False), (False, True, False)], ids=str)
def test_checkpointing_repeats_a_block_in_the_mode_and_with_the_memory_of_its_forward(
    kwargs: dict[str, Any], modes: tuple[bool, ...]
) -> None:
    grads = []
    for enable in (False, True):
        model = make_model(proj_drop_rate=0.2, **kwargs)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        losses = [F.cross_entropy(model.train(mode)(images(seed=i)), torch.arange(3)) for i, mode in enumerate(modes)]
        sum(losses).backward()
        assert {module.training for module in model.modules()} == {modes[-1]}
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


def test_checkpointing_calls_a_layer_whose_forward_is_its_own() -> None:
    class Doubled(GlobalWorkspace):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Model(AssociativeTransformer):
        workspace_layer = Doubled

    for training in (True, False):
        torch.manual_seed(0)
        model = Model(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2).train(training)
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing()
        torch.testing.assert_close(twin(images(side=16)), model(images(side=16)))


def test_checkpointing_recomputes_the_blocks_and_can_be_turned_off() -> None:
    model, calls = make_model(), []
    model.blocks[1].norm2.register_forward_hook(lambda *_: calls.append(1))
    for enable, count in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        train_step(model)
        assert len(calls) == count


@MASKS
@pytest.mark.parametrize('write_mode', ['train', 'never'])
@pytest.mark.parametrize('is_outside', [False, True])
def test_checkpointed_blocks_keep_the_mask(mask: dict[str, Any], write_mode: str, is_outside: bool) -> None:
    models = [make_model(write_mode=write_mode) for _ in range(2)]
    models[1].set_grad_checkpointing()
    for model in models:
        x = images().requires_grad_()
        call = partial(checkpoint, model, use_reentrant=False) if is_outside and model is models[1] else model
        call(x, **mask).square().sum().backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
@pytest.mark.parametrize('is_partly', [False, True], ids=['memory', 'one block without memory'])
def test_a_scripted_model_takes_a_mask(is_partly: bool) -> None:
    model, x = make_model().eval(), images()
    if is_partly:
        model.blocks[1].mlp = Mlp(34)
    scripted = torch.jit.script(model)
    for mask in CAUSAL.values():
        torch.testing.assert_close(scripted(x, **mask), model(x, **mask), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(scripted(x, **mask), model(x), atol=1e-3)


def test_checkpointing_reaches_a_stem_that_knows_it() -> None:
    model = make_model()
    model.patch_embed.set_grad_checkpointing = (seen := []).append
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    assert seen == [True, False]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
@LAYOUTS
def test_a_cast_model_answers_in_its_dtype_and_keeps_the_memory_wide(layout: str, dtype: torch.dtype) -> None:
    model = make_model(layout).to(dtype)
    logits = model(images().to(dtype))
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert logits.dtype == dtype
    assert {x.dtype for x in memories(model)} == {torch.promote_types(dtype, torch.float32)}
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
