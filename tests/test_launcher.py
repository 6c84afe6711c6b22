"""``python -m timm_ait SCRIPT.py`` runs a script as if it was called directly, with the models registered."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def launch(*args: str, cwd: Path, prefix: tuple[str, ...] = ('-m', 'timm_ait')) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *prefix, *args], cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'sibling.py').write_text('NAME = "sibling"\n')
    path = folder / 'script.py'
    path.write_text(
        textwrap.dedent("""
        import sys
        import sibling
        if __name__ == '__main__':
            import timm
            print(sys.argv, __file__, sibling.NAME, timm.list_models('test_ait'))
            sys.exit(3)
        """)
    )
    return path


def test_the_script_has_its_argv_its_name_its_folder_and_the_models(script: Path, tmp_path: Path) -> None:
    done = launch('scripts/script.py', '--flag', '7', cwd=tmp_path)
    assert done.stdout.split('\n')[0] == str(['scripts/script.py', '--flag', '7']) + (
        " scripts/script.py sibling ['test_ait']"
    ), done.stderr
    assert done.returncode == 3


@pytest.mark.parametrize(('args', 'said'), [((), 'usage: '), (('no/such.py',), "no/such.py'; give the path")])
def test_a_missing_script_is_an_error_with_exit_code_2(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = launch(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert 'Traceback' not in done.stderr


def test_the_launchers_help_is_not_an_error(tmp_path: Path) -> None:
    done = launch('--help', cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith('usage: python -m timm_ait SCRIPT.py')


@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_workers_of_every_start_method_find_the_classes_of_the_script(method: str, tmp_path: Path) -> None:
    (tmp_path / 'workers.py').write_text(
        textwrap.dedent(f"""
        import torch
        from torch.utils.data import DataLoader, Dataset
        class Squares(Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return torch.tensor(i * i)
        if __name__ == '__main__':
            import timm
            timm.create_model('test_ait')
            print([int(x) for x in DataLoader(Squares(), num_workers=1, multiprocessing_context='{method}')])
        """)
    )
    done = launch('workers.py', cwd=tmp_path)
    assert done.stdout.strip() == '[0, 1, 4, 9]', done.stderr


def test_torchrun_starts_the_launcher_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / 'rank.py').write_text(
        'import os, timm\n'  # one write for each rank, or the outputs would mix
        "os.write(1, f\"rank {os.environ['RANK']} {timm.list_models('test_ait')}\\n\".encode())\n"
    )
    prefix = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'timm_ait')
    done = launch('rank.py', cwd=tmp_path, prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith('rank')) == [
        f"rank {rank} ['test_ait']" for rank in (0, 1)
    ]
