"""What pip installs: the files, what is said of them, and that they work away from the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEIGHTS = {f'timm_ait/weights/{name}.cifar10.safetensors' for name in ('ait_tiny_conv4_32', 'test_ait')}
MOST_BYTES = 6_000_000  # of which the weights are 4.8 MB


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, cwd=ROOT.anchor)


@pytest.fixture(scope='module')
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built by ``python -m build`` from a copy, in an environment of its own."""
    folder = tmp_path_factory.mktemp('packaging')
    python = folder / 'venv' / 'bin' / 'python'
    made = run(sys.executable, '-m', 'venv', folder / 'venv')
    made = made if made.returncode else run(python, '-m', 'pip', 'install', '--quiet', 'build')
    if made.returncode:
        pytest.skip(f'PyPI cannot be reached, so wheel and sdist are NOT TESTED HERE: {made.stderr[-200:]}')
    unwanted = shutil.ignore_patterns('.*', '*.egg-info', '__pycache__', 'build', 'dist', 'output', 'site')
    shutil.copytree(ROOT, folder / 'source', ignore=unwanted)
    done = run(python, '-m', 'build', '--outdir', folder / 'dist', folder / 'source')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / 'dist'


@pytest.fixture(scope='module')
def wheel(built: Path) -> Path:
    (path,) = built.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('/METADATA'))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_the_package_its_weights_and_its_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {f'timm_ait/{path.name}' for path in (ROOT / 'timm_ait').glob('*.py')}
    package = {name for name in names if name.startswith('timm_ait/')}
    assert package == {*modules, *WEIGHTS, 'timm_ait/py.typed'}
    assert all('.dist-info/' in name for name in names - package)
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert wheel.stat().st_size < MOST_BYTES


def test_the_sdist_builds_the_same_package(built: Path) -> None:
    (path,) = built.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        names = {name.split('/', 1)[-1] for name in archive.getnames()}
    assert {'LICENSE', 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'pyproject.toml', *WEIGHTS} <= names
    assert {'timm_ait/py.typed', 'timm_ait/__init__.py'} <= names
    assert not [name for name in names if name.startswith(('tests/', 'benchmarks/', '.github/'))]
    assert path.stat().st_size < MOST_BYTES


def test_the_metadata_say_what_it_is_and_what_it_needs(metadata: Message) -> None:
    import timm_ait

    assert (metadata['Name'], metadata['Version']) == ('timm_ait', timm_ait.__version__)
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.10'
    assert metadata['Description-Content-Type'] == 'text/markdown'
    assert metadata.get_payload().startswith('# timm-ait')
    required = [line for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line]
    assert {line.split('>')[0] for line in required} == {
        *('torch', 'torchvision', 'timm', 'huggingface-hub', 'safetensors', 'pyyaml')
    }
    assert set(metadata.get_all('Provides-Extra')) == {'clients', 'demo', 'docs', 'export', 'test', 'visualize'}
    assert 'Typing :: Typed' in metadata.get_all('Classifier')


def test_installed_from_the_wheel_it_makes_a_trained_model(wheel: Path, tmp_path: Path) -> None:
    """Beside the installed torch and timm, but with none of this checkout."""
    target = tmp_path / 'site'
    done = run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', target, wheel)
    assert done.returncode == 0, done.stderr
    script = f"""
import timm, torch, timm_ait
assert timm_ait.__file__.startswith({str(target)!r}), timm_ait.__file__
model = timm.create_model('ait_tiny_conv4_32', pretrained=True).eval()
print(tuple(model(torch.zeros(2, 3, 32, 32)).shape))
"""
    done = run(sys.executable, '-c', script, PYTHONPATH=str(target))
    assert (done.returncode, done.stdout) == (0, '(2, 10)\n'), done.stderr
