"""slots.py measures whether a memory tells tokens apart."""

from pathlib import Path
from typing import Any

import pytest
import slots
import timm
import torch
from loop import weight_sum
from photographs import write_noise
from torch import nn

from timm_ait import memory_report


def test_the_script_prints_a_row_for_each_block_or_each_number_of_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_noise(tmp_path, 'ab', 3)
    slots.main([str(tmp_path), '--images', '3'])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(timm.create_model('test_ait').blocks)
    slots.main(['--writes', '3'])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ['0', '1', '3']
    wrong = ([], ['--writes', '-3'], ['--writes', '3', '--checkpoint', 'x'], ['--writes', '3', str(tmp_path)])
    for arguments in (*wrong, [str(tmp_path / 'nowhere')], [str(tmp_path), '--model', 'no_such']):
        with pytest.raises(SystemExit):
            slots.main(arguments)
    assert 'error: ' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        slots.main(['--writes', '3', '--model', 'test_resnet'])
    assert 'error: the model has no GlobalWorkspace to report on' in capsys.readouterr().err


def test_each_write_makes_the_slots_more_alike(capsys: pytest.CaptureFixture[str]) -> None:
    slots.main(['--writes', '10'])
    head, _, *rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()]
    assert head[1:] == ['slots: mean cosine', 'effective rank']
    cosines, ranks = ([float(row[column]) for row in rows] for column in (1, 2))
    torch.manual_seed(0)
    (first, *_) = memory_report(timm.create_model('test_ait'), torch.randn(2, 3, 32, 32))
    assert rows[0] == ['0', f'{first.mean_cosine:.4f}', f'{first.effective_rank:.1f}']  # before the first write
    assert cosines == sorted(cosines)
    assert ranks == sorted(ranks, reverse=True)
    assert 0.5 < cosines[-1] <= 1 < ranks[-1] < ranks[0]


def test_the_report_is_of_the_checkpoint_and_of_so_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_noise(tmp_path, 'ab', 3)
    torch.save(timm.create_model('test_ait').state_dict(), tmp_path / 'mine.pth')
    seen: list[tuple[float, int]] = []

    def note(model: nn.Module, images: Any) -> list[Any]:
        seen.append((weight_sum(model), sum(len(x) for x, _ in images)))
        return []

    monkeypatch.setattr(slots, 'memory_report', note)
    for words in ([], ['--checkpoint', str(tmp_path / 'mine.pth')]):
        slots.main([str(tmp_path), '--images', '4', *words])
    own, mine = timm.create_model('test_ait', pretrained=True), timm.create_model('test_ait')
    mine.load_state_dict(torch.load(tmp_path / 'mine.pth'))
    assert seen == [(weight_sum(own), 4), (weight_sum(mine), 4)]


def test_a_checkpoint_may_have_another_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path, 'a', 1)
    torch.save(timm.create_model('test_ait', num_classes=3).state_dict(), tmp_path / 'three.pth')
    slots.main([str(tmp_path), '--checkpoint', str(tmp_path / 'three.pth'), '--images', '1'])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(timm.create_model('test_ait').blocks)
