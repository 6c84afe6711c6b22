"""slots.py measures whether a memory tells tokens apart."""

from pathlib import Path

import pytest
import slots
import timm
import torch
from photographs import write_noise


def test_the_script_prints_a_row_for_each_block_or_each_number_of_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path, 'ab', 3)
    slots.main([str(tmp_path), '--images', '3'])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(timm.create_model('test_ait').blocks)
    slots.main(['--writes', '3'])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ['0', '1', '3']
    for arguments in ([], ['--writes', '-3'], [str(tmp_path / 'nowhere')], [str(tmp_path), '--model', 'no_such']):
        with pytest.raises(SystemExit):
            slots.main(arguments)
    assert 'error: ' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        slots.main(['--writes', '3', '--model', 'test_resnet'])
    assert 'error: the model has no GlobalWorkspace to report on' in capsys.readouterr().err


def test_a_checkpoint_may_have_another_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path, 'a', 1)
    torch.save(timm.create_model('test_ait', num_classes=3).state_dict(), tmp_path / 'three.pth')
    slots.main([str(tmp_path), '--checkpoint', str(tmp_path / 'three.pth'), '--images', '1'])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(timm.create_model('test_ait').blocks)
