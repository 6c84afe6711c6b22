"""The workspace does no needless work, and the benchmark measures what it says. No test here asserts a time."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import measure
import memory
import pytest
import speed
import timm
import torch
from contenders import LoopedWorkspace, vit_like
from measure import Row, Side, compare_bytes, draw, peak_bytes, table, time_sides
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from variants import ADDITIVE, IMAGE, NoMemory

from timm_ait import AttentionFreeBlock, GlobalWorkspace, NormalizedPatchEmbed

B, N, E, HIDDEN = 7, 11, 17, 19
T = B * N
SIZES = dict(num_slots=13, slot_dim=3, write_heads=5, bottleneck=2)
LOGITS = SIZES['write_heads'] * SIZES['num_slots'] * T  # S*M*T, more than the T*HIDDEN of the feed-forward part


class Recorder(TorchDispatchMode):
    """Record the names of all operations, and the storages of their results, which stay allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.made[x.untyped_storage().data_ptr()] = x
        return result

    def larger_than(self, numbers: int) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors with at least so many numbers."""
        return [tuple(x.shape) for x in self.made.values() if x.untyped_storage().nbytes() >= numbers * x.itemsize]


def record(layer: nn.Module, backward: bool) -> tuple[Recorder, Recorder]:
    """Record a forward pass and, if ``backward``, a backward pass."""
    x = torch.randn(B, N, E, requires_grad=True)
    with Recorder() as forward:
        y = layer(x)
    with Recorder() as gradient:
        if backward:
            torch.autograd.backward([y, layer.balance_loss()], [torch.randn_like(y), None])
    return forward, gradient


@pytest.fixture(scope='module')
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('speed')
    speed.main(['--quick', '--out', str(out)])
    return out


def test_the_benchmark_writes_every_row_of_the_table(measured: Path) -> None:
    record = json.loads((measured / 'speed-cpu-float32.json').read_text())
    names = [row['name'] for row in record['rows']]
    for start in ('inference', 'fused', 'training', 'peak memory', 'throughput', 'cost per token', 'speed in training'):
        assert any(name.startswith(start) for name in names), start
    assert 'speed in training, attention not fused / fused, test_ait, batch 2' in names
    for part in ('memory of each image / memory of the batch', 'memory of an image / self-attention, 16 tokens'):
        for rule in ('distinct', 'additive', 'competing'):
            assert sum(f'{rule} {part}' in name for name in names) == 2, (rule, part)
    for row in record['rows']:
        numbers = [
            *row['ours'],
            *row['theirs'],
            *row['ratios'],
            row['ratio'],
            *row['flops'],
            *row['moved'],
            *row['quartiles'],
        ]
        assert all(math.isfinite(x) and x > 0 for x in numbers), row
        assert len(row['ours']) == len(row['theirs']) == (1 if row['unit'] == 'bytes' else 2)
    assert {'cpu', 'torch', 'timm', 'commit', 'arguments'} <= record.keys()
    assert (measured / 'speed-cpu-float32.png').read_bytes().startswith(b'\x89PNG')


def test_numbers_of_other_arguments_are_not_written_over(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (measured / 'speed-cpu-float32.json').read_bytes()
    with pytest.raises(SystemExit, match='2'):
        speed.main(['--quick', '--rows', 'tokens', '--out', str(measured)])
    assert 'holds what was measured with other arguments; keep it, or give another --out' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        speed.main(['--quick', '--out', str(measured)])
    assert 'holds what was measured with these arguments; remove it, or give another --out' in capsys.readouterr().err
    assert (measured / 'speed-cpu-float32.json').read_bytes() == before


def test_the_variants_of_the_memory_stand_beside_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, 'VARIANTS', {name: memory.VARIANTS[name] for name in ('none', 'additive')})

    def check(name: str, sides: Any, **options: Any) -> Row:
        blocks = [side().model.blocks[0] for side in sides]
        assert [type(block.mlp) for block in blocks] == [GlobalWorkspace, NoMemory]
        assert {isinstance(block, AttentionFreeBlock) for block in blocks} == {'without self-attention' in name}
        return time_sides(name, sides, **options)

    monkeypatch.setattr(speed, 'time_sides', check)
    speed.main(['--quick', '--rows', 'variants', '--out', str(tmp_path)])
    assert list(memory.read_costs(tmp_path / 'speed-cpu-float32.json')) == [
        f'{kind}, additive / none, width 128, depth 2, {mixing} self-attention'
        for mixing in ('without', 'with')
        for kind in ('training', 'inference')
    ]


def describe(side: Side) -> str:
    """Blocks, layer and items of a side; then what a step starts a backward pass from, and what it changes."""
    layers = [block.mlp for block in side.model.blocks] if hasattr(side.model, 'blocks') else [side.model]
    words: list[Any] = [len(layers), type(layers[-1]).__name__, side.items]
    if isinstance(layers[-1], GlobalWorkspace):
        words += [layers[-1].write_rule, layers[-1].write_scope, *['detached'] * (not layers[-1].write_grad)]
    words += ['unfused' for m in side.model.modules() if isinstance(m, Attention) and not m.fused_attn]
    before = {name: x.clone() for name, x in side.model.state_dict().items()}
    with patch('torch.autograd.backward', wraps=torch.autograd.backward) as backward:
        side.step()
    starts = [call.args[0] for call in backward.mock_calls]
    words += [f'backward {1 if isinstance(start, Tensor) else len(start)}' for start in starts]
    moved = {name.split('.')[-1] for name, x in side.model.state_dict().items() if not torch.equal(x, before[name])}
    return ' '.join(map(str, [*words, *sorted(moved & {'memory', 'weight'})]))


def test_both_sides_of_each_row_are_what_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, tuple[Any, ...]] = {}

    def note(name: str, sides: Any, goal: float | None = None, at_least: bool = False, **options: Any) -> Row:
        assert options in (dict(compiled=True), dict(rounds=5, seconds=0.0, threads=3, compiled=True))
        found[name] = (*(describe(side()) for side in sides), goal, at_least)
        return Row(name, 'seconds', goal, at_least, ours=[1.0], theirs=[1.0])

    for name in ('time_sides', 'compare_bytes'):
        monkeypatch.setattr(speed, name, note)
    monkeypatch.setattr(speed, 'keep_freed_memory', keep := Mock())
    monkeypatch.setattr(speed, 'table', table := Mock(return_value=''))
    monkeypatch.setattr(speed, 'use_fused_attn', lambda: 0)
    words = '--quick --image-tokens 8 16 --rules distinct --threads 3 --rounds 5 --compile --peak-tflops 7 --out'
    speed.main([*words.split(), str(tmp_path)])
    step, ait, layer = ' backward 1 memory weight', '1 GlobalWorkspace 2 published batch', '1 GlobalWorkspace'
    costs = [f'{layer} {n} published batch backward 2 memory' for n in (128, 64)]
    vit = ('1 Mlp 2', '1 Mlp 2 backward 1 weight')
    training = {'False': (f'{ait} detached{step}', vit[1]), 'True': (ait + step, vit[1])}
    image = '1 GlobalWorkspace 2 distinct image'
    assert found == {
        'inference, test_ait, batch 2': (ait, vit[0], 1.02, False),
        'fused, test_ait, batch 2': ('1 FusedWorkspace 2', vit[0], 1.02, False),
        'training, write_grad=False, test_ait, batch 2': (*training['False'], 1.07, False),
        'peak memory, write_grad=False, test_ait, batch 2': (*training['False'], 1.10, False),
        'training, write_grad=True, test_ait, batch 2': (*training['True'], 1.10, False),
        'peak memory, write_grad=True, test_ait, batch 2': (*training['True'], 1.10, False),
        'speed in training, attention not fused / fused, test_ait, batch 2': (
            f'{ait} unfused{step}', ait + step, None, True,
        ),
        'throughput in inference, medium toy / ViT-Base, batch 2': (f'2{ait[1:]}', f'4{vit[0][1:]}', 1.9, True),
        'throughput in training, medium toy / ViT-Base, batch 2': (f'2{ait[1:]}{step}', f'4{vit[1][1:]}', 1.9, True),
        'cost per token, 128 / 64 tokens': (*costs, 1.1, False),
        **{
            f"speed in {use}, ours / authors' way, {n} tokens": (
                f'{layer} {n} published batch detached{" backward 2 memory" * (use == "training")}',
                f'1 LoopedWorkspace {n}{" backward 2" * (use == "training")} memory', None, True,
            )
            for n in (64, 128) for use in ('inference', 'training')
        },
        'inference, distinct memory of each image / memory of the batch, test_ait, batch 2': (image, ait, None, False),
        'training, distinct memory of each image / memory of the batch, test_ait, batch 2': (
            image + step, ait + step, None, False,
        ),
        **{
            f'speed in {use}, distinct memory of an image / self-attention, {n} tokens': (
                f'{layer} {n} distinct image{" backward 2 memory" * (use == "training")}',
                f'1 Attention {n}{" backward 1" * (use == "training")}', None, True,
            )
            for n in (8, 16) for use in ('inference', 'training')
        },
    }  # fmt: skip
    keep.assert_called_once()
    assert table.call_args.args[1] == 7.0
    arguments = json.loads((tmp_path / 'speed-cpu-float32-compiled.json').read_text())['arguments']
    assert arguments['fused_attention'] is False


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_sides_compute_in_the_dtype_of_the_command_line_and_inference_without_a_graph(dtype: str) -> None:
    args = speed.complete(speed.make_parser().parse_args(['--quick', '--dtype', dtype]))
    build, seen = partial(speed.create, 'toy', 'small'), []
    alone = speed.workspace(GlobalWorkspace, 64, True, args)
    assert alone.model.fc1.out_features == 1
    for side in (speed.inference(build, 2, args), speed.training(build, 2, args), alone):
        linear = next(module for module in side.model.modules() if isinstance(module, nn.Linear))
        linear.register_forward_hook(lambda module, args, out: seen.append((out.dtype, out.requires_grad)))
        side.step()
    assert seen == [(getattr(torch, dtype), has_graph) for has_graph in (False, True, True)]


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--rounds', '0'], 'argument --rounds: expected a whole number of at least 1, got 0'),
        (['--tokens', '10'], '--tokens must be multiples of 64, got [10]'),
        (['--rows', 'tokens', '--tokens', '64'], 'the first of --tokens, got [64] alone; give two'),
        (['--rows', 'variants'], '--rows variants names no batch size; give one --batch-sizes, got [32, 128]'),
        pytest.param(
            ['--device', 'cuda'],
            'PyTorch cannot compute on --device cuda here; take cpu',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
        ),
    ],
)
def test_a_wrong_argument_ends_in_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match='2'):
        speed.main([*words, '--out', str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_stop_keeps_the_rows_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row('cost', 'seconds', 1.5, False, ours=[2.0], theirs=[1.0], flops=[1.0, 1.0])
    cases = [
        ('cost', lambda name: row),
        ('too large', Mock(side_effect=torch.OutOfMemoryError)),
        ('cut', Mock(side_effect=KeyboardInterrupt)),
    ]
    monkeypatch.setattr(speed, 'model_cases', lambda args: cases)
    with pytest.raises(KeyboardInterrupt):
        speed.main(['--quick', '--rows', 'inference', '--out', str(tmp_path)])
    assert [row['name'] for row in json.loads((tmp_path / 'speed-cpu-float32.json').read_text())['rows']] == ['cost']


def test_without_a_row_that_fits_in_memory_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, 'model_cases', lambda args: [('large', Mock(side_effect=torch.OutOfMemoryError))])
    speed.main(['--quick', '--rows', 'inference', '--out', str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_ratio_of_a_row_is_the_median_of_its_rounds_and_is_compared_with_its_goal() -> None:
    sides = dict(ours=[8.0, 3.0, 4.0], theirs=[16.0, 2.0, 1.0])  # ratios 0.5, 1.5 and 4; medians 4 and 2
    cost = Row('cost', 'seconds', 1.5, False, **sides, flops=[6e6, 3e6], moved=[3.0, 1.0])
    assert (cost.ratio, cost.quartiles, cost.floor, cost.traffic) == (1.5, [1.0, 2.75], 2.0, 3.0)
    assert (cost.per_second, cost.passes(), replace(cost, goal=1.4).passes()) == ([0.25, 0.5], True, False)
    speedup = Row('speed', 'seconds', 1.9, True, ours=[2.0], theirs=[3.0], flops=[1.0, 2.0], moved=[1.0, 4.0])
    assert (speedup.ratio, speedup.floor, speedup.traffic, speedup.passes()) == (1.5, 2.0, 4.0, False)
    memory = Row('memory', 'bytes', None, False, ours=[3e6], theirs=[2e6])
    assert table([cost, speedup, memory], peak_tflops=1e-6).splitlines()[2:] == [
        '| cost | 1.500 | 1.000 - 2.750 | 2.000 | 3.000 | at most 1.5 '
        '| 0 /s, 6.00 MFLOP, 150 % of peak | 0 /s, 3.00 MFLOP, 150 % of peak |',
        '| speed | 1.500 (missed) |  | 2.000 | 4.000 | at least 1.9 '
        '| 0 /s, 0.00 MFLOP, 0 % of peak | 0 /s, 0.00 MFLOP, 0 % of peak |',
        '| memory | 1.500 |  |  |  |  | 3.000 MB | 2.000 MB |',
    ]


def test_the_legend_names_every_mark_once() -> None:
    cost = Row('memory', 'bytes', None, False, ours=[2.0], theirs=[1.0])
    speedup = Row('speed', 'seconds', 1.9, True, ours=[2.0], theirs=[3.0], flops=[1.0, 2.0], moved=[1.0, 2.0])
    (legend,) = draw([cost, cost, speedup], 'title').legends
    names = {text.get_text() for text in legend.get_texts()}
    assert names == {'measured', 'goal', 'matrix work alone', 'memory traffic alone'}
    assert len(legend.get_texts()) == len(names)


def test_rounds_alternate_between_the_sides() -> None:
    turns: list[str] = []
    square = torch.randn(3, 3)

    def side(name: str) -> Side:
        return Side(nn.Identity(), lambda: (turns.append(name), square @ square), items=1)

    row = time_sides('squares', (partial(side, 'a'), partial(side, 'b')), rounds=2, seconds=0.0, threads=1)
    assert ''.join(turns).endswith('aaaabbbbabab')  # first four warm-up steps of each side, then turns
    assert (row.flops, row.floor, len(row.ratios)) == ([54.0, 54.0], 1.0, 2)
    assert (row.moved, row.traffic) == ([3 * 36.0, 3 * 36.0], 1.0)  # two factors and a product of 36 bytes each


@pytest.mark.parametrize('name', ['test_ait', 'ait_small'])
def test_the_vit_of_the_comparison_differs_in_the_workspace_alone(name: str) -> None:
    ait = timm.create_model(name, num_classes=3)
    vit = vit_like(ait)
    ours, theirs = (
        {key: x.shape for key, x in model.state_dict().items() if '.mlp.' not in key} for model in (ait, vit)
    )
    assert ours == theirs
    assert all(type(block) is Block and block.mlp.fc1.out_features for block in vit.blocks)
    assert isinstance(vit.patch_embed, NormalizedPatchEmbed) == (name == 'test_ait')
    for a, v in zip(ait.blocks, vit.blocks, strict=True):
        assert a.mlp.fc1.weight.shape == v.mlp.fc1.weight.shape
        assert (a.attn.num_heads, a.norm1.eps) == (v.attn.num_heads, v.norm1.eps)


def test_a_model_without_fused_attention_computes_the_same_logits_in_other_operations() -> None:
    fused, unfused = speed.create('toy', 'small').eval(), speed.unfuse('toy', 'small').eval()
    unfused.load_state_dict(fused.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with Recorder() as theirs:
        logits = fused(images)
    with Recorder() as ours:
        torch.testing.assert_close(unfused(images), logits)
    assert ['scaled_dot_product' in ' '.join(names) for names in (theirs.names, ours.names)] == [True, False]


def test_the_looped_workspace_computes_the_same_as_ours() -> None:
    ours, theirs = GlobalWorkspace(E, HIDDEN, **SIZES, write_grad=False), LoopedWorkspace(E, HIDDEN, **SIZES)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, N, E)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.memory, theirs.memory)
    torch.testing.assert_close(ours.balance_loss(), theirs.balance_loss())


@pytest.mark.parametrize('write_grad', [False, True])
def test_the_workspace_has_no_loop_over_heads(write_grad: bool) -> None:
    def count(layer: nn.Module) -> list[int]:
        return [len(recorder.names) for recorder in record(layer, backward=True)]

    few, many = (
        GlobalWorkspace(E, HIDDEN, **{**SIZES, 'write_heads': heads}, write_grad=write_grad) for heads in (2, 7)
    )
    assert count(few) == count(many)
    looped = [LoopedWorkspace(E, HIDDEN, **{**SIZES, 'write_heads': heads}) for heads in (2, 7)]
    assert count(looped[0]) < count(looped[1])


@pytest.mark.parametrize('write_grad', [False, True])
def test_nothing_but_the_logits_is_as_large_as_heads_x_slots_x_tokens(write_grad: bool) -> None:
    forward, backward = record(GlobalWorkspace(E, HIDDEN, **SIZES, write_grad=write_grad), backward=True)
    assert forward.larger_than(LOGITS) == [(SIZES['write_heads'] * SIZES['num_slots'], T)]
    assert backward.larger_than(LOGITS) == []


def test_evaluation_has_no_operations_of_the_write() -> None:
    layer = GlobalWorkspace(E, HIDDEN, **SIZES).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward, _ = record(layer, backward=False)
    slots = SIZES['num_slots']
    feed_forward, retrieval, lift = 2 * T * E * HIDDEN, 2 * T * E * slots, slots * SIZES['slot_dim'] * E
    assert counter.get_total_flops() <= 2 * (feed_forward + retrieval + lift)
    written = ('topk', 'embedding_bag', 'scatter', 'gather', 'index', 'sort', 'isfinite')
    assert not [name for name in forward.names if any(part in name for part in written)]
    assert forward.larger_than(LOGITS) == []


def make_sides(steps: list[str], seconds: tuple[float, float], patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Sides of three and of six items, whose steps take so many seconds of a clock of their own."""
    now = [0.0]
    patch.setattr(measure, 'timer', lambda: now[0])
    square = torch.randn(3, 3)

    def make(name: str, cost: float, items: int) -> Side:
        def step() -> None:
            steps.append(name)
            now[0] += cost
            square @ square

        return Side(nn.Linear(1, 1), step, items)

    return (lambda: make('a', seconds[0], 3)), (lambda: make('b', seconds[1], 6))


