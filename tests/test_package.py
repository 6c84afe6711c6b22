"""What the package takes from timm, and what its import does."""

import ast
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import timm_ait


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
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ''), done.stderr
