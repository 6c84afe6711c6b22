"""Write a result together with what is needed to measure it again: machine, versions, commit and arguments."""

import argparse
import glob
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch

from timm_ait.pretrained import WeightsError


def commit() -> str | None:
    """Return the commit of this checkout, which ends in '-dirty' if the code was changed since; None without git."""
    git = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def environment() -> dict[str, Any]:
    """Return the machine, the versions and the commit."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return {
        'cpu': f'{len(cpu)} x {cpu[0]}' if cpu else platform.processor(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'system': platform.system(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'commit': commit(),
    }


def write_record(path: Path, arguments: dict[str, Any], results: dict[str, Any]) -> None:
    """Write environment, arguments and results as JSON: all of it, or nothing if the process is killed meanwhile.

    Args:
        path: File to write; its folder is created.
        arguments: Arguments of the script; plain values or paths.
        results: Plain values by name.
    """
    record = {**environment(), 'arguments': _plain(arguments), **results}
    write_whole(path, lambda file: file.write(f'{json.dumps(record, indent=1)}\n'.encode()))


def check_new(path: Path, arguments: dict[str, Any]) -> None:
    """Check that a result would not be written over an older one.

    Args:
        path: Of the JSON file.
        arguments: Of the script, as they will stand in it.

    Raises:
        ValueError: If there is such a file.
    """
    for record in read_records(path.parent, ['arguments'], glob.escape(path.name)).values():
        kind = 'these arguments; remove it' if record['arguments'] == _plain(arguments) else 'other arguments; keep it'
        raise ValueError(f'{path} holds what was measured with {kind}, or give another --out')


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as JSON keeps them: paths are strings, and tuples are lists."""
    kept = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    return dict(json.loads(json.dumps(kept)))


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file and its folder. If the process is killed meanwhile, an older file is still whole.

    Args:
        path: File to write.
        write: Writes its content into the open file.

    Raises:
        OSError: If the disk is full, for instance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f'{path.name}.{os.getpid()}.tmp')  # another process may write the same file
    try:
        with scratch.open('wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except RuntimeError as error:  # as torch.save says it
        raise OSError(f'{path} cannot be written: {error.__context__ or error}') from error
    finally:
        scratch.unlink(missing_ok=True)


def read_records(folder: Path, names: Iterable[str], pattern: str = '*.json') -> dict[Path, dict[str, Any]]:
    """Read the results of a folder, by file.

    Args:
        folder: Of JSON files.
        names: What each of them must hold.
        pattern: Of the files' names.

    Raises:
        ValueError: For a file that is no such result.
    """
    records = {}
    for path in sorted(folder.glob(pattern)):
        try:
            records[path] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f'{path} is no JSON: {error}; remove it') from error
        if not isinstance(records[path], dict):
            raise ValueError(f'{path} is no result, got {type(records[path]).__name__}; remove it')
        missing = [name for name in names if name not in records[path]]
        if missing:
            raise ValueError(f'{path} holds no {", ".join(missing)}: it is the result of another script')
    return records


def check_same(records: dict[Path, dict[str, Any]], names: Iterable[str], within: str = '') -> None:
    """Check that results which stand in one table may be compared.

    Args:
        records: By file.
        names: What must be the same in all of them that know it.
        within: Where in a record it stands.

    Raises:
        ValueError: For one that differs from the first.
    """
    for name in names:
        known = {path: (record[within] if within else record).get(name) for path, record in records.items()}
        known = {path: value for path, value in known.items() if value is not None}
        for path, value in known.items():
            first = next(iter(known))
            if value != known[first]:
                raise ValueError(
                    f'{path} is of a run with {name}={value}, {first} with {name}={known[first]}; use the same '
                    'settings and images, or another --out'
                )


def positive(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'expected a whole number of at least 1, got {text}')
    return value


def check_model(name: str) -> None:
    """Raise ValueError if timm knows no such model, and the name is no address of a folder or of the Hub."""
    if not timm.is_model(name) and ':' not in name:
        raise ValueError(f'timm has no model {name}; timm.list_models() lists them')


def check_device(device: str) -> None:
    """Raise ValueError if this machine has no such device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition('. ')[0]
        raise ValueError(f'PyTorch cannot compute on --device {device} here; take cpu. {why}') from error


@contextmanager
def told(parser: argparse.ArgumentParser, folder: Path | None = None) -> Iterator[None]:
    """Inside it, what the user can mend ends the script with one sentence, and no traceback.

    Args:
        parser: Of the script.
        folder: Where the script will write; it is made, and it must take files before hours of work begin.
    """
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        yield
    except (ValueError, OSError, WeightsError) as error:
        parser.error(str(error) or repr(error))
