"""The script that says how many tokens a head attends to."""

import json
from collections.abc import Iterable
from pathlib import Path

import heads
import pytest
import timm
import torch
from loop import weight_sum
from photographs import write_noise
from torch import nn


def test_the_share_of_tokens_of_attention_made_by_hand() -> None:
    one_token = torch.eye(10)
    alike = torch.full((10, 10), 0.1)
    last = torch.tensor([[0.05, 0.5, 0.0, 0.05, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0]]).expand(10, 10)
    first_half = torch.cat([one_token[:5], alike[:5]])  # half of the queries each
    got = heads.token_share(torch.stack([one_token, alike, last, first_half]))
    assert got.tolist() == pytest.approx([0.1, 0.9, 0.2, 0.5])
    assert heads.token_share(alike, mass=0.31) == pytest.approx(0.4)


def test_groups_change_at_their_limits() -> None:
    assert [heads.group(share) for share in (0.01, 0.5, 0.501, 0.799, 0.8, 1.0)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(('name', 'tokens'), [('test_vit', 101), ('test_ait', 64)])
def test_heads_without_preference_need_nine_tenths_of_the_tokens_and_sharp_ones_a_single_one(
    name: str, tokens: int
) -> None:
    model = timm.create_model(name).train()
    first, *_, last = model.blocks
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()  # all logits are 0
        # the first head of the last layer: equal queries and keys, far from each other
        width = last.attn.head_dim
        start = model.embed_dim  # of the keys, after the queries
        weight = 100 * torch.randn(width, model.embed_dim)
        last.attn.qkv.weight[:width], last.attn.qkv.weight[start : start + width] = weight, weight
    size = model.patch_embed.img_size
    before = [buffer.clone() for buffer in model.buffers()]
    batches = [torch.randn(2, 3, *size), torch.randn(1, 3, *size)]
    shares = heads.head_shares(model, batches)
    assert list(shares) == [f'blocks.{i}.attn' for i in range(len(model.blocks))]
    even = -(-9 * tokens // 10) / tokens
    for layer in list(shares.values())[:-1]:
        assert layer.tolist() == pytest.approx([even] * first.attn.num_heads)
    sharp, *others = shares[f'blocks.{len(model.blocks) - 1}.attn'].tolist()
    assert sharp < 0.1
    assert others == pytest.approx([even] * (first.attn.num_heads - 1))
    assert model.training
    assert first.attn.fused_attn
    assert all(map(torch.equal, before, model.buffers()))  # looking writes no memory


def test_a_smaller_last_batch_counts_by_its_images() -> None:
    model, images = timm.create_model('test_ait'), torch.randn(3, 3, 32, 32)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)  # or every image needs all tokens
    whole, parts = (heads.head_shares(model, batches) for batches in ([images], [images[:2], images[2:]]))
    for name, share in whole.items():
        torch.testing.assert_close(parts[name], share)


def test_heads_are_those_of_the_own_weights_or_of_the_checkpoint_on_so_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_noise(tmp_path / 'images', 'ab', 3)
    torch.save(timm.create_model('test_ait', num_classes=3).state_dict(), tmp_path / 'three.pth')
    seen: list[tuple[float, int]] = []

    def note(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((weight_sum(model), sum(map(len, batches))))
        return {'attn': torch.tensor([0.5])}

    monkeypatch.setattr(heads, 'head_shares', note)
    of_file = ['--checkpoint', str(tmp_path / 'three.pth'), '--num-classes', '3']
    for i, words in enumerate(([], of_file)):
        common = [str(tmp_path / 'images'), '--model', 'test_ait', '--images', '4', '--batch-size', '3']
        heads.main([*common, *words, '--output', str(tmp_path / f'{i}.png')])
    own, mine = timm.create_model('test_ait', pretrained=True), timm.create_model('test_ait', num_classes=3)
    mine.load_state_dict(torch.load(tmp_path / 'three.pth'))
    assert seen == [(weight_sum(own), 4), (weight_sum(mine), 4)]


def test_attention_within_windows_counts_the_tokens_of_a_window() -> None:
    sizes = dict(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    model = timm.create_model('swin_tiny_patch4_window7_224', **sizes)
    with torch.no_grad():
        for layer in model.layers:
            layer.blocks[0].attn.qkv.weight.zero_()  # all logits are 0
            layer.blocks[0].attn.relative_position_bias_table.zero_()
    shares = heads.head_shares(model, [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)])
    for layer in shares.values():
        assert layer.tolist() == pytest.approx([15 / 16] * 2)  # of 16 tokens


class FactorisedAttention(nn.Module):
    """Attention that never is a matrix of queries and tokens for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn_drop(x.flatten(2).softmax(dim=-1))


def test_a_model_without_attention_or_an_empty_folder_is_named() -> None:
    with pytest.raises(ValueError, match=r'expected attention of shape \(B, heads, queries, tokens\) at attn_drop'):
        heads.head_shares(FactorisedAttention(), [torch.randn(1, 3, 8, 8)])
    with pytest.raises(ValueError, match='expected a model with attention'):
        heads.head_shares(nn.Linear(2, 3), [])
    with pytest.raises(ValueError, match='expected at least one image'):
        heads.head_shares(timm.create_model('test_ait'), [])


def test_an_unknown_model_or_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (['--output', 'heads.json'], '--output must end with one of '),
        (['--model', 'no_such'], 'timm has no model no_such'),
        (['--model', 'test_ait'], 'No such file'),
        (['--model', 'test_ait', '--checkpoint', 'gone'], 'test_ait cannot load gone: there is no such file'),
        (['--model', 'test_ait', '--checkpoint', __file__], f'test_ait cannot load {__file__}: '),
        (['--model', 'test_ait', '--device', 'foo'], 'PyTorch cannot compute on --device foo here; take cpu'),
    ):
        with pytest.raises(SystemExit):
            heads.main([str(tmp_path / 'nowhere'), '--output', str(tmp_path / 'heads.png'), *arguments])
        assert message in capsys.readouterr().err


def test_the_published_counts_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(heads.__file__).parent
    for path in sorted((folder / 'results' / 'heads').glob('*.json')):
        shares = json.loads(path.read_text())['shares']
        heads.print_table({name: torch.tensor(layer) for name, layer in shares.items()})
        *_, last = capsys.readouterr().out.splitlines()
        assert last.replace('| all |', f'| {path.stem} |') in (folder / 'PAPER.md').read_text()


def test_it_prints_a_row_a_layer_and_draws_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(tmp_path, 'ab', 3)
    picture = tmp_path / 'heads.png'
    heads.main([str(tmp_path), '--model', 'test_ait', '--images', '5', '--batch-size', '2', '--output', str(picture)])
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    model = timm.create_model('test_ait')
    assert [row[0] for row in rows] == [*(f'blocks.{i}.attn' for i in range(len(model.blocks))), 'all']
    assert all(sum(map(int, row[1:4])) == 4 for row in rows[:-1])
    assert [int(x) for x in rows[-1][1:4]] == [sum(int(row[i]) for row in rows[:-1]) for i in (1, 2, 3)]
    assert picture.read_bytes().startswith(b'\x89PNG')
    record = json.loads(picture.with_suffix('.json').read_text())
    assert list(record['shares']) == [row[0] for row in rows[:-1]]
    assert {len(shares) for shares in record['shares'].values()} == {4}
    assert record['arguments']['model'] == 'test_ait'
    with pytest.raises(SystemExit, match='2'):
        heads.main([str(tmp_path), '--model', 'test_vit', '--output', str(picture)])
    assert 'heads.json holds what was measured with other arguments; keep it' in capsys.readouterr().err
    assert json.loads(picture.with_suffix('.json').read_text()) == record
