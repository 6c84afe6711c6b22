"""The baselines compute the equations of their papers."""

import math
from typing import Any

import baselines
import mixers
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_ait import HopfieldRetrieval, NormalizedPatchEmbed
from timm_ait.selection import Selection, load_balance_loss

B, N, M, E, D, H = 2, 7, 5, 33, 22, 11
TINY: dict[str, Any] = dict(img_size=9, patch_size=3, num_classes=13, embed_dim=22, num_heads=11, depth=2)
SLOTS: dict[str, Any] = dict(coordination=dict(slot_dim=11), coordination_d=dict(num_slots=5, slot_dim=11, top_k=7))
SLOTS |= dict(coordination_h=SLOTS['coordination'], coordination_dh=SLOTS['coordination_d'])


def tiny(name: str, **changes: Any) -> baselines.Baseline:
    torch.manual_seed(0)
    return baselines.create(name, **{**TINY, **SLOTS.get(name, {}), **changes})


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def multihead(attn: mixers.CrossAttention, x: Tensor, y: Tensor) -> Tensor:
    """One image, one head after the other."""
    heads, d = [], x.shape[-1] // attn.num_heads
    for i in range(0, x.shape[-1], d):
        q, k, v = (linear(z)[:, i : i + d] for linear, z in ((attn.q, x), (attn.k, y), (attn.v, y)))
        heads.append((q @ k.t() / math.sqrt(d)).softmax(dim=-1) @ v)
    return attn.proj(torch.cat(heads, dim=-1))


def feed_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.fc2(mlp.fc1(x).relu())


def mab(block: mixers.AttentionBlock, x: Tensor, y: Tensor) -> Tensor:
    h = block.norm1(x + multihead(block.attn, x, y))
    return block.norm2(h + feed_forward(block.mlp, h))


def test_cross_attention_is_that_of_each_head_alone() -> None:
    attn, x, y = mixers.CrossAttention(E, D, H), torch.randn(B, M, E), torch.randn(B, N, D)
    torch.testing.assert_close(attn(x, y), torch.stack([multihead(attn, *pair) for pair in zip(x, y, strict=True)]))


def test_a_cross_attention_of_one_channel_by_hand() -> None:
    attn = mixers.CrossAttention(1, 1, 1)
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            parameter.fill_(float('weight' in name))
    # query 1, keys 0 and ln 3: shares 1/4 and 3/4
    got = attn(torch.ones(1, 1, 1), torch.tensor([[[0.0], [math.log(3)]]]))
    assert got.item() == pytest.approx(0.75 * math.log(3))


def test_set_transformer_blocks_are_equations_6_to_10() -> None:
    block, x = mixers.InducedBlock(E, H, 2.0, M), torch.randn(B, N, E)
    expected = torch.stack([mab(block.spread, one, mab(block.gather, block.points, one)) for one in x])
    torch.testing.assert_close(block(x), expected)


def write_by_hand(write: mixers.GatedWrite, x: Tensor, slots: Tensor) -> Tensor:
    """One image: only the k tokens that a slot scores highest count, then the gates."""
    d, message = slots.shape[-1] // write.num_heads, torch.zeros_like(slots)
    for i in range(0, slots.shape[-1], d):
        q, k, v = (linear(z)[:, i : i + d] for linear, z in ((write.q, slots), (write.k, x), (write.v, x)))
        for m in range(len(slots)):
            logits = (k @ q[m] / math.sqrt(d)).tolist()
            best = sorted(range(len(x)), key=lambda n: -logits[n])[: write.top_k]
            total = sum(math.exp(logits[n]) for n in best)
            for n in best:
                message[m, i : i + d] += math.exp(logits[n]) / total * v[n]
    new = write.norm1(slots + message)
    new = write.norm2(new + feed_forward(write.mlp, new))
    context = sum(write.context(token).clamp(min=0) for token in x) / len(x) + slots.tanh()
    gates = 1 / (1 + torch.exp(-write.gates(context)))
    D = slots.shape[-1]
    return gates[:, :D] * new.tanh() + gates[:, D:] * slots


@pytest.mark.parametrize('top_k', [1, 3, 99])
def test_the_write_of_coordination_is_top_k_attention_and_two_gates(top_k: int) -> None:
    write, x, slots = mixers.GatedWrite(E, D, H, top_k), torch.randn(B, N, E), torch.randn(B, M, D)
    with torch.no_grad():
        got, shares, selected = write(x, slots)
        expected = torch.stack([write_by_hand(write, *pair) for pair in zip(x, slots, strict=True)])
    torch.testing.assert_close(got, expected)
    assert shares.shape == selected.shape == (B, H, M, min(top_k, N))


def test_forget_gates_start_open_and_slots_stay_where_no_token_enters() -> None:
    write = mixers.GatedWrite(E, D, H, 3)
    with torch.no_grad():
        write.gates.weight.zero_()
        got, *_ = write(torch.randn(B, N, E), slots := 1e6 * torch.randn(B, M, D))
    torch.testing.assert_close(got / slots, torch.full_like(slots, 1 / (1 + math.exp(-1))), atol=1e-3, rtol=0)


