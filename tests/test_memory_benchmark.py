"""The experiment on the memory, at toy size: what its variants are, that it goes on after a stop, and its table."""

import json
import math
import re
from pathlib import Path

import controls
import memory
import pytest
import runs
import timm
import torch
import torch.nn.functional as F
import variants
from matplotlib.figure import Figure
from models import memories
from photographs import write_noise
from runs import count_parameters
from timm.data import resolve_model_data_config
from torchvision.transforms.functional import to_pil_image

from timm_ait import GlobalWorkspace


@pytest.mark.parametrize('variant', memory.VARIANTS)
def test_a_variant_differs_from_no_memory_in_what_it_adds_alone(variant: str) -> None:
    torch.manual_seed(0)
    model = memory.create(variant, attention=False, width=32, depth=2)
    control = memory.create('none', attention=False, width=32, depth=2)
    shapes, wanted = ({name: p.shape for name, p in m.named_parameters()} for m in (model, control))
    assert all(name.endswith(('mlp.scale', 'reg_token')) for name in shapes.keys() - wanted.keys())
    others = {'registers': 'pos_embed', 'wider_mlp': r'blocks\.\d\.mlp\.fc\d\.\w+'}.get(variant, '')
    differ = {name for name in wanted if shapes[name] != wanted[name]}
    assert all(re.fullmatch(others, name) for name in differ)
    x = torch.randn(3, 3, 32, 32)
    before = memories(model)
    model.train()(x)
    is_moved = [not torch.equal(*pair) for pair in zip(memories(model), before, strict=True)]
    stays = ('none', 'wider_mlp', 'registers', 'frozen', 'additive', 'competing')
    assert is_moved == [not variant.startswith(stays)] * 2


def test_without_attention_and_memory_no_token_sees_another_and_a_memory_of_the_image_changes_that() -> None:
    x = torch.randn(1, 3, 32, 32)
    changed = x.clone()
    changed[..., :4, :4] += 1  # the first patch
    seen = {}
    for variant in ('none', 'image', 'additive'):
        torch.manual_seed(0)
        model = memory.create(variant, attention=False, width=32, depth=2).eval()
        with torch.no_grad():
            difference = (model.forward_features(x) - model.forward_features(changed)).abs().amax(dim=-1)[0]
        seen[variant] = int((difference > 1e-6).sum())
    assert seen == {'none': 1, 'image': 64, 'additive': 64}


def test_no_memory_is_the_layer_norm_of_the_feed_forward_part() -> None:
    layer = variants.NoMemory(5, 7, num_slots=2, slot_dim=3, write_heads=1, write_mode='never')
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), layer.norm(layer.fc2(F.gelu(layer.fc1(x)))))


@pytest.mark.parametrize('name', ['ait_tiny_conv4_32', 'ait_small_patch4_32'])
def test_the_control_for_train_py_is_the_model_without_memory(name: str) -> None:
    model = timm.create_model(name)
    control = getattr(controls, f'{name}_no_memory')()
    control.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    control.train()(x).sum().backward()
    idle = [name for name, p in control.named_parameters() if (p.grad is None) is p.requires_grad]
    assert not idle  # DistributedDataParallel waits for those that are trained and get no gradient
    with torch.no_grad():
        before = control.eval()(x)
        assert not torch.allclose(model.eval()(x), before)
        for block in control.blocks:
            block.mlp.memory.normal_()
        assert torch.equal(control(x), before)


def test_the_vit_beside_the_packaged_model_has_its_size_and_sees_its_images() -> None:
    vit, model = (timm.create_model(name).eval() for name in ('vit_tiny_conv4_32', 'ait_tiny_conv4_32'))
    assert not any(isinstance(layer, GlobalWorkspace) for layer in vit.modules())
    counts = [sum(p.numel() for p in each.parameters()) for each in (vit, model)]
    assert abs(counts[0] / counts[1] - 1) < 0.02
    tokens, wanted = (each.forward_features(torch.randn(2, 3, 32, 32)) for each in (vit, model))
    assert tokens.shape == wanted.shape
    assert resolve_model_data_config(vit) == resolve_model_data_config(model)
    theirs, ours = (
        {key: x.shape for key, x in each.state_dict().items() if '.mlp.' not in key} for each in (vit, model)
    )
    assert theirs == ours
    assert vit.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads


def test_a_whole_copy_keeps_what_all_slots_read_alike_and_the_memory_that_starts_it_stays_orthogonal() -> None:
    torch.manual_seed(0)
    classes = (variants.WholeCopy, GlobalWorkspace)
    layers = [cls(8, num_slots=4, slot_dim=6, write_heads=2, **variants.IMAGE) for cls in classes]
    layers[1].load_state_dict(layers[0].state_dict())
    alike = torch.randn(3, 2, 1, 6).expand(-1, -1, 4, -1)  # what the slots of three images read
    whole, distinct = (layer.update(layer.memory, alike) for layer in layers)
    assert (whole[0] - whole[1]).norm() > 0.1
    torch.testing.assert_close(distinct[0], distinct[1])
    layers[0].train()(torch.randn(3, 5, 8))
    torch.testing.assert_close(layers[0].memory @ layers[0].memory.t(), torch.eye(4), atol=0.05, rtol=0)


def workspace_of(variant: str) -> GlobalWorkspace:
    layer = memory.create(variant, attention=False, width=32, depth=1).blocks[0].mlp
    assert isinstance(layer, GlobalWorkspace)
    return layer


