"""Exported models: every format gives the logits of the model, and none of them writes the memory."""

import copy
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from models import memories
from packaging.version import Version
from photographs import write_noise
from torch import Tensor, nn

from timm_ait import GlobalWorkspace

SIDE, CLASSES, TRACED = 24, 13, 2  # TRACED images are exported, other numbers of images are then run
LAYOUTS = pytest.mark.parametrize('layout', ['ait_small_patch4_32', 'ait_small'])
BATCH = torch.export.Dim('batch', min=1, max=64)
REFUSED = 'an exported model cannot write its memory, but in its present mode this one does; call model.eval'
# Warnings of the exporters about themselves.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning'),
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
    pytest.mark.filterwarnings('ignore:.*Constant folding.*:UserWarning'),
    pytest.mark.filterwarnings('ignore:.*legacy.*:UserWarning'),
    pytest.mark.filterwarnings('ignore:Exporting a model while it is in training mode:UserWarning'),
]


def make_model(layout: str = 'ait_small_patch4_32', **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = dict(img_size=SIDE, patch_size=8, embed_dim=34, depth=2, num_heads=2, num_classes=CLASSES)
    return timm.create_model(layout, **dict(sizes, num_slots=7, slot_dim=5, write_heads=3, bottleneck=11, **kwargs))


def images(count: int = TRACED) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))


def assert_agrees(run: Callable[[Tensor], Tensor], model: nn.Module, counts: Iterable[int] = (1, TRACED, 5)) -> None:
    with torch.no_grad():
        for count in counts:
            torch.testing.assert_close(run(images(count)), model(images(count)), rtol=0, atol=1e-4)


def onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    session = pytest.importorskip('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def to_onnx(model: nn.Module, path: Path, dynamo: bool, **kwargs: Any) -> None:
    """Export with a batch of any size, through torch.export or, without ``dynamo``, by tracing."""
    if dynamo:
        kwargs['dynamic_shapes'] = ({0: BATCH},)
    else:
        kwargs.update(input_names=['images'], output_names=['logits'], dynamic_axes={'images': {0: 'batch'}})
    torch.onnx.export(model, (images(),), path, dynamo=dynamo, verbose=False, **kwargs)


def operations(program: torch.export.ExportedProgram) -> set[str]:
    """The names of all operations of a program, those in its inner graphs too."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == 'call_function'}


def assert_reads_only(names: Iterable[str]) -> None:
    for name in names:
        assert not any(word in name.lower() for word in ('topk', 'copy_', 'snapshot', 'scatter', 'lerp')), name


# ONNX


@LAYOUTS
@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'legacy'])
def test_onnx_gives_the_logits_for_any_batch_and_has_no_write(layout: str, dynamo: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip('onnx')
    model = make_model(layout).eval()
    before = memories(model)
    to_onnx(model, tmp_path / 'model.onnx', dynamo)
    assert_agrees(onnx_runner(tmp_path / 'model.onnx'), model)
    assert_reads_only(node.op_type for node in onnx.load(tmp_path / 'model.onnx').graph.node)
    assert all(map(torch.equal, memories(model), before))


def test_legacy_onnx_of_a_training_model_is_its_evaluation(tmp_path: Path) -> None:
    pytest.importorskip('onnx')
    model = make_model(proj_drop_rate=0.5).train()
    before = memories(model)
    to_onnx(model, tmp_path / 'model.onnx', dynamo=False)
    assert model.training
    assert all(map(torch.equal, memories(model), before))
    assert_agrees(onnx_runner(tmp_path / 'model.onnx'), model.eval())


# torch.export


@LAYOUTS
def test_a_program_for_one_batch_size_gives_the_logits(layout: str) -> None:
    model = make_model(layout).eval()
    program = torch.export.export(model, (images(),)).module()
    assert_agrees(program, model, [TRACED])
    with pytest.raises((AssertionError, RuntimeError), match=r'size|shape'):
        program(images(5))


@pytest.mark.parametrize(
    ('layout', 'strict'), [('ait_small_patch4_32', True), ('ait_small_patch4_32', False), ('ait_small', False)]
)
def test_a_saved_program_gives_the_logits_for_any_batch_and_has_no_write(
    layout: str, strict: bool, tmp_path: Path
) -> None:
    model = make_model(layout).eval()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: BATCH},), strict=strict)
    torch.export.save(program, tmp_path / 'model.pt2')
    loaded = torch.export.load(tmp_path / 'model.pt2')
    assert_agrees(loaded.module(), model)
    assert_reads_only(operations(loaded))
    assert not loaded.run_decompositions().graph_signature.buffers_to_mutate


@pytest.mark.skipif(not shutil.which('g++'), reason='AOTInductor needs a C++ compiler; NOT TESTED HERE')
def test_a_package_of_aotinductor_gives_the_logits_for_any_batch(tmp_path: Path) -> None:
    model = make_model(depth=1).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: BATCH},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
        assert_agrees(torch._inductor.aoti_load_package(path), model)


# TorchScript


@LAYOUTS
@pytest.mark.parametrize('training', [True, False])
def test_torchscript_has_the_logits_of_evaluation_and_leaves_the_model_alone(
    layout: str, training: bool, tmp_path: Path
) -> None:
    """A model is often scripted before eval() is called: validate.py of timm does so."""
    model = make_model(layout).train(training)
    before, names = memories(model), set(model.state_dict())
    torch.jit.script(model).save(tmp_path / 'model.pt')
    loaded = torch.jit.load(tmp_path / 'model.pt').eval()
    assert_agrees(loaded, model.eval())
    assert all(map(torch.equal, memories(model), before))
    assert set(model.state_dict()) == names
    assert_reads_only(node.kind() for node in loaded.inlined_graph.nodes())
    with pytest.raises(torch.jit.Error, match='a scripted model only evaluates, its memory is fixed; call eval'):
        loaded.train()(images())


@LAYOUTS
def test_a_trace_has_the_logits_and_no_write(layout: str) -> None:
    model = make_model(layout).eval()
    traced = torch.jit.trace(model, images())
    assert_agrees(traced, model)
    assert_reads_only(node.kind() for node in traced.inlined_graph.nodes())


# Models that write


def export_onnx(model: nn.Module, dynamo: bool, folder: Path) -> None:
    kwargs = {} if dynamo else dict(training=torch.onnx.TrainingMode.PRESERVE)
    to_onnx(model, folder / 'model.onnx', dynamo, **kwargs)


EXPORTERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    'export': lambda model, folder: torch.export.export(model, (images(),)),
    'strict': lambda model, folder: torch.export.export(model, (images(),), strict=True),
    'trace': lambda model, folder: torch.jit.trace(model, images()),
    'onnx': lambda model, folder: export_onnx(model, True, folder),
    'onnx-legacy': lambda model, folder: export_onnx(model, False, folder),
}


@pytest.mark.parametrize(('mode', 'training'), [('train', True), ('always', False)])
@pytest.mark.parametrize('exporter', EXPORTERS)
def test_a_model_that_writes_is_refused_with_the_remedy(
    exporter: str, mode: str, training: bool, tmp_path: Path
) -> None:
    if exporter.startswith('onnx'):
        pytest.importorskip('onnxscript')
    model = make_model(write_mode=mode).train(training)
    before = memories(model)
    with pytest.raises(Exception, match=REFUSED):  # some exporters wrap the ValueError into an error of theirs
        EXPORTERS[exporter](model, tmp_path)
    assert all(map(torch.equal, memories(model), before))


def test_a_scripted_layer_reads_unit_rows_of_a_memory_that_was_never_written() -> None:
    layer = GlobalWorkspace(8, num_slots=4, slot_dim=5).eval()
    assert layer.memory.norm(dim=-1).max() > 2  # random rows
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize('scope', ['batch', 'image'])
def test_a_model_that_writes_in_evaluation_is_not_scripted(scope: str) -> None:
    with pytest.raises(ValueError, match="got write_mode='always'; take 'train'"):
        torch.jit.script(make_model(write_mode='always', write_scope=scope).eval())


def test_a_training_model_that_never_writes_can_be_exported() -> None:
    model = make_model(write_mode='never').train()
    assert_agrees(torch.export.export(model, (images(),)).module(), model, [TRACED])


@pytest.mark.parametrize('rule', ['distinct', 'additive', 'competing'])
@pytest.mark.parametrize('exporter', ['export', 'script', 'onnx', 'legacy'])
def test_images_that_write_copies_of_the_memory_are_exported_with_their_copies(
    exporter: str, rule: str, tmp_path: Path
) -> None:
    model = make_model(depth=1, write_scope='image', write_rule=rule).eval()
    before = memories(model)
    if exporter == 'export':
        assert_agrees(torch.export.export(model, (images(),), dynamic_shapes=({0: BATCH},)).module(), model)
    elif exporter == 'script':
        assert_agrees(torch.jit.script(model), model)
    else:
        pytest.importorskip('onnx')
        to_onnx(model, tmp_path / 'model.onnx', dynamo=exporter == 'onnx')
        counts = (TRACED,) if exporter == 'legacy' else (1, 5)  # the first fixes the number of images
        assert_agrees(onnx_runner(tmp_path / 'model.onnx'), model, counts)
    assert all(map(torch.equal, memories(model), before))


# Eight bits


def assert_rounded_alone(quantised: nn.Module, model: nn.Module, tolerance: float) -> None:
    """Eight bits round: the logits change, but by little of their spread."""
    x = 0.25 * torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits, rounded = model(x), quantised(x)
    assert 0 < (rounded - logits).abs().max() < tolerance * logits.std()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
def test_torchao_quantises_every_linear_layer_and_changes_the_logits_little(config: str) -> None:
    torchao = pytest.importorskip('torchao.quantization', reason='torchao is not installed; NOT TESTED HERE')
    model = timm.create_model('test_ait', pretrained=True).eval()
    quantised = copy.deepcopy(model)
    torchao.quantize_(quantised, getattr(torchao, config)())
    assert_rounded_alone(quantised, model, tolerance=0.1)
    linear = [m for m in quantised.modules() if isinstance(m, nn.Linear)]
    assert len(linear) > 20
    narrowest = 17 if Version(version('torchao')) < Version('0.17') else 1  # older ones leave narrow layers as they are
    assert all(type(m.weight) is not nn.Parameter for m in linear if m.in_features >= narrowest)


@pytest.mark.filterwarnings('ignore')
def test_dynamic_quantisation_of_torch_changes_the_logits_little() -> None:
    model = timm.create_model('test_ait', pretrained=True).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert_rounded_alone(quantised, model, tolerance=0.2)
    assert not any(type(m) is nn.Linear for m in quantised.blocks[0].mlp.modules())


# The table


def test_the_script_behind_the_table_measures_every_form_at_toy_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import export

    write_noise(tmp_path / 'images', range(10), 1)
    slow = {'AOTInductor', 'ONNX', 'torch.export'}  # each has a test above
    export.main(
        [
            *('--data', str(tmp_path / 'images'), '--images', '4', '--batch-size', '2', '--rounds', '1'),
            *('--turns', '1', '--out', str(tmp_path / 'out.json'), '--formats', *(set(export.FORMATS) - slow)),
        ]
    )
    assert logging.getLogger().isEnabledFor(logging.WARNING)  # it silences the exporters alone
    rows = {row['name']: row for row in json.loads((tmp_path / 'out.json').read_text())['rows']}
    assert set(rows) == set(export.FORMATS) - slow
    assert all(row['megabytes'] > 0.1 and row['images_per_second'] > 0 for row in rows.values())
    assert rows['eager']['difference'] == 0
    assert rows['TorchScript']['difference'] < 1e-4 < rows['int8 dynamic, torch']['difference']
    assert {row['accuracy'] for row in rows.values()} <= {0, 25, 50, 75, 100}
    assert capsys.readouterr().out.count('\n') == 2 + len(rows)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('--model no_such', 'timm has no model no_such'),
        ('--data {}', r'expected 10 folders of classes in .*, got 1; give the folder of a split, such as DIR/test'),
        ('--data {}/test --images 2 --batch-size 3', '--batch-size 3 needs as many images, got 2; raise --images'),
    ],
)
def test_the_script_says_what_it_cannot_measure(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import export

    write_noise(tmp_path / 'test', range(10), 1)
    with pytest.raises(SystemExit):
        export.main([*words.format(tmp_path).split(), '--formats', 'eager'])
    assert re.search(message, capsys.readouterr().err)


def test_a_model_is_exported_for_any_batch_also_when_one_image_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    import export

    export.main('--batch-size 1 --rounds 1 --turns 1 --formats torch.export'.split())
    assert '| torch.export |' in capsys.readouterr().out


def test_speeds_are_images_a_second_of_every_round_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import export

    now = [0.0]
    monkeypatch.setattr(export.time, 'perf_counter', lambda: now[0])

    def form(*seconds: float) -> Callable[[Tensor], Tensor]:
        turns = iter([s for s in seconds for _ in range(2)])

        def run(x: Tensor) -> Tensor:
            now[0] += next(turns)
            return x

        return run

    found = export.speeds([form(9.0, 1.0, 2.0), form(9.0, 4.0, 5.0)], torch.zeros(20, 1), rounds=2, turns=2)
    assert found == [[20.0, 10.0], [5.0, 4.0]]


def test_a_row_of_the_table_is_beside_the_model_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import export

    asked: list[Any] = []
    create = timm.create_model
    monkeypatch.setattr(export.timm, 'create_model', lambda *a, **k: asked.append((a, k)) or create(*a, **k))
    monkeypatch.setattr(torch, 'set_num_threads', threads := Mock())

    def form(model: nn.Module, images: Tensor, path: Path) -> Any:
        path.write_bytes(bytes(2_500_000))
        far = torch.zeros(5, 10)
        far[2, 1] = 0.25
        return lambda x: model(x) + far[: len(x)], path

    def speeds(runs: list[Any], images: Tensor, rounds: int, turns: int) -> list[list[float]]:
        assert (len(runs), len(images), rounds, turns) == (2, 3, 7, 4)
        return [[10.0, 20.0, 50.0], [40.0, 10.0, 100.0]]  # four times, half and twice as fast

    monkeypatch.setitem(export.FORMATS, 'TorchScript', form)
    monkeypatch.setattr(export, 'speeds', speeds)
    five = torch.randn(5, 3, 32, 32), torch.zeros(5, dtype=torch.long)
    monkeypatch.setattr(export, 'read_images', lambda model, folder, count: tuple(x[:count] for x in five))
    words = '--model ait_tiny_conv4_32 --no-pretrained --batch-size 3 --rounds 7 --turns 4 --threads 5'
    data = ['--data', 'images', '--images', '5', '--formats', 'TorchScript']
    export.main([*words.split(), *data, '--out', str(tmp_path / 'out.json')])
    assert asked == [(('ait_tiny_conv4_32',), dict(pretrained=False))]
    threads.assert_called_once_with(5)
    (row,) = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert row.pop('difference') == pytest.approx(0.25, abs=1e-4)
    assert row.pop('accuracy') in range(0, 101, 20)
    assert row == dict(name='TorchScript', megabytes=2.5, images_per_second=40.0, relative=2.0)
    shown = export.table([export.Row('form', 2.5, 0.25, 40.0, 2.0, 75.5)]).splitlines()
    cells = zip(*([cell.strip() for cell in line.split('|')[1:-1]] for line in (shown[0], shown[2])), strict=True)
    assert dict(cells) == {
        'format': 'form', 'file, MB': '2.50', 'largest difference of logits': '2.5e-01', 'images/s': '40',
        'beside eager': '2.00', 'accuracy, %': '75.50',
    }  # fmt: skip


def test_each_form_is_made_as_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import export

    fused, _ = export.FORMATS['reparameterize_model'](make_model().eval(), images(), tmp_path / 'fused')
    assert not any(isinstance(module, GlobalWorkspace) for module in fused.modules())
    monkeypatch.setattr(export, '_torchao', lambda model, path, config: config)
    monkeypatch.setattr(export, '_onnx', lambda model, images, path, dynamo: dynamo)
    names = ('ONNX', 'ONNX, legacy', 'int8 weights, torchao', 'int8 dynamic, torchao')
    made = [export.FORMATS[name](nn.Identity(), images(), tmp_path) for name in names]
    assert made == [True, False, 'Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig']