def test_coordination_writes_then_reads_and_slots_go_from_layer_to_layer() -> None:
    mixer, x = mixers.Coordination(E, 3, H, num_slots=M, slot_dim=D, top_k=3), torch.randn(B, N, E)
    got, balance = mixer(x)
    slots = torch.eye(M, D).expand(B, -1, -1)
    for block in mixer.blocks:
        h = block.norm1(x)
        slots = torch.stack([write_by_hand(block.write, *pair) for pair in zip(h, slots, strict=True)])
        x = x + torch.stack([multihead(block.read, *pair) for pair in zip(h, slots, strict=True)])
        x = x + feed_forward(block.mlp, block.norm2(x))
    torch.testing.assert_close(got, x)
    assert balance == 0


def test_across_the_batch_tokens_of_all_images_compete_for_a_memory_that_only_training_writes() -> None:
    mixer = mixers.Coordination(E, 1, H, num_slots=M, slot_dim=D, top_k=3, across_batch=True)
    (block,), x = mixer.blocks, torch.randn(B, N, E)
    h = block.norm1(x)
    memory = write_by_hand(block.write, h.flatten(0, 1), torch.eye(M, D))
    x1 = x + torch.stack([multihead(block.read, one, memory) for one in h])
    torch.testing.assert_close(mixer(x)[0], x1 + feed_forward(block.mlp, block.norm2(x1)))
    torch.testing.assert_close(block.memory, memory.detach())
    both = mixer.eval()(x)[0]
    torch.testing.assert_close(mixer(x[1:])[0], both[1:])  # whatever else is in the batch
    torch.testing.assert_close(block.memory, memory.detach())


def test_hopfield_coordination_reads_attractors() -> None:
    mixer = mixers.Coordination(E, 1, H, num_slots=M, slot_dim=D, across_batch=True, hopfield=True).eval()
    (block,), x = mixer.blocks, torch.randn(B, N, E)
    attractors = block.memory @ block.read.linear_transform.weight.t() + block.read.linear_transform.bias
    x1 = HopfieldRetrieval()(x, block.norm1(x), attractors)
    torch.testing.assert_close(mixer(x)[0], x1 + feed_forward(block.mlp, block.norm2(x1)))


@pytest.mark.parametrize(
    ('name', 'is_low_rank', 'is_hopfield'),
    [('', False, False), ('_d', True, False), ('_h', False, True), ('_dh', True, True)],
)
def test_the_variants_of_coordination_add_what_their_letters_say(
    name: str, is_low_rank: bool, is_hopfield: bool
) -> None:
    mixer = baselines.create(f'coordination{name}').mixer
    (block, *_) = mixer.blocks
    assert mixer.first_slots.shape == ((32, 32) if is_low_rank else (8, 256))
    assert hasattr(block.read, 'linear_transform') == is_hopfield
    assert (block.memory is not None) == (block.balance_weight == 0.01) == is_low_rank
    assert (block.write.top_k, block.write.q.in_features) == ((512, 32) if is_low_rank else (20, 256))


@pytest.mark.parametrize('across_batch', [False, True])
def test_the_balance_loss_is_that_of_the_paper_and_reaches_the_gradient_through_the_logits(across_batch: bool) -> None:
    options = dict(slot_dim=11, num_slots=5, top_k=3, across_batch=across_batch, depth=1)
    model, twin, other = (tiny('coordination_d', **options, balance_weight=weight) for weight in (0.3, 0.0, 0.3))
    images, labels = torch.randn(B, 3, 9, 9), torch.tensor([3, 5])
    F.cross_entropy(model(images), labels).backward()

    (block,), h = twin.mixer.blocks, twin.stem(images)
    h = block.norm1(h).flatten(0, 1)[None] if across_batch else block.norm1(h)
    _, shares, selected = block.write(h, torch.eye(5, 11).expand(len(h), -1, -1))
    balance = (
        0.3
        * sum(
            load_balance_loss(Selection(*pair, torch.empty(0)), h.shape[1])
            for pair in zip(shares, selected, strict=True)
        )
        / len(h)
    )
    (F.cross_entropy(twin(images), labels) + balance).backward()
    for one, same in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, same.grad)
    torch.testing.assert_close(other.mixer(other.stem(images))[1], balance)


def test_perceiver_latents_read_tokens_then_each_other_with_shared_weights_from_the_second_layer_on() -> None:
    mixer, x = mixers.Perceiver(E, 3, H, num_slots=M, latent_depth=2), torch.randn(B, N, E)
    latents = mixer.latents.expand(B, -1, -1)
    for layer in (mixer.layers[0], mixer.layers[1], mixer.layers[1]):
        q, kv = layer.norm_q(latents), layer.norm_kv(x)
        latents = latents + torch.stack([multihead(layer.attn, *pair) for pair in zip(q, kv, strict=True)])
        latents = latents + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(latents))))
        for block in layer.blocks:
            latents = block(latents)
    torch.testing.assert_close(mixer(x)[0], latents)
    assert (mixer.num_outputs(N), len(mixer.layers)) == (M, 2)


