"""Each ablation changes what its name says, and nothing else."""

import math
from typing import Any

import ablations
import baselines
import loop
import pytest
import torch
import torch.nn.functional as F
from models import memories
from torch import Tensor, nn
from variants import NoMemory

from timm_ait import GlobalWorkspace

B, SIDE, PATCH, N, E, CLASSES = 3, 9, 3, 9, 22, 5
TINY: dict[str, Any] = dict(
    img_size=SIDE, patch_size=PATCH, num_classes=CLASSES, embed_dim=E, num_heads=2, depth=2, mlp_ratio=2.0
)
SLOTS: dict[str, Any] = dict(num_slots=7, slot_dim=13, write_heads=2)


def tiny(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    fixed = ablations.ABLATIONS[name].args if name in ablations.ABLATIONS else {'slot_dim': 0, 'write_heads': 0}
    slots = {key: value for key, value in SLOTS.items() if key not in fixed}
    return ablations.create(name, **{**TINY, **slots, **changes}).train()


def images(seed: int = 0) -> Tensor:
    return torch.randn(B, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def train_step(model: nn.Module, *others: Tensor) -> None:
    F.cross_entropy(model(images(), *others), torch.arange(B)).backward()


def memory_moves(model: Any) -> bool:
    before = memories(model)
    train_step(model)
    return not any(map(torch.equal, memories(model), before))


@pytest.mark.parametrize('head', ablations.HEADS)
@pytest.mark.parametrize('question_dim', [0, 11])
@pytest.mark.parametrize('name', ablations.NAMES)
def test_every_parameter_that_counts_gets_a_gradient(name: str, question_dim: int, head: str) -> None:
    model = tiny(name, question_dim=question_dim, head=head, pos_embed=True)
    question = [torch.randn(B, question_dim)] if question_dim else []
    train_step(model, *question)
    for parameter_name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None), parameter_name
        assert p.grad is None or p.grad.abs().max() > 0, parameter_name
    assert model.eval()(images(), *question).shape == (B, CLASSES)


@pytest.mark.parametrize('head', ablations.HEADS)
@pytest.mark.parametrize('question_dim', [0, 11])
def test_stem_and_head_are_those_of_the_baselines(question_dim: int, head: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = tiny('ait', question_dim=question_dim, head=head, pos_embed=True, depth=0).eval()
        shared = {**TINY, 'question_dim': question_dim, 'head': head, 'pos_embed': True, 'depth': 0}
        baseline = baselines.create('vit_small', **shared).eval()
        stem = {name: value for name, value in baseline.stem.state_dict().items() if name != 'pos_embed'}
        names = {**{f'stem.{key}': key for key in stem}, 'stem.pos_embed': 'pos_embed'}
        names |= {f'head.norm.{leaf}': f'fc_norm.{leaf}' for leaf in ('weight', 'bias')}
        names |= {f'head.fc.{leaf}': f'head.{leaf}' for leaf in ('weight', 'bias')}
        state = {theirs: model.state_dict()[ours] for theirs, ours in names.items()}
        assert model.state_dict().keys() == set(names.values())
        state['stem.pos_embed'] = state['stem.pos_embed'][0]
        baseline.load_state_dict(state)
        x = [images().double(), *([torch.randn(B, 11)] if question_dim else [])]
        torch.testing.assert_close(model(*x), baseline(*x))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', ablations.ABLATIONS)
def test_the_memory_moves_in_training_unless_it_is_frozen_or_absent(name: str) -> None:
    assert memory_moves(tiny(name)) == (not any(part in name for part in ('_frozen', '_no_memory', '_additive')))


def test_a_detached_write_gets_no_gradient_of_the_task() -> None:
    for name, is_trained in {'ait': True, 'ait_detached': False}.items():
        model = tiny(name, balance_weight=0.0)
        train_step(model)
        layer = model.blocks[0].mlp
        for part in (layer.query, layer.key, layer.value, layer.proj, layer.write_norm):
            assert part.weight.requires_grad == (part.weight.grad is not None) == is_trained


def test_without_bottleneck_every_slot_reads_every_token() -> None:
    for name, count in {'ait': 4, 'ait_no_bottleneck': B * N}.items():
        layer = tiny(name, **({'bottleneck': 4} if name == 'ait' else {})).blocks[0].mlp
        selection = layer.select(layer.memory, torch.randn(B * N, E))
        assert (selection.gates > 0).sum(dim=-1).unique().tolist() == [count]


@pytest.mark.parametrize('name', ablations.ABLATIONS)
def test_in_evaluation_only_self_attention_and_a_memory_of_the_image_mix_tokens(name: str) -> None:
    mixes = 'no_attention' not in name or any(part in name for part in ('_image', '_additive'))
    model = tiny(name).eval()
    changed = images()
    changed[:, :, :PATCH, :PATCH] *= -1  # the first patch
    difference = (model.forward_features(changed) - model.forward_features(images())).abs().amax(dim=(0, 2))
    assert difference[0] > 1e-3
    assert (difference[1:] > 1e-5).all() if mixes else (difference[1:] < 1e-6).all()


def test_the_logits_of_additive_vary_ten_times_as_much_as_those_of_image() -> None:
    spread = {}
    for name in ('ait_image', 'ait_image_logits', 'ait_additive', 'ait_additive_sum'):
        layer = tiny(name, embed_dim=128, slot_dim=32, num_slots=32, write_heads=8).blocks[0].mlp
        h = F.layer_norm(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), (128,))
        logits = layer.fold_queries(layer.memory) @ h.t()
        spread[name] = logits.std().item()
    assert spread['ait_image'] == pytest.approx(spread['ait_additive_sum'], rel=0.1)
    assert spread['ait_image_logits'] == pytest.approx(spread['ait_additive'], rel=0.1)
    assert spread['ait_additive'] == pytest.approx(1, rel=0.2)
    assert spread['ait_additive'] > 10 * spread['ait_image']


@pytest.mark.parametrize('name', ['ait_image_competing', 'ait_additive_competing'])
def test_slots_that_compete_share_each_token_among_them(name: str) -> None:
    layer, h = tiny(name).blocks[0].mlp.double(), torch.randn(B, N, E).double()
    shares = (layer.fold_queries(layer.memory) @ h[1].t()).softmax(dim=1)  # (S, M, N), over the slots
    layer.bottleneck = 4
    gates = layer.select(layer.memory, h).gates[1, 0, 2]
    largest, tokens = shares[0, 2].topk(4)
    torch.testing.assert_close(gates[tokens], largest / largest.sum())
    assert gates.count_nonzero() == 4


def test_cosines_score_tokens_whatever_their_length_with_a_scale_for_each_head() -> None:
    layer, h = tiny('ait_additive_cosine').blocks[0].mlp.double(), torch.randn(B, N, E).double()
    assert layer.log_scale.exp().tolist() == pytest.approx([E**0.5] * 2)
    with torch.no_grad():
        layer.log_scale[0] = math.log(3)
    layer.bottleneck = 4
    query, h[1] = layer.fold_queries(layer.memory)[0, 2], 5 * h[1]
    logits, tokens = (3 * F.cosine_similarity(query, h[1], dim=-1)).topk(4)
    gates = layer.select(layer.memory, h).gates[1, 0, 2]
    torch.testing.assert_close(gates[tokens], logits.softmax(dim=0))
    assert gates.count_nonzero() == 4


def test_a_loss_parts_the_attractors_beside_the_balance_loss() -> None:
    layer, h = tiny('ait_additive_separate').blocks[0].mlp.double(), torch.randn(B, N, E).double()
    write, plain = layer.write(h, layer.memory), GlobalWorkspace.write(layer, h, layer.memory)
    attractors = layer.linear_transform(plain.memory)
    cosines = F.cosine_similarity(attractors.unsqueeze(1), attractors.unsqueeze(2), dim=-1)  # (B, M, M)
    above = cosines.square().triu(1).sum(dim=(1, 2)) / (7 * 6 / 2)
    torch.testing.assert_close(write.balance_loss - plain.balance_loss, 0.1 * above.mean())
    layer.eval()
    assert layer.write(h, layer.memory).balance_loss == 0


@pytest.mark.parametrize(
    ('name', 'values'),
    {
        'ait': (1, 32, 32, 512, 0.9, 1),
        'ait_beta_4': (4, 32, 32, 512, 0.9, 1),
        'ait_slots_128': (1, 128, 32, 512, 0.9, 1),
        'ait_slot_dim_8': (1, 32, 8, 512, 0.9, 1),
        'ait_bottleneck_64': (1, 32, 32, 64, 0.9, 1),
        'ait_decay_half': (1, 32, 32, 512, 0.5, 1),
        'ait_steps_3': (1, 32, 32, 512, 0.9, 3),
    }.items(),
)
def test_rows_of_other_sizes_differ_in_one_number(name: str, values: tuple[float, ...]) -> None:
    layer = ablations.create(name, **TINY).blocks[0].mlp
    sizes = layer.num_slots, layer.slot_dim, layer.bottleneck
    assert (layer.beta, *sizes, layer.memory_decay, layer.retrieval_steps) == values


def test_in_training_a_memory_of_the_batch_alone_mixes_images() -> None:
    changed = images()
    changed[0] *= -1
    for name, mixes in {'ait_no_attention': True, 'ait_no_memory': False, 'ait_no_attention_image': False}.items():
        first, second = (tiny(name).forward_features(x)[1:] for x in (images(), changed))  # of the other images
        assert ((first - second).abs().max() > 1e-6) == mixes, name


def test_without_memory_a_norm_on_the_mlp_remains() -> None:
    layer, x = tiny('ait_no_memory').blocks[0].mlp, torch.randn(B, N, E)
    by_hand = F.layer_norm(layer.fc2(F.gelu(layer.fc1(x))), (E,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(x), by_hand)
    beside = GlobalWorkspace(E, retrieval_scale=0.0)
    control = NoMemory(E, retrieval_scale=0.0, write_mode='never')
    control.load_state_dict(beside.state_dict())
    torch.testing.assert_close(control(x), beside(x))  # a retrieval with the scale 0 adds nothing
    assert not any(p.requires_grad for p in control.norm.parameters()), 'nothing reads it'


def test_cross_attention_reads_the_slots_through_projections() -> None:
    layer, x = tiny('ait_cross_attention').eval().blocks[0].mlp, torch.randn(B, N, E)
    h = layer.norm(layer.feed_forward(x))
    slots = layer.memory / layer.memory.norm(dim=-1, keepdim=True)
    attention = layer.cross_attention
    q, k, v = attention.q(h), attention.k(slots), attention.v(slots)
    heads = [slice(0, E // 2), slice(E // 2, E)]
    read = [(q[..., c] @ k[:, c].t() / (E // 2) ** 0.5).softmax(dim=-1) @ v[:, c] for c in heads]
    torch.testing.assert_close(layer(x), h + attention.proj(torch.cat(read, dim=-1)))


def test_without_balance_loss_there_is_none() -> None:
    for name, has_loss in {'ait': True, 'ait_no_balance': False}.items():
        model = tiny(name)
        train_step(model)
        assert (model.balance_loss() > 0) == has_loss


def test_the_memory_is_reset_at_the_start_of_every_epoch_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model, norms = tiny('ait_reset'), []
    train = loop.Run.train

    def watching(run: loop.Run, batch: list[Tensor]) -> None:
        norms.append(model.blocks[0].mlp.memory.norm(dim=-1))
        train(run, batch)

    monkeypatch.setattr(loop.Run, 'train', watching)
    data = torch.randint(256, (6, 3, SIDE, SIDE), dtype=torch.uint8), torch.arange(6) % CLASSES
    loop.fit(model, data, loop.Settings(lr=1e-3, epochs=2, batch_size=3))
    is_new = [not torch.allclose(norm, torch.ones(7)) for norm in norms]  # a written slot has the length 1
    assert is_new == [True, False, True, False]
    assert not torch.allclose(norms[0], norms[2])


def test_the_frozen_memory_is_orthogonal_and_only_its_linear_transform_is_trained() -> None:
    model = tiny('ait_frozen')
    train_step(model)
    layer = model.blocks[0].mlp
    torch.testing.assert_close(layer.memory @ layer.memory.t(), torch.eye(7))
    assert layer.linear_transform.weight.grad.abs().max() > 0
    assert not any(p.requires_grad for p in (layer.query.weight, layer.proj.weight, layer.write_norm.weight))


def test_the_memory_of_each_image_among_the_ablations_forgets_half() -> None:
    for name in ('ait_image', 'ait_image_logits', 'ait_no_attention_image'):
        layer = ablations.create(name, embed_dim=32, num_heads=1, depth=1).blocks[0].mlp
        assert (layer.write_rule, layer.write_scope, layer.memory_decay) == ('distinct', 'image', 0.5)


def test_an_ait_starts_from_weights_as_large_as_those_of_the_models_beside_it() -> None:
    sizes: dict[str, Any] = dict(embed_dim=128, num_heads=2, depth=1)
    ait, vit = ablations.create('ait', **sizes).blocks[0], baselines.create('vit_small', **sizes).mixer.blocks[0]
    for name in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'):
        ours, theirs = (block.get_submodule(name).weight.std().item() for block in (ait, vit))
        assert ours == pytest.approx(theirs, rel=0.05), name


def test_registers_are_tokens_that_all_others_attend_to_and_the_head_does_not_read() -> None:
    model = tiny(ablations.REGISTERS).eval()
    assert model.mixer.registers.shape == (7, E)
    x = model.stem(images())
    tokens, balance = model.mixer(x)
    assert tokens.shape == x.shape
    assert balance == 0
    with torch.no_grad():
        model.mixer.registers.zero_()
    assert ((model.mixer(x)[0] - tokens).abs().amax(dim=(0, 2)) > 1e-6).all()
    assert ablations.create(ablations.REGISTERS, **TINY).mixer.registers.shape == (32, E)


def test_parameters_beside_each_other_by_hand() -> None:
    counts = {name: ablations.count_parameters(tiny(name)) for name in ablations.NAMES}
    S, M, D, depth = 2, 7, 13, 2
    write = D * S * D + 2 * E * S * D + S * D * D + 2 * D
    transform, attention = D * E + E, 2 * E + 3 * E * E + E * E + E
    cross = (E * E + E) + D * E + (D * E + E) + (E * E + E)
    assert counts['ait'] - counts['ait_no_memory'] == depth * (write + transform)
    assert counts['ait'] - counts['ait_no_attention'] == depth * attention
    assert counts['ait'] - counts['ait_frozen'] == depth * write
    assert counts['ait_cross_attention'] - counts['ait'] == depth * (cross - transform)
    assert counts['ait'] - counts['ait_detached'] == depth * (E * S * D + S * D * D + 2 * D)
    assert counts['ait_distinct'] - counts['ait'] == counts['ait_image'] - counts['ait'] == depth * E  # a gain
    assert counts['ait'] == counts['ait_no_bottleneck'] == counts['ait_no_balance'] == counts['ait_reset']
    assert counts['vit_registers'] == counts['ait_no_memory'] - depth * 2 * E + M * E  # no norm on the MLP


def test_the_table_lists_all_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, 'SIZES', dict(embed_dim=16, depth=1, num_heads=1))
    ablations.main([])
    rows = [line.split(' | ')[0].strip('| ') for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == list(ablations.NAMES)


def test_the_control_without_memory_differs_in_the_memory_alone() -> None:
    for name in ablations.NAMES:
        control = ablations.without_memory(name)
        if name == ablations.REGISTERS or name.endswith('_no_memory'):
            assert control is None
        else:
            assert ablations.ABLATIONS[control].layer is NoMemory
            assert ('no_attention' in name) == ('no_attention' in control)


def test_a_wrong_name_or_head_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a name out of .*'ait_reset'.*, got 'ait_base'"):
        ablations.create('ait_base')
    with pytest.raises(ValueError, match=r"expected a head out of .*, got 'pma'"):
        tiny('ait', head='pma')
    with pytest.raises(TypeError, match='slots'):
        tiny('ait', slots=3)
    with pytest.raises(ValueError, match='ait_slots_128 sets num_slots itself; leave it out'):
        tiny('ait_slots_128', num_slots=7)


def test_every_ablation_is_a_workspace_of_the_package() -> None:
    assert all(issubclass(ablation.layer, GlobalWorkspace) for ablation in ablations.ABLATIONS.values())