def test_time_work_and_memory_are_those_of_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sides = make_sides(steps, (1.5, 6.0), monkeypatch)
    row = time_sides('squares', sides, rounds=2, seconds=12.0, threads=1)
    assert ''.join(steps[-10:]) in 'aaaaaaaabb' * 2
    assert (row.ours, row.theirs) == ([0.5, 0.5], [1.0, 1.0])
    assert (row.flops, row.moved) == ([54 / 3, 54 / 6], [108 / 3, 108 / 6])
    assert (row.ratio, row.per_second) == (0.5, [2.0, 1.0])
    assert table([row]).endswith('| 2 /s, 0.00 MFLOP | 1 /s, 0.00 MFLOP |')
    monkeypatch.setattr(measure, 'peak_bytes', lambda side: 12)
    row = compare_bytes('bytes', sides)
    assert (row.ours, row.theirs) == ([4.0], [2.0])


def test_a_row_has_its_goal_and_direction_and_is_timed_with_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, 'set_num_threads', threads := Mock())
    monkeypatch.setattr(measure, 'peak_bytes', lambda side: 12)
    sides = make_sides([], (1.0, 1.0), monkeypatch)
    row = time_sides('speed', sides, rounds=1, seconds=1.0, threads=3, goal=1.9, at_least=True)
    assert (row.goal, row.at_least) == (1.9, True)
    threads.assert_called_once_with(3)
    assert compare_bytes('bytes', sides, goal=1.1).goal == 1.1