def test_the_variants_of_the_memory_are_what_their_names_say() -> None:
    found = {}
    for name in memory.VARIANTS:
        layer = workspace_of(name)
        gain = None if layer.scale is None else round(layer.scale.mean().item(), 3)
        own = isinstance(layer, variants.WholeCopy)
        is_trained = layer.value.weight.requires_grad  # the task trains the write
        found[name] = (layer.write_rule, layer.write_scope, layer.memory_decay, gain, is_trained, own)
    wide = round(math.sqrt(32), 3)
    never, image = ('distinct', 'batch', 0.9), ('distinct', 'image', 0.5)
    for name in ('none', 'wider_mlp', 'registers'):
        assert isinstance(workspace_of(name), variants.NoMemory)
        del found[name]
    assert found == {
        'frozen': (*never, 1, False, False),
        'frozen_wide': (*never, wide, False, False),
        'published': ('published', 'batch', 0.9, None, True, False),
        'published_detached': ('published', 'batch', 0.9, None, False, False),
        'distinct': ('distinct', 'batch', 0.9, 1, True, False),
        'distinct_wide': ('distinct', 'batch', 0.9, wide, True, False),
        'image': (*image, 1, True, False),
        'image_whole': (*image, 1, True, True),
        'image_wide': (*image, wide, True, False),
        'additive': ('additive', 'image', 0.9, 1, True, False),
        'competing': ('competing', 'image', 0.9, 1, True, False),
        'image_wide_detached': (*image, wide, False, False),
    }
    assert memory.create('registers', False, 32, 1).reg_token.shape[1] == 32
    assert {(workspace_of(name).num_slots, workspace_of(name).bottleneck) for name in memory.VARIANTS} == {(32, 512)}


def test_a_whole_copy_is_the_mean_of_old_and_new_slots_by_the_decay() -> None:
    torch.manual_seed(0)
    layer = variants.WholeCopy(8, num_slots=4, slot_dim=6, write_heads=2, **variants.IMAGE)
    heads = torch.randn(3, 2, 4, 6)
    update = layer.write_norm(layer.proj(torch.cat([heads[:, 0], heads[:, 1]], dim=-1)) + layer.memory)
    expected = 0.5 * layer.memory + 0.5 * update / update.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(layer.update(layer.memory, heads), expected / expected.norm(dim=-1, keepdim=True))


def test_the_wider_mlp_has_as_many_trained_parameters_as_the_memory_that_pays() -> None:
    for attention, depth in ((False, 2), (False, 4), (True, 2)):
        wide, additive = (memory.create(name, attention, 128, depth) for name in ('wider_mlp', 'additive'))
        assert count_parameters(wide) == pytest.approx(count_parameters(additive), rel=1e-3)


def test_half_an_interval_is_students() -> None:
    assert runs.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)


def test_each_row_of_a_picture_stands_beside_its_name_and_the_first_is_on_top() -> None:
    axes = Figure().subplots()
    runs.draw_rows(axes, {'first': [1.0, 3.0], 'second': [7.0]})
    names = {label.get_text(): y for label, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    assert names == {'first': 0, 'second': 1}
    points = [line for line in axes.lines if line.get_color() == 'tab:gray']
    assert [(line.get_ydata()[0], list(line.get_xdata())) for line in points] == [(0, [1, 3]), (1, [7])]
    assert axes.get_ylim() == (1.5, -0.5)


def test_it_runs_goes_on_and_shows_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ('train', 'test'):
        write_noise(tmp_path / split, range(10), 3)
    out = tmp_path / 'results'
    args = [
        str(tmp_path),
        '--out',
        str(out),
        '--variants',
        'none',
        'registers',
        'image',
        '--width',
        '16',
        '--depth',
        '1',
    ]
    args += ['--images', '3', '--test-images', '2', '--epochs', '1', '--batch-size', '10', '--threads', '1']
    memory.main([*args, '--seeds', '1'])
    first = {path.name: path.stat().st_mtime_ns for path in out.glob('*.json')}
    assert len(first) == 3
    memory.main([*args, '--seeds', '1', '2'])
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first  # what has a result is not run again
    record = json.loads(next(out.glob('image-*-1.json')).read_text())
    assert {'commit', 'torch', 'timm', 'cpu', 'seed', 'top1', 'log', 'memory', 'seconds', 'commits'} <= record.keys()
    capsys.readouterr()
    memory.main(['--show', str(out)])
    shown = capsys.readouterr().out
    assert re.search(r'\| width 16, depth 1, without self-attention \| image \| 0\.\d\d \| 2 \|', shown)
    assert (out / 'memory.png').is_file()
    with pytest.raises(SystemExit):
        memory.main([])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        memory.main([*args, '--seeds', '1', '--lr', '0.1'])
    assert 'is of a run with lr=0.001, this run with lr=0.1; use the same settings' in capsys.readouterr().err
    image = next((tmp_path / 'train').glob('*/*.png'))
    to_pil_image(torch.rand(3, 32, 32)).save(image)
    with pytest.raises(SystemExit):
        memory.main([*args, '--seeds', '3'])
    assert 'of a run with data=' in capsys.readouterr().err
    (out / 'none-alone-w16-d1-1.json').write_text(json.dumps(record | dict(arguments=record['arguments'] | dict(lr=7))))
    with pytest.raises(ValueError, match='of a run with lr=7'):
        memory.gather(out)
    with pytest.raises(ValueError, match='expected results in'):
        memory.gather(tmp_path)


@pytest.mark.parametrize('results', ['memory', 'memory-again', 'memory-competing'])
def test_the_published_table_is_that_of_the_results(results: str) -> None:
    folder = Path(memory.__file__).parent
    assert memory.table(memory.gather(folder / 'results' / results)) in (folder / 'MEMORY.md').read_text()