@pytest.mark.parametrize(('head', 'width'), [('flatten', N * E), ('avg', E)])
def test_the_head_is_a_norm_and_a_classifier_over_all_tokens_or_their_mean(head: str, width: int) -> None:
    module, x = baselines.Head(head, N, E, 13), torch.randn(B, N, E)
    read = torch.cat([x[:, n] for n in range(N)], dim=-1) if head == 'flatten' else sum(x.unbind(1)) / N
    assert read.shape == (B, width)
    expected = (read - read.mean(-1, keepdim=True)) / (read.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(module(x), expected @ module.fc.weight.t() + module.fc.bias)


def test_the_vit_is_the_one_of_timm() -> None:
    model = tiny('vit_small')
    vit = VisionTransformer(
        img_size=9,
        patch_size=3,
        embed_dim=22,
        depth=2,
        num_heads=11,
        qkv_bias=False,
        class_token=False,
        pos_embed='none',
        final_norm=False,
        num_classes=0,
        global_pool='',
        embed_layer=NormalizedPatchEmbed,
        norm_layer=nn.LayerNorm,
    )
    weights = {**model.stem.state_dict(), **model.mixer.state_dict()}
    assert not vit.load_state_dict(weights, strict=False).missing_keys
    images = torch.randn(B, 3, 9, 9)
    torch.testing.assert_close(model(images), model.head(vit(images)))


@pytest.mark.parametrize('question_dim', [0, 18])
@pytest.mark.parametrize('name', baselines.CATALOGUE)
def test_gradients_reach_every_parameter(name: str, question_dim: int) -> None:
    for head in baselines.HEADS:
        model = tiny(name, question_dim=question_dim, pos_embed=True, head=head)
        inputs = [torch.randn(B, 3, 9, 9), *([torch.randn(B, 18)] if question_dim else [])]
        logits = model(*inputs)
        assert logits.shape == (B, 13)
        F.cross_entropy(logits, torch.tensor([2, 11])).backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().max() > 1e-9, parameter_name  # more than rounding


def test_the_stem_adds_positions_to_patches_and_puts_the_question_before_them() -> None:
    stem = baselines.Stem(9, 3, 3, E, pos_embed=True, question_dim=18)
    images, question = torch.randn(B, 3, 9, 9), torch.randn(B, 18)
    tokens = stem(images, question)
    assert tokens.shape == (B, 1 + 9, E)
    torch.testing.assert_close(tokens[:, 1:], stem.patch_embed(images) + stem.pos_embed)
    before, linear, after = stem.question_embed
    torch.testing.assert_close(tokens[:, 0], after(linear(before(question))))
    for wrong in (None, question[:, :17]):
        with pytest.raises(ValueError, match='expected questions of 18 bits'):
            stem(images, wrong)
    with pytest.raises(ValueError, match='expected questions of 0 bits'):
        tiny('vit_small')(images, question)


@pytest.mark.parametrize('name', baselines.CATALOGUE)
def test_without_positions_and_flattening_the_order_of_the_patches_does_not_matter(name: str) -> None:
    images = torch.randn(B, 3, 9, 9)
    turned = images.unflatten(2, (3, 3)).flip(2).flatten(2, 3)  # rows of patches, the other way round
    model = tiny(name, head='avg').eval()
    torch.testing.assert_close(model(images), model(turned))
    model = tiny(name, head='avg', pos_embed=True).eval()
    assert (model(images) - model(turned)).abs().max() > 1e-6


def test_a_wrong_name_head_or_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a name out of \['vit_small', .*, got 'vit'"):
        baselines.create('vit')
    with pytest.raises(ValueError, match=r"expected a head out of .*'avg'.*, got 'mean'"):
        tiny('perceiver', head='mean')
    with pytest.raises(ValueError, match='expected a width that num_heads=3 divides, got 22'):
        tiny('set_transformer', num_heads=3)
    with pytest.raises(ValueError, match='expected a width that num_heads=11 divides, got 12'):
        tiny('coordination', slot_dim=12)


def test_the_table_has_the_parameters_of_all_models_beside_those_of_the_paper(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float32)
    make, create = baselines.create, baselines.timm.create_model

    def on_meta(function: Any) -> Any:  # parameters without memory
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.device('meta'):
                return function(*args, **kwargs)

        return run

    monkeypatch.setattr(baselines, 'create', on_meta(make))
    monkeypatch.setattr(baselines.timm, 'create_model', on_meta(create))
    baselines.main([])
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [*baselines.CATALOGUE, *baselines.AIT]
    sizes = {name: row for name, *row in rows}
    assert sizes['vit_base'][:4] == ['12', '768', '12', '']
    assert sizes['coordination_d'][:4] == ['4', '256', '4', '32 x 32']
    assert sizes['set_transformer'][:4] == ['4', '256', '4', '32 x 256']
    assert sizes['ait_medium_patch4_32'][:4] == ['6', '768', '12', '32 x 32']
    for *_, parameters, published in rows:
        assert not published or float(parameters) == pytest.approx(float(published), abs=0.16)
    assert sum(bool(row[-1]) for row in rows) == 5
