"""What is written beside every result: machine, versions, commit and arguments."""

import json
import subprocess
from pathlib import Path

import timm
import torch
from record import environment, write_record


def test_the_environment_names_versions_machine_and_commit() -> None:
    found = environment()
    assert set(found) == {'cpu', 'gpu', 'system', 'python', 'torch', 'timm', 'commit'}
    assert (found['torch'], found['timm']) == (torch.__version__, timm.__version__)
    assert found['cpu']
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (found['commit'] or '').removesuffix('-dirty') == git.stdout.strip()[:12]


def test_a_record_holds_environment_arguments_and_results(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'result.json'
    write_record(path, {'out': tmp_path, 'seeds': 3}, {'accuracy': [70.5, 71.25]})
    record = json.loads(path.read_text())
    assert record['arguments'] == {'out': str(tmp_path), 'seeds': 3}
    assert record['accuracy'] == [70.5, 71.25]
    assert environment().items() <= record.items()
