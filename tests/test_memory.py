"""The memory in a file of its own."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from models import memories
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from timm_ait import AssociativeTransformer, GlobalWorkspace, load_memory, save_memory

NAMES = ['blocks.0.mlp.memory', 'blocks.1.mlp.memory']


def make_model(**kwargs: Any) -> AssociativeTransformer:
    args = dict(depth=2, embed_dim=16, num_heads=2, num_classes=7, num_slots=5, slot_dim=3)
    return timm.create_model('test_ait', **dict(args, **kwargs))


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) == 2
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Holder(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def compile_blocks(model: Any) -> Any:
    model.blocks = nn.Sequential(*(torch.compile(block, backend='eager') for block in model.blocks))
    return model


def checkpoint_blocks(model: Any) -> Any:
    model.blocks = nn.Sequential(*(checkpoint_wrapper(block) for block in model.blocks))
    return model


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    'none': lambda model: model,
    'compiled': lambda model: torch.compile(model, backend='eager'),
    'compiled blocks': compile_blocks,
    'checkpointed blocks': checkpoint_blocks,
    'distributed': nn.parallel.DistributedDataParallel,
    'distributed and compiled': lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(model), backend='eager'
    ),
    'held by another module': Holder,
}


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path / 'store'), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures('_one_rank')
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_it_is_saved_from_any_wrapper_and_loaded_into_any(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    wrapped, plain = wrap(make_model()), make_model()
    assert not torch.equal(memories(wrapped)[0], memories(plain)[0])
    save_memory(wrapped, tmp_path / 'memory.safetensors')
    load_memory(plain, tmp_path / 'memory.safetensors')
    assert_equal(memories(plain), memories(wrapped))
    another = make_model()
    save_memory(another, tmp_path / 'another.safetensors')
    load_memory(wrapped, tmp_path / 'another.safetensors')
    assert_equal(memories(wrapped), memories(another))


@pytest.mark.parametrize(
    'name',
    [
        '_checkpoint_wrapped_module',
        '_fsdp_wrapped_module',
        '_orig_mod',
        'base_layer',
        'base_model',
        'model',
        'module',
    ],
)
def test_the_names_of_wrappers_around_a_layer_are_left_out(name: str, tmp_path: Path) -> None:
    model = make_model()
    for block in model.blocks:
        block.mlp = nn.ModuleDict({name: block.mlp})
    save_memory(model, tmp_path / 'memory.safetensors')
    assert list(load_file(tmp_path / 'memory.safetensors')) == ['blocks.0.mlp.memory', 'blocks.1.mlp.memory']


def test_the_file_holds_the_names_of_the_state_dict(tmp_path: Path) -> None:
    model = make_model()
    save_memory(torch.compile(model, backend='eager'), tmp_path / 'memory.safetensors')
    saved = load_file(tmp_path / 'memory.safetensors')
    assert list(saved) == NAMES
    assert all(torch.equal(saved[name], model.state_dict()[name]) for name in NAMES)


def test_the_layer_in_another_model_is_found(tmp_path: Path) -> None:
    vits = [timm.create_model('test_vit', mlp_layer=GlobalWorkspace) for _ in range(2)]
    save_memory(vits[0], tmp_path / 'memory.safetensors')
    load_memory(vits[1], tmp_path / 'memory.safetensors')
    for a, b in zip(memories(vits[0]), memories(vits[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(depth=3), r"missing or ambiguous are \['blocks.2.mlp.memory'\], unknown are none; create the model as"),
        (dict(depth=1), r"missing or ambiguous are none, unknown are \['blocks.1.mlp.memory'\]"),
        (dict(num_slots=7), r'has shape \(7, 3\), but in .* it has shape \(5, 3\); .* num_slots=5 and slot_dim=3'),
        (dict(slot_dim=2), r'has shape \(5, 2\), but in .* it has shape \(5, 3\)'),
    ],
)
def test_a_memory_of_another_model_is_an_error_and_changes_nothing(
    kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_memory(make_model(), tmp_path / 'memory.safetensors')
    model = make_model(**kwargs)
    before = memories(model)
    with pytest.raises(ValueError, match=message):
        load_memory(model, tmp_path / 'memory.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(before, memories(model), strict=True))


def test_an_error_in_the_last_block_changes_nothing(tmp_path: Path) -> None:
    model = make_model()
    before = memories(model)
    save_file({NAMES[0]: torch.zeros(5, 3), NAMES[1]: torch.zeros(5, 4)}, tmp_path / 'memory.safetensors')
    with pytest.raises(ValueError, match=r'blocks.1.mlp.memory has shape \(5, 3\)'):
        load_memory(model, tmp_path / 'memory.safetensors')
    assert_equal(memories(model), before)


def test_two_models_in_one_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    pair = nn.ModuleDict({'student': make_model(), 'teacher': make_model()})
    save_memory(pair, tmp_path / 'pair.safetensors')
    again = nn.ModuleDict({'student': make_model(), 'teacher': make_model()})
    load_memory(again, tmp_path / 'pair.safetensors')
    for name in pair:
        assert_equal(memories(again[name]), memories(pair[name]))
    with pytest.raises(ValueError, match=r"missing or ambiguous are \['blocks.0.mlp.memory', 'blocks.1.mlp.memory'\]"):
        load_memory(make_model(), tmp_path / 'pair.safetensors')


def test_one_memory_is_not_loaded_into_two_layers(tmp_path: Path) -> None:
    save_memory(make_model(), tmp_path / 'one.safetensors')
    pair = nn.ModuleDict({'student': make_model(), 'teacher': make_model()})
    with pytest.raises(ValueError, match=r"missing or ambiguous are \['student.blocks.0.mlp.memory', "):
        load_memory(pair, tmp_path / 'one.safetensors')
    save_memory(make_model().blocks[0].mlp, tmp_path / 'layer.safetensors')
    with pytest.raises(ValueError, match=r"missing or ambiguous are \['blocks.0.mlp.memory', 'blocks.1"):
        load_memory(make_model(), tmp_path / 'layer.safetensors')


def test_two_memories_of_one_name_are_an_error(tmp_path: Path) -> None:
    pair = nn.ModuleDict({'model': make_model(), 'module': make_model()})
    with pytest.raises(ValueError, match=r'two memories are named blocks.0.mlp.memory; pass one of the models'):
        save_memory(pair, tmp_path / 'pair.safetensors')


def test_names_that_end_alike_are_not_taken_for_one_another(tmp_path: Path) -> None:
    def both() -> nn.ModuleDict:
        return nn.ModuleDict({name: GlobalWorkspace(4, num_slots=3, slot_dim=2) for name in ('a', 'ba')})

    saved, plain = both(), both()
    save_memory(Holder(saved), tmp_path / 'memory.safetensors')
    load_memory(plain, tmp_path / 'memory.safetensors')
    assert all(torch.equal(plain[name].memory, saved[name].memory) for name in saved)


def test_the_layer_that_an_adapter_trains_is_saved_and_not_the_one_that_it_keeps(tmp_path: Path) -> None:
    model = make_model()
    other = make_model()
    for block in model.blocks:  # as peft does with modules_to_save
        block.mlp = nn.ModuleDict(
            {
                'original_module': block.mlp,
                'modules_to_save': nn.ModuleDict({'default': GlobalWorkspace(16, 32, num_slots=5, slot_dim=3)}),
            }
        )
    save_memory(model, tmp_path / 'memory.safetensors')
    load_memory(other, tmp_path / 'memory.safetensors')
    trained = [block.mlp['modules_to_save']['default'].memory for block in model.blocks]
    assert_equal(memories(other), trained)


def test_a_memory_of_any_layout_is_saved_and_one_that_is_no_table_is_an_error(tmp_path: Path) -> None:
    model = make_model()
    for block in model.blocks:
        block.mlp.memory = block.mlp.memory.t().contiguous().t()
    save_memory(model, tmp_path / 'memory.safetensors')
    assert_equal([load_file(tmp_path / 'memory.safetensors')[name] for name in NAMES], memories(model))
    save_file({name: torch.tensor(1.0) for name in NAMES}, tmp_path / 'number.safetensors')
    with pytest.raises(ValueError, match=r'in .* it has shape \(\); create the model with other sizes'):
        load_memory(model, tmp_path / 'number.safetensors')


def test_a_model_without_workspace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='expected a model with workspaces, got Linear without; pass an AiT'):
        save_memory(nn.Linear(2, 3), tmp_path / 'memory.safetensors')
    assert not os.listdir(tmp_path)


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r'memory\.safetensors cannot be written'):
        save_memory(timm.create_model('test_ait'), tmp_path / 'nowhere' / 'memory.safetensors')


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    torch.save({}, tmp_path / 'memory.pt')
    with pytest.raises(ValueError, match=r'memory.pt is no safetensors file .*; expected one that save_memory'):
        load_memory(make_model(), tmp_path / 'memory.pt')
    with pytest.raises(FileNotFoundError):
        load_memory(make_model(), tmp_path / 'nothing.safetensors')


@pytest.mark.parametrize('wrong', ['nan', 'inf'])
def test_a_memory_that_is_not_finite_is_refused_and_nothing_changes(wrong: str, tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / 'memory.safetensors'
    save_memory(model, path)
    saved = load_file(path)
    save_file({name: torch.full_like(value, float(wrong)) for name, value in saved.items()}, path)
    with pytest.raises(ValueError, match=r'blocks\.0\.mlp\.memory has NaN or infinite values in .*memory\.safetensors'):
        load_memory(model, path)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_model_on_the_meta_device_is_an_error(tmp_path: Path) -> None:
    save_memory(make_model(), tmp_path / 'memory.safetensors')
    with pytest.raises(
        ValueError, match=r'blocks.0.mlp.memory is on the meta device, .*; use model.to_empty\(device=...\) first'
    ):
        load_memory(make_model().to('meta'), tmp_path / 'memory.safetensors')
    with pytest.raises(ValueError, match='is on the meta device and holds nothing; load the model before'):
        save_memory(make_model().to('meta'), tmp_path / 'memory.safetensors')
