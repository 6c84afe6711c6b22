"""Write a result together with what is needed to measure it again: machine, versions, commit and arguments."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch


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


def write_record(path: Path, arguments: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Write environment, arguments and results as JSON: all of it, or nothing if the process is killed meanwhile.

    Args:
        path: File to write; its folder is created.
        arguments: Arguments of the script; plain values or paths.
        results: Plain values by name.

    Returns:
        What was written.
    """
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    record = {**environment(), 'arguments': arguments, **results}
    write_whole(path, lambda file: file.write(f'{json.dumps(record, indent=1)}\n'.encode()))
    return record


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file and its folder. If the process is killed meanwhile, an older file is still whole.

    Args:
        path: File to write.
        write: Writes its content into the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f'{path.name}.tmp')
    with scratch.open('wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
