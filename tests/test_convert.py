"""Checkpoints of the authors' AiT and of timm's ViT are converted key by key, or refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from authors_names import as_authors
from safetensors.torch import save_file
from timm.layers import convert_splitbn_model
from timm.models.vision_transformer import VisionTransformer
from timm.utils import reparameterize_model
from torch import Tensor

from timm_ait import AssociativeTransformer, checkpoint_filter_fn, convert
from timm_ait.convert import convert_authors, is_authors

CLASSES, SIDE, PATCH = 10, 21, 7
M, D, S, E, H = 5, 3, 4, 22, 31  # slots, width of a slot, write heads, width, hidden width
SIZES: dict[str, Any] = dict(
    img_size=SIDE, patch_size=PATCH, embed_dim=E, depth=2, num_heads=2, mlp_ratio=H / E, num_classes=CLASSES
)  # fmt: skip
WORKSPACE: dict[str, Any] = dict(num_slots=M, slot_dim=D, write_heads=S, bottleneck=13)

StateDict = dict[str, Tensor]


def make_model(name: str = 'ait_small_patch4_32', seed: int = 1, **kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(seed)
    return timm.create_model(name, **dict(SIZES, **dict(WORKSPACE, **kwargs))).eval()


def make_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(2)
    return VisionTransformer(**dict(SIZES, **kwargs)).eval()


def images(side: int = SIDE) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def assert_equal(a: StateDict, b: StateDict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# The authors' checkpoints


def test_a_checkpoint_of_the_authors_is_converted_bit_for_bit() -> None:
    model = make_model()
    theirs = as_authors(model)
    before = {key: value.clone() for key, value in theirs.items()}
    assert is_authors(theirs)
    assert not is_authors(model.state_dict())
    assert not is_authors(make_vit().state_dict())
    assert_equal(checkpoint_filter_fn(theirs, make_model(seed=3)), model.state_dict())
    assert_equal(theirs, before)  # the argument is not changed


def test_the_interleaved_heads_of_the_authors_are_put_side_by_side() -> None:
    key = 'transformer.layers.0.1.fn.memoryupdate.mha.fc.weight'
    # their columns, D = 2 and S = 3: (d0 s0) (d0 s1) (d0 s2) (d1 s0) (d1 s1) (d1 s2)
    theirs = torch.tensor([[0.0, 1.0, 2.0, 10.0, 11.0, 12.0]]).expand(2, -1)
    converted = convert_authors({key: theirs}, (PATCH, PATCH))['blocks.0.mlp.proj.weight']
    assert converted.tolist() == [[0.0, 10.0, 1.0, 11.0, 2.0, 12.0]] * 2


def test_the_pixels_of_a_patch_of_the_authors_are_put_channels_first() -> None:
    # a patch of 1 x 2 pixels of three channels: r0 g0 b0 r1 g1 b1
    theirs = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
    keys = {'to_patch_embedding.1.weight': theirs, 'to_patch_embedding.2.weight': theirs.expand(5, -1)}
    converted = convert_authors(keys, (1, 2))
    assert converted['patch_embed.patch_norm.weight'].tolist() == [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]
    assert converted['patch_embed.proj.weight'][4].tolist() == [[[0.0, 10.0]], [[1.0, 11.0]], [[2.0, 12.0]]]


def wrap_pth(state_dict: StateDict, path: Path) -> None:
    torch.save({'state_dict': {f'module.{key}': value for key, value in state_dict.items()}, 'epoch': 3}, path)


@pytest.mark.parametrize(
    ('file', 'write'),
    [('a.safetensors', save_file), ('a.pth', torch.save), ('data_parallel.pth', wrap_pth)],
    ids=lambda x: x if isinstance(x, str) else '',
)
def test_create_model_loads_a_file_of_the_authors(
    file: str, write: Callable[[StateDict, Path], None], tmp_path: Path
) -> None:
    model = make_model()
    write(as_authors(model), tmp_path / file)
    loaded = make_model(seed=3, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / file)))
    assert_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(images()), model(images()))


def test_with_another_number_of_classes_only_the_head_of_a_file_of_the_authors_is_new(tmp_path: Path) -> None:
    model = make_model()
    save_file(as_authors(model), tmp_path / 'authors.safetensors')
    overlay = dict(file=str(tmp_path / 'authors.safetensors'))
    loaded = make_model(seed=3, num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay)
    assert loaded(images()).shape == (3, 7)
    own = model.state_dict()
    for key, value in loaded.state_dict().items():
        assert key.startswith('head.') or torch.equal(value, own[key]), key


def test_the_names_of_a_file_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(convert, 'convert_authors', lambda *args: calls.append(1) or convert_authors(*args))
    save_file(as_authors(make_model()), tmp_path / 'authors.safetensors')
    make_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'authors.safetensors')))
    assert len(calls) == 1


@pytest.mark.parametrize('channels', [1, 4])
def test_a_file_of_the_authors_is_loaded_for_other_channels(channels: int, tmp_path: Path) -> None:
    model = make_model()
    torch.nn.init.uniform_(model.patch_embed.patch_norm.weight)
    save_file(as_authors(model), tmp_path / 'authors.safetensors')
    overlay = dict(file=str(tmp_path / 'authors.safetensors'))
    loaded = make_model(seed=3, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay)
    per_channel = model.patch_embed.patch_norm.weight.view(3, PATCH * PATCH).mean(0)
    norm = loaded.patch_embed.patch_norm.weight.view(channels, -1)
    torch.testing.assert_close(norm, per_channel.expand_as(norm))
    assert loaded(torch.randn(2, channels, SIDE, SIDE)).isfinite().all()


@pytest.mark.parametrize(
    'key',
    [
        'transformer.layers.0.1.fn.memoryupdate.mha.w_zs.weight',
        'transformer.layers.1.2.norm.weight',
        'to_patch_embedding.9.weight',
        'cls_token2',
        'mlp_head.2.weight',
    ],
)
def test_a_key_that_the_authors_model_does_not_have_is_named(key: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=f"the authors' model has no parameter '{key}'; is this a checkpoint of their"):
        checkpoint_filter_fn({**as_authors(model), key: torch.zeros(1)}, model)


def test_a_question_embedding_is_renamed_and_refused_by_a_model_that_has_none() -> None:
    question = {f'question_to_embedding.{i}.weight': torch.full((1,), float(i)) for i in range(3)}
    converted = convert_authors(question, (PATCH, PATCH))
    assert {key: value.item() for key, value in converted.items()} == {
        f'question_embed.{i}.weight': i for i in range(3)
    }
    model = make_model()
    with pytest.raises(ValueError, match=r'unknown keys question_embed\.0\.weight, question_embed\.1\.weight'):
        checkpoint_filter_fn({**as_authors(model), **question}, model)


def test_a_checkpoint_of_the_authors_with_another_depth_is_refused() -> None:
    theirs = as_authors(make_model())
    with pytest.raises(ValueError, match=r'unknown keys blocks\.1\..* and \d+ more, missing keys none; create the'):
        checkpoint_filter_fn(theirs, make_model(depth=1))
    with pytest.raises(ValueError, match=r'unknown keys none, missing keys blocks\.2\..* and \d+ more; create the'):
        checkpoint_filter_fn(theirs, make_model(depth=3))


@pytest.mark.parametrize('depth', [2, 5])
def test_whoever_asks_for_a_part_of_the_weights_gets_it(depth: int) -> None:
    whole = timm.create_model('test_ait', pretrained=True).state_dict()
    part = timm.create_model('test_ait', pretrained=True, depth=depth, pretrained_strict=False).state_dict()
    assert all(torch.equal(part[key], whole[key]) for key in part.keys() & whole.keys())
    assert len(part.keys() & whole.keys()) == min(len(part), len(whole))
    with pytest.raises(ValueError, match='create the model with the depth of the checkpoint'):
        timm.create_model('test_ait', pretrained=True, depth=depth)
    with pytest.raises(ValueError, match=r'head\.weight has the shape|num_slots'):  # shapes still must fit
        timm.create_model('test_ait', pretrained=True, num_slots=3, pretrained_strict=False)


# timm's ViT


@pytest.mark.parametrize('name', ['ait_small', 'ait_base'])
def test_a_vit_gives_all_its_parameters_and_the_workspace_keeps_those_of_the_model(name: str) -> None:
    vit, model = make_vit(), make_model(name, depth=2)
    filtered = checkpoint_filter_fn(vit.state_dict(), model)
    assert filtered.keys() == model.state_dict().keys()
    own, given = model.state_dict(), vit.state_dict()
    for key, value in filtered.items():
        assert torch.equal(value, given.get(key, own[key])), key
    assert {key.split('.')[3] for key in filtered.keys() - given.keys()} == {
        'norm', 'query', 'key', 'value', 'proj', 'write_norm', 'memory', 'linear_transform',
    }  # fmt: skip


def test_a_vit_file_loaded_beside_a_retrieval_of_scale_zero_is_that_vit(tmp_path: Path) -> None:
    vit = make_vit()
    save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    overlay = dict(file=str(tmp_path / 'vit.safetensors'), num_classes=CLASSES)
    model = make_model('ait_small', retrieval_scale=0.0, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model(images()), vit(images()))
    other = make_model('ait_small', pretrained=True, pretrained_cfg_overlay=overlay)
    assert not torch.allclose(other(images()), vit(images()), atol=1e-2)


def test_the_hidden_norm_of_a_vit_is_that_of_the_workspace(tmp_path: Path) -> None:
    vit = make_vit(scale_mlp_norm=True, mlp_ratio=1)  # so that it has the shape of the workspace's output norm too
    for block in vit.blocks:
        block.mlp.norm.weight.data.uniform_(1, 2)
    model = make_model('ait_small', scale_mlp_norm=True, mlp_ratio=1, retrieval_scale=0.0)
    model.load_state_dict(checkpoint_filter_fn(vit.state_dict(), model))
    torch.testing.assert_close(model(images()), vit(images()))


def as_dinov2(state_dict: StateDict) -> StateDict:
    positions = torch.cat([torch.zeros(1, 1, E), state_dict['pos_embed']], dim=1)
    renamed = {key.replace('reg_token', 'register_tokens'): value for key, value in state_dict.items()}
    return {**renamed, 'pos_embed': positions, 'mask_token': torch.zeros(1, E)}


@pytest.mark.parametrize(
    ('write', 'kwargs'),
    [
        (as_dinov2, dict(reg_tokens=4, no_embed_class=True)),
        (lambda weights: {f'visual.trunk.{key}': value for key, value in weights.items()}, {}),
        (lambda weights: {**weights, 'pre_logits.fc.weight': torch.zeros(E, E)}, {}),
    ],
    ids=['DINOv2', 'OpenCLIP', 'pre_logits'],
)
def test_what_timm_renames_for_its_vit_is_renamed(
    write: Callable[[StateDict], StateDict], kwargs: dict[str, Any]
) -> None:
    vit, model = make_vit(**kwargs), make_model('ait_small', retrieval_scale=0.0, **kwargs)
    model.load_state_dict(checkpoint_filter_fn(write(vit.state_dict()), model))
    torch.testing.assert_close(model(images()), vit(images()))


@pytest.mark.parametrize('weights', [{}, {'encoder.layer.0.weight': torch.zeros(1)}], ids=['empty', 'other'])
def test_a_file_of_another_model_is_told_so(weights: StateDict) -> None:
    with pytest.raises(ValueError, match=r'give the checkpoint of an AiT or of a ViT$'):
        checkpoint_filter_fn(weights, make_model('ait_small'))


@pytest.mark.parametrize(
    ('write', 'remedy'),
    [
        (
            lambda weights: {f'net.{key}': value for key, value in weights.items()},
            "take 'net.' off the names of its par",
        ),
        (
            lambda weights: {
                f'{name}.{key}': value for name in ('student', 'teacher') for key, value in weights.items()
            },
            "take 'student.' or 'teacher.' off the names of its parameters, and leave out all others$",
        ),
        (
            lambda weights: {key.replace('linear_transform', 'lift'): value for key, value in weights.items()},
            'it is of version 0.1: rename lift to linear_transform in the names of its parameters$',
        ),
        (lambda weights: {'module': weights}, r'save the state_dict\(\) of the model alone$'),
        (lambda weights: {'model_state_dict': weights, 'epoch': 3}, r'save the state_dict\(\) of the model alone$'),
    ],
    ids=['prefix', 'two prefixes', '0.1', 'module', 'model_state_dict'],
)
def test_a_wrapped_or_renamed_checkpoint_is_told_what_to_change(
    write: Callable[[StateDict], Any], remedy: str, tmp_path: Path
) -> None:
    torch.save(write(make_model('ait_small').state_dict()), tmp_path / 'wrapped.pth')
    with pytest.raises(ValueError, match=remedy):
        make_model('ait_small', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'wrapped.pth')))


def test_an_averaged_model_of_torch_is_loaded() -> None:
    model = make_model('ait_small')
    average = torch.optim.swa_utils.AveragedModel(model)
    loaded = checkpoint_filter_fn(average.state_dict(), model)
    assert loaded.keys() == model.state_dict().keys()


@pytest.mark.parametrize('no_embed_class', [True, False])
def test_the_positions_of_a_vit_are_resampled_to_another_image_size(no_embed_class: bool) -> None:
    """A position embedding that is the same everywhere stays so. That of the class token is not resampled."""
    vit = make_vit(no_embed_class=no_embed_class)
    given = vit.state_dict()
    given['pos_embed'][:, -9:] = torch.arange(float(E))
    model = make_model('ait_small', img_size=35, no_embed_class=no_embed_class)
    resampled = checkpoint_filter_fn(given, model)['pos_embed']
    assert resampled.shape == model.pos_embed.shape
    torch.testing.assert_close(resampled[:, -25:], torch.arange(float(E)).expand(1, 25, E))
    assert torch.equal(resampled[:, :-25], given['pos_embed'][:, :-9])


def test_a_square_grid_of_positions_is_resampled_to_an_oblong_one() -> None:
    vit, model = make_vit(), make_model('ait_small', img_size=(14, 35))
    resampled = checkpoint_filter_fn(vit.state_dict(), model)['pos_embed']
    assert resampled.shape == (1, 11, E)
    model.load_state_dict(checkpoint_filter_fn(vit.state_dict(), model))
    assert model(torch.randn(2, 3, 14, 35)).shape == (2, CLASSES)


@pytest.mark.parametrize('global_pool', ['', 'flatten'])
def test_a_pooled_checkpoint_serves_a_model_that_returns_its_tokens(global_pool: str) -> None:
    pooled = timm.create_model('ait_tiny_conv4_32', pretrained=True).eval()
    tokens = timm.create_model('ait_tiny_conv4_32', pretrained=True, num_classes=0, global_pool=global_pool).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = pooled.fc_norm(pooled.forward_features(x))
    torch.testing.assert_close(tokens.forward_features(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('was', ['token', 'avg', 'map'])
@pytest.mark.parametrize(
    'kwargs',
    [dict(global_pool='avg'), dict(global_pool='map'), dict(global_pool='flatten'), dict(fc_norm=True)],
    ids=str,
)
def test_with_a_new_classifier_a_vit_takes_another_pooling(was: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    vit = make_vit(global_pool=was)
    norm = vit.fc_norm if was == 'avg' else vit.norm
    norm.weight.data.uniform_(1, 2)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    overlay = dict(file=str(tmp_path / 'vit.pth'), num_classes=CLASSES)
    model = make_model('ait_small', num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    weights = model.state_dict()
    assert torch.equal(weights['norm.weight' if 'norm.weight' in weights else 'fc_norm.weight'], norm.weight)
    if was == kwargs.get('global_pool') == 'map':
        assert torch.equal(model.attn_pool.latent, vit.attn_pool.latent)


@pytest.mark.parametrize('global_pool', ['avg', 'map'])
@pytest.mark.parametrize('classes', [CLASSES, 0])
def test_without_a_new_classifier_another_pooling_is_refused(global_pool: str, classes: int, tmp_path: Path) -> None:
    torch.save(make_vit(num_classes=classes).state_dict(), tmp_path / 'vit.pth')
    overlay = dict(file=str(tmp_path / 'vit.pth'), num_classes=classes)
    with pytest.raises(ValueError, match=r'the checkpoint does not fit the model: .*\(.*global_pool'):
        make_model(
            'ait_small', num_classes=classes, global_pool=global_pool, pretrained=True, pretrained_cfg_overlay=overlay
        )


def test_an_oblong_grid_of_positions_is_refused_with_what_to_do() -> None:
    oblong, square = make_model('ait_small', img_size=(14, 35)), make_model('ait_small')
    with pytest.raises(
        ValueError, match=r'10 positions. Only a square grid can be resampled to \(3, 3\); .* then call set_input_size'
    ):
        checkpoint_filter_fn(oblong.state_dict(), square)
    plain, prefixed = make_model('ait_small', class_token=False, global_pool='avg'), make_model('ait_small')
    with pytest.raises(
        ValueError, match=r'9 positions, of patches alone, but the model has 1 more tokens; .* class_token'
    ):
        checkpoint_filter_fn(plain.state_dict(), prefixed)
    oblong.set_input_size((SIDE, SIDE))
    assert_equal(checkpoint_filter_fn(oblong.state_dict(), square), oblong.state_dict())


@pytest.mark.parametrize('size', [(14, 56), (56, 14)])
def test_positions_keep_their_places_in_a_grid_of_as_many_patches(size: tuple[int, int]) -> None:
    saved, model = make_model('ait_small', img_size=(28, 28)), make_model('ait_small', img_size=size)
    model.pretrained_cfg['input_size'] = (3, 28, 28)
    state_dict = saved.state_dict()
    state_dict['pos_embed'][:, 1:] = torch.arange(16).view(1, 16, 1)  # 0, 4, 8, 12 begin the rows
    rows, columns = model.patch_embed.grid_size
    places = checkpoint_filter_fn(state_dict, model)['pos_embed'][0, 1:, 0].view(rows, columns)
    assert places.diff(dim=1).mean() * columns == pytest.approx(4, rel=0.2)  # from left to right
    assert places.diff(dim=0).mean() * rows == pytest.approx(16, rel=0.2)  # and down


def test_a_classifier_over_all_tokens_is_refused_for_a_grid_of_as_many_tokens() -> None:
    with pytest.raises(ValueError, match=r'reads a grid of \(8, 8\) flattened tokens, and the model has \(4, 16\)'):
        timm.create_model('test_ait', pretrained=True, img_size=(16, 64))
    model = timm.create_model('test_ait', pretrained=True)
    with pytest.raises(ValueError, match=r'reads a grid of \(8, 8\) flattened tokens, .* gives \(4, 16\)'):
        model.set_input_size((16, 64))
    assert timm.create_model('test_ait', pretrained=True, img_size=(16, 64), num_classes=3).num_classes == 3


@pytest.mark.parametrize('classes', [0, 3])
def test_the_norm_over_flattened_tokens_starts_anew_for_a_grid_of_as_many_tokens(classes: int) -> None:
    other = timm.create_model('test_ait', pretrained=True, img_size=(16, 64), num_classes=classes)
    same = timm.create_model('test_ait', pretrained=True, num_classes=classes)
    is_new = [torch.equal(model.fc_norm.weight, torch.ones(64 * 128)) for model in (other, same)]
    assert is_new == [True, False]


def test_features_need_no_classifier_in_the_file(tmp_path: Path) -> None:
    saved = make_model(num_classes=0)
    save_file(saved.state_dict(), tmp_path / 'headless.safetensors')
    from_file: dict[str, Any] = dict(
        pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'headless.safetensors'))
    )
    features = make_model(features_only=True, **from_file)
    assert torch.equal(features.model.blocks[1].mlp.memory, saved.blocks[1].mlp.memory)
    with pytest.raises(ValueError, match='the checkpoint has no classifier'):
        make_model(**from_file)


def test_a_checkpoint_of_parameters_alone_is_refused() -> None:
    model = make_model()
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    with pytest.raises(ValueError, match=r'missing keys blocks.0.mlp.memory, .*the memory is a buffer'):
        checkpoint_filter_fn(parameters, model)


def test_a_file_of_the_authors_with_other_patches_is_told_so() -> None:
    with pytest.raises(ValueError, match=r'patches of \d+ numbers, no multiple of \(11, 11\) pixels; create the model'):
        convert_authors(as_authors(make_model()), (11, 11))


@pytest.mark.parametrize('key', ['blocks.0.ls1.gamma', 'dist_token', 'blocks.0.mlp.fc3.weight', 'norm_pre.weight'])
def test_a_vit_key_that_the_model_does_not_have_is_named(key: str) -> None:
    state_dict = {**make_vit().state_dict(), key: torch.zeros(E)}
    with pytest.raises(ValueError, match=f'unknown keys {key}, missing keys none; create the model with the arguments'):
        checkpoint_filter_fn(state_dict, make_model('ait_small'))


def test_a_checkpoint_with_split_norms_is_told_how_to_lose_them() -> None:
    split = convert_splitbn_model(timm.create_model('ait_tiny_conv4_32'))
    with pytest.raises(ValueError, match=r"aux_bn.* with --split-bn: run timm's clean_checkpoint\.py --clean-aux-bn"):
        checkpoint_filter_fn(split.state_dict(), timm.create_model('ait_tiny_conv4_32'))


def test_depth_is_no_remedy_where_it_is_not_the_cause() -> None:
    with pytest.raises(ValueError, match=r'unknown keys blocks\.0\.attn\.k_norm.* the arguments of the checkpoint$'):
        checkpoint_filter_fn(make_model('ait_small', qk_norm=True).state_dict(), make_model('ait_small'))


@pytest.mark.parametrize('key', ['cls_token', 'blocks.1.mlp.fc2.weight', 'pos_embed', 'norm.bias'])
def test_a_vit_key_that_is_missing_is_named(key: str) -> None:
    state_dict = make_vit().state_dict()
    del state_dict[key]
    with pytest.raises(ValueError, match=f'unknown keys none, missing keys {key}; create the model with the arguments'):
        checkpoint_filter_fn(state_dict, make_model('ait_small'))


@pytest.mark.parametrize(
    ('kwargs', 'remedy'),
    [
        (dict(write_rule='distinct'), r'the arguments of the checkpoint \(write_rule, retrieval_scale\)'),
        (dict(attention=False), r'the arguments of the checkpoint \(attention\)'),
        (dict(qkv_bias=True), r'the arguments of the checkpoint \(qkv_bias\)'),
        (dict(pos_embed='learn'), r'the arguments of the checkpoint \(pos_embed\)'),
        (dict(global_pool='map', num_classes=0), r'the arguments of the checkpoint \(.*global_pool'),
        (dict(depth=3), 'the depth of the checkpoint'),
        (dict(mlp_ratio=4.0), 'the arguments of the checkpoint .*mlp_ratio'),
        (dict(global_pool='avg'), r'the pooling of the checkpoint, then change it with reset_classifier'),
    ],
    ids=str,
)
def test_a_model_of_other_arguments_than_its_weights_is_told_which(kwargs: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=f'create the model with {remedy}'):
        timm.create_model('test_ait', pretrained=True, **kwargs)


def test_the_weights_of_a_reparameterised_model_are_told_from_others() -> None:
    weights = reparameterize_model(make_model('test_ait')).state_dict()
    with pytest.raises(ValueError, match='has lost its memory; save it before reparameterize_model'):
        checkpoint_filter_fn(weights, make_model('test_ait'))


def test_a_vit_without_a_head_is_converted() -> None:
    model = make_model('ait_small')
    state_dict = make_vit(num_classes=0).state_dict()
    assert checkpoint_filter_fn(state_dict, model).keys() == model.state_dict().keys() - {'head.weight', 'head.bias'}


# This package


@pytest.mark.parametrize('name', ['ait_small', 'ait_small_patch4_32'])
@pytest.mark.parametrize('wrapper', ['state_dict', 'model', None])
@pytest.mark.parametrize('prefix', ['module.', ''])
def test_a_checkpoint_of_this_package_is_not_changed(name: str, wrapper: str | None, prefix: str) -> None:
    model = make_model(name)
    state_dict: Any = {f'{prefix}{key}': value for key, value in model.state_dict().items()}
    state_dict = {wrapper: state_dict} if wrapper else state_dict
    assert_equal(checkpoint_filter_fn(state_dict, make_model(name, seed=3)), model.state_dict())


def test_a_checkpoint_of_this_package_without_a_part_of_the_workspace_is_refused() -> None:
    model = make_model()
    state_dict = model.state_dict()
    del state_dict['blocks.1.mlp.key.weight']
    with pytest.raises(ValueError, match=r'missing keys blocks\.1\.mlp\.key\.weight;'):
        checkpoint_filter_fn(state_dict, model)


@pytest.mark.parametrize(
    ('kwargs', 'key'),
    [
        (dict(num_slots=M + 1), r'blocks\.0\.mlp\.memory'),
        (dict(write_heads=S + 1), r'blocks\.0\.mlp\.query\.weight'),
        (dict(img_size=28), r'fc_norm\.weight'),
    ],
    ids=str,
)
def test_a_shape_that_differs_is_named_with_key_and_both_shapes(kwargs: dict[str, Any], key: str) -> None:
    with pytest.raises(
        ValueError, match=rf'{key} has the shape \(.*\) in the checkpoint and \(.*\) in the model; create'
    ):
        checkpoint_filter_fn(make_model().state_dict(), make_model(**kwargs))


def test_a_checkpoint_with_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    theirs = as_authors(make_model())
    theirs['transformer.layers.1.1.fn.memoryupdate.memory'][2, 1] = math.nan
    save_file(theirs, tmp_path / 'authors.safetensors')
    with pytest.raises(ValueError, match=r'authors\.safetensors: NaN or infinite values in blocks\.1\.mlp\.memory;'):
        make_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'authors.safetensors')))
