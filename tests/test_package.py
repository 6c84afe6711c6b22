"""What the package takes from timm and PyTorch, and what its import does."""

import ast
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import timm_ait

# Private names of PyTorch: which file needs them
PRIVATE = {
    'torch._C._current_graph_task_id': 'balance.py: the number of the running backward pass',
    'torch._C._will_engine_execute_node': 'balance.py: whether a pass computes the gradient of a parameter',
    'torch._C._functorch.is_batchedtensor': 'state.py: whether vmap hides that parameters are trained',
    'torch._C._functorch.is_gradtrackingtensor': 'state.py: whether jvp differentiates by parameters',
    'torch._C.DisableTorchFunctionSubclass': 'balance.py: operations on what is inside a tracked tensor',
    'torch.autograd.Variable._execution_engine.queue_callback': 'balance.py: the end of a backward pass',
    'torch.utils._pytree.tree_map': 'balance.py: outputs in lists and dicts',
    'torch.utils._pytree.tree_leaves': 'balance.py: arguments in lists and dicts',
    'torch.utils._python_dispatch._disable_current_modes': 'replay.py: what selective checkpointing must not see',
    'torch.utils._python_dispatch._get_current_dispatch_mode_stack': 'replay.py: whether it runs',
    'torch.utils.checkpoint._CachedTorchDispatchMode': 'replay.py: whether it runs',
    'torch.utils.checkpoint._CachingTorchDispatchMode': 'replay.py: whether it runs',
    'torch.compiler._is_exporting_flag': 'transformer.py: outputs stay plain while a model is exported',
    'torch.ops.aten._embedding_bag_per_sample_weights_backward': 'selection.py: gradient of the gates on a CPU',
    **dict.fromkeys(
        (f'torch.nn.Module._{kind}_hooks' for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')),
        'layers.py: whether somebody has changed a layer',
    ),
}


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


@pytest.mark.parametrize('name', PRIVATE)
def test_a_private_name_of_pytorch_is_still_there(name: str) -> None:
    place: Any = torch
    for part in name.split('.')[1:]:
        if place is nn.Module:
            place = nn.Module()
        assert hasattr(place, part), f'{name} is gone; it is needed in {PRIVATE[name]}'
        place = getattr(place, part)


def test_no_other_private_name_of_pytorch_is_used() -> None:
    known = {part for name in PRIVATE for part in name.split('.') if part.startswith('_')}
    known |= {'_apply', '__torch_dispatch__'}
    found = set()
    for path in Path(timm_ait.__file__).parent.glob('*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'torch':
                parts = (*node.module.split('.'), *(imported.name for imported in node.names))
                found |= {part for part in parts if part.startswith('_')}
            if isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__'):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                if names & {'torch', 'Variable', 'layer'} and node.attr not in defined:
                    found.add(node.attr)
    assert found <= known, found - known


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
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
