"""slots.py measures whether a memory tells tokens apart."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torchvision.transforms.functional import to_pil_image

from timm_ait import GlobalWorkspace

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import slots


def test_the_retrieval_varies_over_tokens_with_orthogonal_slots_and_not_with_equal_ones() -> None:
    layer = GlobalWorkspace(2, num_slots=2, slot_dim=2)
    with torch.no_grad():
        layer.lift.weight.copy_(40 * torch.eye(2))  # attractors 40 gamma: each token retrieves one of them
        layer.lift.bias.zero_()
        layer.memory.copy_(torch.eye(2))
        h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        apart = slots.measure(layer, h)
        layer.memory.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        alike = slots.measure(layer, h)
    assert apart == pytest.approx((0.0, 40.0, 100 * 0.5**0.5))  # length 40, distance 20 sqrt(2) from the mean
    assert alike == pytest.approx((1.0, 40.0, 0.0))


def test_the_script_prints_a_row_for_each_block_or_each_number_of_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in 'ab':
        (tmp_path / label).mkdir()
        for i in range(3):
            to_pil_image(torch.rand(3, 32, 32)).save(tmp_path / label / f'{i}.png')
    slots.main([str(tmp_path), '--images', '3'])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(timm.create_model('test_ait').blocks)
    slots.main(['--writes', '3'])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ['0', '1', '3']
    with pytest.raises(SystemExit):
        slots.main([])
