"""timm's own model tests on the models of this package: ``python tests/timm_suite.py [PYTEST_ARGS...]``.

The tests come from the sdist of the installed timm. They are copied out of it, since next to its sources they would
import those; two lists in the copy learn our names, nothing else in it is touched. As a pytest plugin this module keeps
what concerns one of the names in the environment variable ``TIMM_SUITE_MODELS``, and no name that merely contains one
of ours (CaiT).
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

import timm_ait  # noqa: F401  registers the models

ROOT = Path(__file__).parents[1]
CACHE = ROOT / '.cache'
WORKERS = 2  # models of 100 M parameters are copied again and again: more take much memory
MODELS = timm.list_models(module='ait')
# Without an entry here timm takes a model for a convolutional network, or leaves out the tests of its intermediates.
FILTERS = {'NON_STD_FILTERS': "'ait_*', 'test_ait', ", 'FEAT_INTER_FILTERS': "'ait', "}
# What runs for this model must run for each of ours, but for what needs weights that are not in the package.
REFERENCE = 'vit_base_patch16_224'
NEED_WEIGHTS = {'test_model_load_pretrained', 'test_model_features_pretrained', 'test_model_inference'}
# timm asks every model for three feature levels; these have a level for each of their two blocks.
TWO_LEVELS = [model for model in MODELS if '_small' in model]


class SdistUnavailableError(RuntimeError):
    """The sdist of the installed timm is neither cached nor to be had."""


def fetch_sdist(version: str = timm.__version__) -> Path:
    """Return the path of timm's sdist in the cache, where pip puts it first if need be.

    Raises:
        SdistUnavailableError: With what pip said.
    """
    sdist = CACHE / f'timm-{version}.tar.gz'
    if not sdist.is_file():
        args = ['download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', str(CACHE), f'timm=={version}']
        done = subprocess.run([sys.executable, '-m', 'pip', *args], capture_output=True, text=True)
        if done.returncode or not sdist.is_file():
            raise SdistUnavailableError(
                f'no sdist of timm {version}: pip found none ({done.stderr.strip()[-300:]}); '
                f'download timm-{version}.tar.gz from PyPI into {CACHE}'
            )
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """Copy timm's tests, with its pytest settings, into ``folder``; return the file that is to be run there."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            path = Path(*Path(member.name).parts[1:])  # timm-1.0.31/tests/test_models.py -> tests/test_models.py
            if member.isfile() and (path.parts[:1] == ('tests',) or path == Path('pyproject.toml')):
                content = archive.extractfile(member)
                assert content is not None
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content.read())
    tests = folder / 'tests' / 'test_models.py'
    tests.write_text(add_names(tests.read_text(encoding='utf-8')), encoding='utf-8')
    return tests


def add_names(source: str) -> str:
    """Insert our names into the two filter lists.

    Raises:
        ValueError: Where a list does not stand there exactly once, as a list.
    """
    for name, entries in FILTERS.items():
        source, count = re.subn(rf'^{name} = \[', lambda found, new=entries: found[0] + new, source, flags=re.M)
        if count != 1:
            raise ValueError(f'expected "{name} = [" once in test_models.py of timm {timm.__version__}, got {count}')
    return source


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker of pytest-timeout, whose limits are too short for two slow cores and are left off."""
    config.addinivalue_line('markers', 'timeout(seconds): not enforced here')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Keep the tests of the wanted models.

    Raises:
        pytest.UsageError: Where a model escapes a test that its reference meets.
    """
    kept = []
    for model in os.environ['TIMM_SUITE_MODELS'].split(','):
        own = [item for item in items if model_of(item) == model and not needs_hub(item)]
        escaped = names_of(items, REFERENCE) - NEED_WEIGHTS - {item.originalname for item in own}
        if escaped:
            raise pytest.UsageError(f'{model} escapes {sorted(escaped)}, which {REFERENCE} meets; see FILTERS')
        kept += own
    for item in kept:
        if item.originalname == 'test_model_forward_intermediates' and model_of(item) in TWO_LEVELS:
            item.add_marker(
                pytest.mark.xfail(raises=AssertionError, strict=True, reason='two blocks, not three levels')
            )
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def needs_hub(item: pytest.Function) -> bool:
    """Whether the test would download weights, or the outputs that timm expects of its own small models."""
    has_own_weights = getattr(timm.get_pretrained_cfg(model_of(item)), 'file', None) is not None
    return item.originalname == 'test_model_inference' or (item.originalname in NEED_WEIGHTS and not has_own_weights)


def names_of(items: list[pytest.Function], model: str) -> set[str]:
    """Names of the test functions that take the model."""
    return {item.originalname for item in items if model_of(item) == model}


def model_of(item: pytest.Function) -> str:
    """Name of the model that a test is about, without tag; '' where it is about none."""
    return str(item.callspec.params.get('model_name', '')).split('.')[0] if hasattr(item, 'callspec') else ''


def run(folder: Path, models: list[str], *args: str) -> int:
    """Run timm's tests of the named models out of ``folder``, two at a time; return pytest's exit code."""
    tests = unpack(fetch_sdist(), folder)
    env = {**os.environ, 'TORCH_BACKEND': 'timm_ait', 'TIMM_SUITE_MODELS': ','.join(models)}
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get('PYTHONPATH')]))
    env.setdefault('OMP_NUM_THREADS', str(max((os.cpu_count() or 2) // WORKERS, 1)))
    plugins = ['-p', 'timm_suite', '-p', 'no:timeout', '-p', 'no:cacheprovider', '-n', str(WORKERS)]
    return subprocess.run([sys.executable, '-m', 'pytest', *plugins, *args, str(tests)], cwd=folder, env=env).returncode


if __name__ == '__main__':
    try:
        sys.exit(run(CACHE / f'timm-{timm.__version__}', MODELS, '-v', *sys.argv[1:]))
    except SdistUnavailableError as error:
        sys.exit(f'timm_suite: {error}')