@pytest.mark.parametrize('compiled', [False, True])
def test_times_are_those_of_compiled_sides_where_they_are_asked_for(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = Mock()
    monkeypatch.setattr(nn.Module, 'compile', compile_)
    sides = make_sides([], (1.0, 1.0), monkeypatch)
    time_sides('squares', sides, rounds=1, seconds=1.0, threads=1, compiled=compiled)
    assert compile_.call_count == 2 * compiled


def test_peak_bytes_are_the_bytes_that_a_step_holds_at_the_same_time() -> None:
    linear, x = nn.Linear(3, 5, bias=False), torch.randn(2, 3)

    def step() -> None:
        out = linear(x).exp()
        (out + 1).sum()  # freed at once
        out.sum().backward()

    out, loss, weight = 10, 1, 15  # the output and its gradient, the loss and its, and the weight's gradient
    assert peak_bytes(Side(linear, step, 1)) == 4 * (2 * out + 2 * loss + weight)


def test_peak_bytes_are_without_the_state_of_the_optimizer() -> None:
    linear, x = nn.Linear(50, 50, bias=False), torch.randn(1, 50)
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)

    def step() -> None:
        linear(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert peak_bytes(Side(linear, step, 1)) < 4 * 2 * 50 * 50  # its gradient, not two moments besides


@pytest.mark.parametrize('compiled', [False, True])
def test_peak_memory_is_that_of_compiled_sides_where_they_are_asked_for(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nn.Module, 'compile', Mock())
    speed.main(['--quick', '--rows', 'memory', *['--compile'] * compiled, '--out', str(tmp_path)])
    assert nn.Module.compile.called == compiled


def training_step(build: Callable[[], nn.Module], checkpointing: bool = False) -> Side:
    model, images = build(), torch.randn(32, 3, 32, 32)
    model.set_grad_checkpointing(checkpointing)

    def step() -> None:
        model(images).sum().backward()
        model.zero_grad()

    return Side(model, step, 32)


@pytest.mark.parametrize('write_grad', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_takes_at_most_10_percent_more_memory_than_a_vit(write_grad: bool, checkpointing: bool) -> None:
    ait = partial(timm.create_model, 'ait_small_patch4_32', write_grad=write_grad)
    sides = tuple(partial(training_step, build, checkpointing) for build in (ait, lambda: vit_like(ait())))
    row = compare_bytes('peak', sides)
    assert row.ratio <= 1.10, row


@pytest.mark.parametrize(
    ('kwargs', 'most'), [({}, 325), (IMAGE, 645), (ADDITIVE, 320)], ids=['published', 'image', 'additive']
)
def test_a_training_step_of_a_layer_starts_few_operations(kwargs: dict[str, Any], most: int) -> None:
    """On a GPU their number, not their work, sets the pace of small batches. Views count here too."""
    layer, x = GlobalWorkspace(64, 64, **kwargs).train(), torch.randn(2, 16, 64, requires_grad=True)
    for _ in range(2):
        with Recorder() as recorder, torch.autocast('cpu', torch.bfloat16):
            layer(x).sum().backward()
    assert len(recorder.names) <= most
