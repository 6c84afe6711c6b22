"""write_rule='distinct' and write_scope='image': slots that stay apart, and a copy of the memory for every image."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import memories
from photographs import needs_photographs, photographs
from timm.utils import reparameterize_model
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import pil_to_tensor

from timm_ait import AssociativeTransformer, GlobalWorkspace, memory_report
from timm_ait.layers import orthogonalise

B, N, E = 3, 11, 17
M, D, S, K = 7, 13, 3, 5
CLASSES = 5
VARIANTS: dict[str, dict[str, Any]] = {
    'distinct': dict(write_rule='distinct'),
    'image': dict(write_scope='image'),
    'image, few tokens': dict(write_scope='image', bottleneck=K),
    'distinct image': dict(write_rule='distinct', write_scope='image', bottleneck=K),
    'additive image': dict(write_rule='additive', write_scope='image', bottleneck=K),
    'competing image': dict(write_rule='competing', write_scope='image', bottleneck=K),
}
IMAGE = {name: kwargs for name, kwargs in VARIANTS.items() if 'write_scope' in kwargs}
variants = partial(pytest.mark.parametrize, 'kwargs')


def make_layer(**kwargs: Any) -> GlobalWorkspace:
    torch.manual_seed(1)
    sizes = dict(in_features=E, hidden_features=19, num_slots=M, slot_dim=D, write_heads=S, bottleneck=512)
    layer = GlobalWorkspace(**dict(sizes, **kwargs)).train()
    layer.auto_balance = False
    return layer


def make_model(**kwargs: Any) -> AssociativeTransformer:
    torch.manual_seed(1)
    args = dict(num_classes=CLASSES, depth=2, embed_dim=32, num_heads=2, bottleneck=11)
    return timm.create_model('test_ait', **dict(args, **kwargs)).train()


def tokens(seed: int = 0, images: int = B) -> Tensor:
    return torch.randn(images, N, E, generator=torch.Generator().manual_seed(seed))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# The equations


def newton_schulz(slots: Tensor) -> Tensor:
    """Five steps on the singular values: ``s <- 1.5 s - 0.5 s^3``."""
    u, s, v = torch.linalg.svd(slots, full_matrices=False)
    s = s / (slots @ slots.t()).abs().sum(dim=1).max().clamp_min(1).sqrt()
    for _ in range(5):
        s = 1.5 * s - 0.5 * s**3
    slots = (u * s) @ v
    return slots / slots.norm(dim=1, keepdim=True)


def reference(layer: GlobalWorkspace, x: Tensor) -> tuple[Tensor, Tensor]:
    """One training forward, slot by slot: output and memory."""
    h = layer.norm(layer.fc2(F.gelu(layer.fc1(x))))
    groups = list(h) if layer.write_scope == 'image' else [h.flatten(0, 1)]
    is_additive = layer.write_rule in ('additive', 'competing')
    read = 3 * math.sqrt(D) * layer.memory / layer.memory.norm(dim=1, keepdim=True) if is_additive else layer.memory
    written = []
    for tokens in groups:  # (T, E), those that compete
        heads = []
        for s in range(S):
            rows = slice(s * D, (s + 1) * D)
            logits = read @ layer.query.weight[rows].t() @ (tokens @ layer.key.weight[rows].t()).t() / math.sqrt(D)
            weights = logits.softmax(dim=0) if layer.write_rule == 'competing' else logits.exp()  # over slots
            lowest = weights.sort(dim=-1, descending=True)[0][:, min(layer.bottleneck, len(tokens)) - 1, None]
            weights = weights.masked_fill(weights < lowest, 0)
            gates = weights / weights.sum(dim=-1, keepdim=True)
            heads.append(gates @ tokens @ layer.value.weight[rows].t())
        if layer.write_rule == 'distinct':
            heads = [head - head.mean(dim=0) for head in heads]
        update = torch.cat(heads, dim=1) @ layer.proj.weight.t() + layer.memory
        if is_additive:
            written.append(update)
            continue
        update = layer.write_norm(update)
        if layer.write_rule == 'distinct':
            update = update / update.norm(dim=1, keepdim=True)
        new = layer.memory_decay * layer.memory + (1 - layer.memory_decay) * update
        new = new / new.norm(dim=1, keepdim=True)
        written.append(newton_schulz(new) if layer.write_rule == 'distinct' else new)
    each = written if layer.write_scope == 'image' else written * len(x)
    outputs = []
    for memory, own in zip(each, h, strict=True):
        attractors = layer.linear_transform(memory)
        r = (layer.beta * own @ attractors.t()).softmax(-1) @ attractors
        outputs.append(own + (r if layer.scale is None else layer.scale * r))
    if is_additive:
        return torch.stack(outputs), layer.memory.clone()
    mean = torch.stack(written).mean(dim=0)
    mean = mean / mean.norm(dim=1, keepdim=True)
    has_copies = layer.write_scope == 'image' and layer.write_rule == 'distinct'
    return torch.stack(outputs), newton_schulz(mean) if has_copies else mean


@variants(VARIANTS.values(), ids=VARIANTS)
def test_output_memory_and_gradients_are_those_of_the_equations(kwargs: dict[str, Any]) -> None:
    layer = make_layer(**kwargs, balance_weight=0.0).double()
    x = tokens().double().requires_grad_()
    expected, memory = reference(layer, x)
    params = [p for p in layer.parameters() if p.requires_grad]
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * direction).sum(), [x, *params])
    found = layer(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.memory, memory)
    torch.testing.assert_close(torch.autograd.grad((found * direction).sum(), [x, *params]), gradients)


@variants(VARIANTS.values(), ids=VARIANTS)
def test_gradients_pass_gradcheck(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(3)
    sizes = dict(num_slots=3, slot_dim=3, write_heads=2)
    layer = GlobalWorkspace(3, 2, **{**sizes, **kwargs, 'bottleneck': 2}).double().train()
    layer.auto_balance = False
    names, params = zip(*layer.named_parameters(), strict=True)
    x, memory = torch.randn(2, 3, 3).double().requires_grad_(), layer.memory.clone()

    def forward(x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        out = functional_call(layer, {**dict(zip(names, params, strict=True)), 'memory': memory.clone()}, (x,))
        return out, layer.balance_loss()

    assert torch.autograd.gradcheck(forward, (x, *[p.detach().clone().requires_grad_() for p in params]), atol=1e-6)


@variants(VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient(kwargs: dict[str, Any]) -> None:
    model = make_model(**kwargs)
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in trained.items() if grad is None or not grad.abs().max() > 0]
    frozen = {name.split('.')[-2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({'write_norm'} if kwargs.get('write_rule') in ('additive', 'competing') else set())


@variants(VARIANTS.values(), ids=VARIANTS)
def test_a_layer_that_is_called_computes_what_the_formula_reads_from_a_plain_one(kwargs: dict[str, Any]) -> None:
    plain, called = make_layer(**kwargs), make_layer(**kwargs)
    for layer in (called.query, called.value, called.proj):
        layer.register_forward_hook(lambda module, args, out: None)
    torch.testing.assert_close(called(tokens()), plain(tokens()))
    torch.testing.assert_close(called.memory, plain.memory)


# Distinct slots


def assert_distinct(model: AssociativeTransformer, x: Tensor) -> None:
    for block in memory_report(model, x):
        assert block.mean_cosine < 0.3
        assert block.effective_rank > model.blocks[0].mlp.num_slots / 4


@pytest.mark.parametrize('scope', ['batch', 'image'])
@pytest.mark.parametrize('name', ['test_ait', 'ait_small_patch4_32'])
def test_a_hundred_writes_of_noise_leave_the_slots_distinct_where_the_published_rule_makes_them_one(
    name: str, scope: str
) -> None:
    torch.manual_seed(0)
    small = dict(depth=2) if name == 'test_ait' else dict(embed_dim=96, num_heads=4)
    distinct, published = (
        timm.create_model(name, write_rule=rule, write_scope=scope, **small).train()
        for rule in ('distinct', 'published')
    )
    with torch.no_grad():
        for _ in range(100):
            x = torch.randn(8, 3, 32, 32)
            distinct.forward_features(x)
            published.forward_features(x)
    assert_distinct(distinct, x)
    assert all(block.mean_cosine > 0.99 for block in memory_report(published, x))


@needs_photographs
@pytest.mark.parametrize('scope', ['batch', 'image'])
def test_a_hundred_writes_of_photographs_leave_the_slots_distinct(scope: str) -> None:
    pictures = torch.stack([pil_to_tensor(image) for image in photographs('train', 80)[0]])
    x = pictures[torch.randperm(800, generator=torch.Generator().manual_seed(0))] / 63.75 - 2
    torch.manual_seed(0)
    model = timm.create_model('test_ait', write_rule='distinct', write_scope=scope).train()
    with torch.no_grad():
        for part in x.split(8):
            model.forward_features(part)
    assert_distinct(model, x[:64])


@pytest.mark.parametrize('scope', ['batch', 'image'])
def test_after_training_the_slots_are_still_distinct(scope: str) -> None:
    model = make_model(write_rule='distinct', write_scope=scope)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (60,))
    x = 0.5 * torch.randn(60, 3, 32, 32) + torch.randn(CLASSES, 3, 32, 32)[labels]  # images with something in common
    for i in range(120):
        part = slice(20 * (i % 3), 20 * (i % 3) + 20)
        loss = F.cross_entropy(model(x[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert_distinct(model, x)


def test_slots_of_zeros_stay_zeros_when_they_are_orthogonalised() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, M, D)), torch.zeros(2, M, D))


def test_orthogonalised_slots_are_the_nearest_orthogonal_ones_or_evenly_spread() -> None:
    torch.manual_seed(0)
    few = F.normalize(torch.eye(M, D) + 0.1 * torch.randn(M, D), dim=-1)
    u, _, v = torch.linalg.svd(few, full_matrices=False)
    torch.testing.assert_close(orthogonalise(few), u @ v, rtol=0, atol=1e-3)
    many = F.normalize(torch.randn(2 * D, D), dim=-1)
    spread = torch.linalg.svdvals(orthogonalise(many))
    assert spread.max() / spread.min() < 1.3 < torch.linalg.svdvals(many).max() / torch.linalg.svdvals(many).min()


def test_the_first_memory_is_orthogonal_and_a_write_moves_it_by_the_rate_that_the_decay_says() -> None:
    layer = make_layer(write_rule='distinct')
    torch.testing.assert_close(layer.memory @ layer.memory.t(), torch.eye(M), rtol=0, atol=1e-5)
    before = layer.memory.clone()
    layer(tokens())
    assert ((layer.memory * before).sum(dim=-1) > 0.97).all()  # unit rows: 0.9 old and 0.1 new
    published = make_layer()
    published.memory.copy_(before)
    published(tokens())
    assert ((published.memory * before).sum(dim=-1) < (layer.memory * before).sum(dim=-1)).all()


def test_the_gain_of_distinct_slots_is_learned_from_one_on_and_the_published_rule_has_none() -> None:
    layer = make_layer(write_rule='distinct')
    assert layer.scale.tolist() == [1.0] * E
    assert layer.scale.requires_grad
    assert make_layer().scale is None


def test_one_slot_has_nothing_to_be_distinct_from() -> None:
    written = []
    for seed in range(2):  # what is written depends on what is read
        layer = make_layer(write_rule='distinct', num_slots=1)
        layer(tokens(seed))
        written.append(layer.memory.clone())
    assert (written[0] - written[1]).abs().max() > 1e-3


@variants(IMAGE.values(), ids=IMAGE)
def test_the_balance_loss_of_copies_is_the_mean_over_images(kwargs: dict[str, Any]) -> None:
    layer, x = make_layer(**kwargs), tokens()
    layer(x)
    alone = []
    for image in x:
        one = make_layer(**kwargs)
        one(image[None])
        alone.append(one.balance_loss())
    torch.testing.assert_close(layer.balance_loss(), torch.stack(alone).mean())


@variants(IMAGE.values(), ids=IMAGE)
def test_evaluation_writes_copies_without_a_balance_loss(kwargs: dict[str, Any]) -> None:
    layer = make_layer(**kwargs).eval()
    assert layer.write(tokens().detach(), layer.memory).balance_loss.item() == 0


@variants(IMAGE.values(), ids=IMAGE)
def test_an_evaluation_before_a_write_is_differentiated_after_it(kwargs: dict[str, Any]) -> None:
    layer, x = make_layer(**kwargs), tokens()
    weights = [layer.fc1.weight, layer.query.weight]  # the gradient of W_Q reads the memory
    expected = torch.autograd.grad(layer.eval()(x).square().sum(), weights)
    y = layer.eval()(x)
    layer.train()(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), weights), expected)


# A workspace for every image


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
@pytest.mark.parametrize('kwargs', [dict(bottleneck=512), dict(bottleneck=5), dict(dtype=torch.bfloat16)], ids=str)
def test_a_scripted_layer_writes_the_copies_of_the_layer(kwargs: dict[str, Any]) -> None:
    layer = make_layer(write_scope='image', **kwargs).eval()
    x = tokens().to(layer.fc1.weight.dtype)
    with torch.no_grad():
        scripted = torch.jit.script(layer)(x)
        torch.testing.assert_close(scripted, layer(x), rtol=0.02, atol=0.02 if 'dtype' in kwargs else 1e-5)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@variants(IMAGE.values(), ids=IMAGE)
def test_an_image_alone_and_in_batches_of_7_and_64_has_the_same_logits(kwargs: dict[str, Any], training: bool) -> None:
    model = make_model(**kwargs)
    model(images(5))
    x, logits = images(64), []
    with torch.no_grad():
        for size in (1, 7, 64):
            twin = copy.deepcopy(model).train(training)
            starts = [copy.deepcopy(twin) for _ in x.split(size)]
            logits.append(torch.cat([start(part) for start, part in zip(starts, x.split(size), strict=True)]))
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-4, atol=1e-5)


def test_evaluation_reads_the_image_at_hand_and_leaves_the_memory() -> None:
    model = make_model(write_scope='image').eval()
    before = memories(model)
    seen: list[Tensor] = []
    model.blocks[0].mlp.linear_transform.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        model(images(2))
    assert seen[0].shape == (2, 16, 16)
    assert not torch.allclose(seen[0][0], seen[0][1], atol=1e-4)
    assert all(map(torch.equal, memories(model), before))


@pytest.mark.parametrize('poison', [math.nan, math.inf])
@pytest.mark.parametrize('rule', ['published', 'distinct', 'additive', 'competing'])
def test_an_image_that_is_not_finite_spoils_neither_the_memory_nor_other_images(rule: str, poison: float) -> None:
    layer, healthy = (make_layer(write_scope='image', write_rule=rule) for _ in range(2))
    x = tokens()
    x[1, 3, 5] = poison
    out, expected = layer(x), healthy(tokens())
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]])
    assert layer.memory.isfinite().all()
    torch.testing.assert_close(layer.memory.norm(dim=-1), torch.ones(M))


@variants([{}, *VARIANTS.values()], ids=['published', *VARIANTS])
def test_a_batch_without_images_leaves_the_memory_as_it_was(kwargs: dict[str, Any]) -> None:
    layer = make_layer(**kwargs)
    layer(tokens())
    before = layer.memory.clone()
    out = layer(tokens(images=0))
    assert out.shape == (0, N, E)
    assert torch.equal(layer.memory, before)
    assert layer.balance_loss() == 0
    out.sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in layer.parameters() if p.grad is not None)


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
@variants(IMAGE.values(), ids=IMAGE)
def test_scripted_exported_and_compiled_it_gives_the_same_logits(kwargs: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, x = make_model(**kwargs).eval(), images(4)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-5)
        batch = torch.export.Dim('batch', min=1, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes=((({0: batch}),))).module()
        torch.testing.assert_close(exported(images(7)), model(images(7)))
        torch.testing.assert_close(torch.compile(model, backend='aot_eager', fullgraph=True)(x), expected)
        assert torch.equal(reparameterize_model(model)(x), expected)


@pytest.mark.parametrize('backend', ['aot_eager', None])
@variants(VARIANTS.values(), ids=VARIANTS)
def test_compiled_or_checkpointed_training_is_that_of_eager(kwargs: dict[str, Any], backend: str | None) -> None:
    torch._dynamo.reset()
    model, other = make_model(**kwargs), make_model(**kwargs)
    if backend is None:
        other.set_grad_checkpointing()
    call = other if backend is None else torch.compile(other, backend=backend, fullgraph=True)
    for forward in (model, call):
        (F.cross_entropy(forward(images(4)), torch.arange(4)) / 4).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    for a, b in zip(model.blocks, other.blocks, strict=True):
        torch.testing.assert_close(b.mlp.memory, a.mlp.memory, rtol=0, atol=1e-5)


def test_a_fused_model_with_a_gain_on_the_paper_block_gives_the_same_logits() -> None:
    model = make_model(write_rule='distinct').eval()
    with torch.no_grad():
        model.blocks[0].mlp.scale.uniform_(0.5, 2)
        assert torch.equal(reparameterize_model(model)(images(3)), model(images(3)))


def test_torch_counts_the_flops_of_a_model_with_a_gain_without_gradients() -> None:
    """Its tracker of modules refuses a parameter among the positional arguments of a module."""
    model = make_model(write_rule='distinct').eval()
    for counted in (model, reparameterize_model(model)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            counted(images(3))
        assert counter.get_total_flops() > 0


@pytest.mark.parametrize('name', ['write_rule', 'write_scope'])
def test_an_unknown_rule_or_scope_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be one of \(('\w+', )+'\w+'\), got 'other'"):
        make_layer(**{name: 'other'})


# Copies that add what they read


@pytest.mark.parametrize('rule', ['additive', 'competing'])
def test_a_rule_that_keeps_all_it_reads_needs_a_memory_for_each_image(rule: str) -> None:
    with pytest.raises(ValueError, match=f"write_rule='{rule}' needs write_scope='image', got 'batch'; give both"):
        make_layer(write_rule=rule)


def test_slots_that_compete_lose_a_token_to_the_slot_that_scores_it_highest() -> None:
    layer = GlobalWorkspace(2, num_slots=2, slot_dim=2, write_heads=1, write_rule='competing', write_scope='image')
    with torch.no_grad():
        layer.query.weight.copy_(torch.eye(2))
        layer.key.weight.copy_(100 * torch.eye(2))
        layer.memory.copy_(torch.eye(2))  # slot m scores element m of a token
    h = torch.tensor([[[2.0, 5.0], [3.0, 1.0], [4.0, 4.0]]])  # slot 0 wins token 1, slot 1 token 0, both have half of 2
    gates = layer.select(layer.memory, h).gates
    torch.testing.assert_close(gates, torch.tensor([[[[0.0, 2 / 3, 1 / 3], [2 / 3, 0.0, 1 / 3]]]]))
    only_loses = torch.tensor([[[2.0, 5.0], [1.0, 9.0]]])  # shares of slot 0 that float32 cannot tell from zero
    gates = layer.select(layer.memory, only_loses).gates
    torch.testing.assert_close(gates, torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))


def test_additive_copies_have_a_gain_and_score_tokens_by_the_direction_of_their_slots() -> None:
    layer = make_layer(write_rule='additive', write_scope='image')
    assert layer.scale.tolist() == [1.0] * E
    assert layer.scale.requires_grad
    torch.testing.assert_close(layer.address(5 * layer.memory), layer.address(layer.memory))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast_the_logits_of_copies_stay_in_float32(dtype: torch.dtype) -> None:
    layer = make_layer(write_scope='image', bottleneck=K)
    exact = layer.select(layer.memory, tokens())
    with torch.autocast('cpu', dtype):
        selection = layer.write(tokens(), layer.memory)
    torch.testing.assert_close(selection.lse, exact.lse)


def test_additive_copies_start_with_logits_of_unit_variance_where_the_others_read_the_mean_token() -> None:
    torch.manual_seed(0)
    spread = {}
    for rule in ('distinct', 'additive'):
        layer = GlobalWorkspace(256, write_rule=rule, write_scope='image')
        logits = layer.fold_queries(layer.memory) @ layer.norm(torch.randn(400, 256)).t()
        spread[rule] = logits.std().item()
    assert spread['distinct'] < 0.1
    assert spread['additive'] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_the_slots_that_additive_copies_start_from_stay(training: bool) -> None:
    layer = make_layer(write_rule='additive', write_scope='image').train(training)
    before = layer.memory.clone()
    layer(tokens())
    assert torch.equal(layer.memory, before)


# Blocks without self-attention

FREE: dict[str, Any] = dict(attention=False, write_rule='additive', write_scope='image')


def test_blocks_without_self_attention_train_every_parameter_compiled_and_checkpointed_too() -> None:
    torch._dynamo.reset()
    models = [make_model(**FREE) for _ in range(3)]
    models[2].set_grad_checkpointing()
    calls = [models[0], torch.compile(models[1], backend='aot_eager', fullgraph=True), models[2]]
    for call in calls:
        F.cross_entropy(call(images(4)), torch.arange(4)).backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0].values())
    assert not any('attn' in name or 'norm1' in name for name in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
def test_blocks_without_self_attention_are_scripted_and_exported() -> None:
    model, x = make_model(**FREE).eval(), images(4)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize('mask', [dict(attn_mask=torch.ones(64, 64)), dict(is_causal=True)], ids=['mask', 'causal'])
def test_blocks_without_self_attention_take_no_mask(mask: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='blocks without self-attention take no mask: leave out attn_mask'):
        make_model(**FREE).eval()(images(1), **mask)


@pytest.mark.parametrize('mask', [dict(attn_mask=torch.ones(64, 64)), dict(is_causal=True)], ids=['mask', 'causal'])
def test_a_mask_is_refused_where_all_tokens_meet_in_a_copy(mask: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"with write_scope='image' every token reads .*: leave out attn_mask"):
        make_model(write_scope='image').eval()(images(1), **mask)
    make_model().eval()(images(1), **mask)


class ReadTwice(GlobalWorkspace):
    def read(self, f: Tensor, h: Tensor, memory: Tensor) -> Tensor:
        return h + 2 * (super().read(f, h, memory) - h)


class WriteTwice(GlobalWorkspace):
    def update(self, memory: Tensor, heads: Tensor) -> Tensor:
        return super().update(memory, 2 * heads)


def make_with(workspace: type[GlobalWorkspace], **kwargs: Any) -> AssociativeTransformer:
    model_class = type('Model', (AssociativeTransformer,), {'workspace_layer': workspace})
    return make_model(model_class=model_class, **kwargs).eval()


def test_a_layer_that_reads_in_another_way_is_not_fused() -> None:
    model, x = make_with(ReadTwice), images(2)
    with torch.no_grad():
        assert not torch.equal(make_with(GlobalWorkspace)(x), model(x))
        assert torch.equal(reparameterize_model(model)(x), model(x))


@pytest.mark.parametrize('name', ['forward', 'look_up', 'feed_forward', 'slots', 'read', 'attractors'])
def test_a_layer_with_one_method_of_its_own_is_not_fused(name: str) -> None:
    own = type('Own', (GlobalWorkspace,), {name: lambda self, *args: getattr(super(type(self), self), name)(*args)})
    layer = own(E)
    assert layer.fuse() is layer


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
def test_a_layer_that_writes_copies_in_another_way_is_not_scripted() -> None:
    with pytest.raises(ValueError, match='as GlobalWorkspace does, and WriteTwice in another way'):
        torch.jit.script(make_with(WriteTwice, write_scope='image'))
    torch.jit.script(make_with(WriteTwice))  # writes nothing in evaluation


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
@pytest.mark.parametrize('name', ['look_up', 'write', 'keys_and_values', 'select', 'attend', 'update', 'fold_queries'])
def test_a_layer_with_one_method_of_the_write_of_its_own_is_not_scripted(name: str) -> None:
    own = type('Own', (GlobalWorkspace,), {name: lambda self, *args: getattr(super(type(self), self), name)(*args)})
    with pytest.raises(ValueError, match='as GlobalWorkspace does, and Own in another way'):
        torch.jit.script(make_with(own, write_scope='image'))


@pytest.mark.filterwarnings('ignore:.*torch.jit.* is deprecated:FutureWarning')
@variants([dict(write_scope='image'), FREE], ids=['image', 'free'])
def test_tokens_that_are_alike_are_selected_in_torchscript_as_elsewhere(kwargs: dict[str, Any]) -> None:
    model, x = make_model(**dict(kwargs, bottleneck=8)).eval(), torch.ones(4, 3, 32, 32)
    x[:, :, 8:16, 8:16] = images(4)[:, :, :8, :8]  # white all around
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_without_self_attention_the_heads_of_it_need_not_divide_the_width() -> None:
    model = make_model(**FREE, embed_dim=20, num_heads=3)
    assert model(images(2)).shape == (2, CLASSES)


def test_without_self_attention_additive_copies_mix_the_tokens_of_an_image_and_a_memory_of_the_batch_does_not() -> None:
    x = images(2)
    x[1] = x[0]
    x[1, :, :4, :4] *= -1  # the first patch
    moved = {}
    for name, kwargs in {'additive': FREE, 'published': dict(attention=False)}.items():
        with torch.no_grad():
            features = make_model(**kwargs).eval().forward_features(x)
        moved[name] = (features[0] - features[1]).abs().amax(dim=-1)[1:].max().item()  # of all other tokens
    assert moved['published'] < 1e-5 < 1e-3 < moved['additive']


def test_attention_is_a_truth_value() -> None:
    with pytest.raises(ValueError, match="attention must be True or False, got 'False'"):
        make_model(attention='False')
