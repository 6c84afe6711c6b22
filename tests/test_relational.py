"""The models that answer a question about an image."""

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import memories
from timm.models import get_notrace_functions, get_notrace_modules, model_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from timm_ait import NormalizedPatchEmbed, RelationalTransformer, checkpoint_filter_fn

B, SIDE, PATCH, Q, CLASSES = 3, 15, 5, 11, 7
N = (SIDE // PATCH) ** 2
SMALL: dict[str, Any] = dict(
    img_size=SIDE, patch_size=PATCH, question_dim=Q, embed_dim=34, num_heads=2, depth=2, num_classes=CLASSES,
    num_slots=13, slot_dim=5, write_heads=3, bottleneck=17,
)  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    'paper': {},
    'vit': dict(class_token=True, reg_tokens=2, pos_embed='learn', global_pool='token', final_norm=True),
}
EACH_LAYOUT = pytest.mark.parametrize('layout', LAYOUTS)


def make_model(layout: str = 'paper', **kwargs: Any) -> RelationalTransformer:
    torch.manual_seed(1)
    return timm.create_model('ait_small_relational_75', **{**SMALL, **LAYOUTS[layout], **kwargs}).train()


def inputs(count: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 3, SIDE, SIDE, generator=generator)
    return image, torch.randint(2, (count, Q), generator=generator).float()


def train_step(model: nn.Module, seed: int = 0) -> Tensor:
    logits = model(*inputs(seed=seed))
    F.cross_entropy(logits, torch.arange(B)).backward()
    return logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# Sizes and names


def test_timm_lists_the_models_under_the_name_of_their_own_module() -> None:
    models = timm.list_models(module='relational')
    assert models == ['ait_base_relational_75', 'ait_small_relational_75', 'test_ait_relational']
    assert not set(models) & set(timm.list_models(module='ait'))


@pytest.mark.parametrize(
    ('name', 'depth', 'count'), [('ait_small_relational_75', 2, 15_822_068), ('ait_base_relational_75', 12, 91_043_188)]
)
def test_the_layout_is_that_of_the_paper(name: str, depth: int, count: int) -> None:
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == count
    assert (len(model.blocks), model.embed_dim, model.blocks[0].mlp.fc1.out_features) == (depth, 768, 3072)
    assert model.blocks[0].attn.num_heads == 12
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == ((75, 75), (15, 15))
    assert isinstance(model.patch_embed, NormalizedPatchEmbed)
    assert model.cls_token is model.pos_embed is model.blocks[0].attn.qkv.bias is None
    assert isinstance(model.norm, nn.Identity)
    assert (model.question_dim, model.head.in_features, model.head.out_features) == (18, (25 + 1) * 768, 10)
    assert {m.eps for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and 'write' not in n} == {1e-5}
    config = model.default_cfg
    assert (config['input_size'], config['num_classes'], config['mean'], config['std']) == (
        (3, 75, 75), 10, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    )  # fmt: skip


def test_the_test_model_is_small_and_answers() -> None:
    model = timm.create_model('test_ait_relational').eval()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model(torch.rand(2, 3, 75, 75), torch.rand(2, 18)).shape == (2, 10)


# The question


def test_the_question_is_one_token_before_those_of_the_image() -> None:
    model, (image, question) = make_model(depth=0, global_pool='', fc_norm=False), inputs()
    tokens = model.forward_features(image, question)
    assert tokens.shape == (B, 1 + N, 34)
    torch.testing.assert_close(tokens[:, 1:], model.patch_embed(image))
    before, linear, after = model.question_embed

    def normalised(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

    by_hand = normalised(normalised(question) @ linear.weight.t() + linear.bias)
    torch.testing.assert_close(tokens[:, 0], by_hand)
    assert (before.normalized_shape, after.normalized_shape) == ((Q,), (34,))


def test_class_and_register_tokens_stay_first_and_only_patches_have_positions() -> None:
    model, (image, question) = make_model('vit', depth=0, final_norm=False), inputs()
    tokens = model.forward_features(image, question)
    assert model.num_prefix_tokens == 4
    assert model.pos_embed.shape == (1, N, 34)
    torch.testing.assert_close(tokens[:, 0], model.cls_token[:, 0].expand(B, -1))
    torch.testing.assert_close(tokens[:, 1:3], model.reg_token.expand(B, -1, -1))
    torch.testing.assert_close(tokens[:, 3], model.question_embed(question))
    torch.testing.assert_close(tokens[:, 4:], model.patch_embed(image) + model.pos_embed)


@EACH_LAYOUT
def test_another_question_has_another_answer(layout: str) -> None:
    model, (image, question) = make_model(layout).eval(), inputs()
    changed = question.clone()
    changed[1, 4] = 1 - changed[1, 4]
    differences = (model(image, changed) - model(image, question)).abs().amax(dim=-1)
    assert differences[1] > 1e-4
    assert differences[[0, 2]].max() < 1e-6


def test_the_images_have_the_name_that_timm_gives_them() -> None:
    model, (image, question) = make_model().eval(), inputs()
    assert torch.equal(model(x=image, question=question), model(image, question))
    model.forward_features(x=image, question=question)
    model.forward_intermediates(x=image, question=question)


def test_weights_for_longer_questions_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r'question_embed\.0\.\w+ has the shape .*create the model .*question_dim'):
        checkpoint_filter_fn(make_model(question_dim=Q + 1).state_dict(), make_model())


def test_bits_may_be_bool() -> None:
    model, (image, question) = make_model().eval(), inputs()
    assert torch.equal(model(image, question.bool()), model(image, question))


def test_a_missing_or_wrong_question_is_refused_with_what_was_expected() -> None:
    model, (image, question) = make_model(), inputs()
    before = memories(model)
    wrong = {
        'None': None,
        r'\(3, 10\)': question[:, 1:],
        r'\(2, 11\)': question[1:],
        r'\(3, 1, 11\)': question[:, None],
    }
    for got, value in wrong.items():
        for forward in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=rf'expected a question for every image, shape \(3, 11\), got {got}; '):
                forward(image, value)
    for args in ((image, 1), (image, question)):
        with pytest.raises(ValueError, match=r'knows no question; take forward_intermediates\(image, question\)'):
            model.get_intermediate_layers(*args)
    with pytest.raises(ValueError, match=r'expected images of shape \(B, 3, H, W\)'):
        model(image[:, :2], question)
    assert all(map(torch.equal, memories(model), before))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(question_dim=0), 'question_dim must be an integer of at least 1, got 0'),
        (dict(question_dim=2.5), 'question_dim must be an integer of at least 1, got 2.5'),
        (dict(question_dim=True), 'question_dim must be an integer of at least 1, got True'),
        (dict(no_embed_class=False), 'only patches have a position'),
        (dict(img_size=16), r'the nearest sizes below are \(15, 15\)'),
    ],
    ids=str,
)
def test_a_wrong_argument_says_what_was_expected(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match='slots'):
        make_model(slots=3)


# Training and evaluation


@EACH_LAYOUT
def test_every_parameter_gets_a_gradient(layout: str) -> None:
    model = make_model(layout)
    train_step(model)
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in model.parameters())


def test_the_balance_loss_is_added_to_the_gradient_once() -> None:
    automatic, by_hand = make_model(balance_weight=1.0), make_model(balance_weight=1.0)
    train_step(automatic)
    by_hand.auto_balance = False
    logits = by_hand(*inputs())
    balance = by_hand.balance_loss()
    assert balance > 0.1
    (F.cross_entropy(logits, torch.arange(B)) + balance).backward()
    for (name, grad), other in zip(gradients(automatic).items(), gradients(by_hand).values(), strict=True):
        torch.testing.assert_close(grad, other, msg=name)


@EACH_LAYOUT
def test_training_writes_every_memory_evaluation_none_and_batch_size_does_not_matter(layout: str) -> None:
    model = make_model(layout)
    before = memories(model)
    train_step(model)
    assert not any(map(torch.equal, memories(model), before))
    before, (image, question) = memories(model.eval()), inputs(7)
    whole = model(image, question)
    for i in range(7):
        torch.testing.assert_close(model(image[i : i + 1], question[i : i + 1]), whole[i : i + 1])
    assert all(map(torch.equal, memories(model), before))


def test_the_questions_token_is_written_too() -> None:
    """With all patches alike, only the question can tell two batches apart."""
    model, (image, question) = make_model(), inputs()
    twin = copy.deepcopy(model)
    model(torch.ones_like(image), question)
    twin(torch.ones_like(image), 1 - question)
    assert not any(map(torch.equal, memories(model), memories(twin)))


@EACH_LAYOUT
def test_checkpointing_writes_once_and_changes_nothing(layout: str) -> None:
    plain, checkpointed = make_model(layout), make_model(layout)
    checkpointed.set_grad_checkpointing()
    for seed in range(2):
        torch.testing.assert_close(train_step(checkpointed, seed), train_step(plain, seed), rtol=0, atol=0)
    assert all(map(torch.equal, memories(checkpointed), memories(plain)))
    for (name, grad), other in zip(gradients(plain).items(), gradients(checkpointed).values(), strict=True):
        torch.testing.assert_close(grad, other, msg=name)


def test_a_few_steps_learn_the_questions_answer() -> None:
    model, (image, question) = make_model(), inputs(23)
    answers = question[:, 6].long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(image, question), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(image, question).argmax(dim=-1) == answers).all()


def test_layer_decay_takes_the_question_for_a_part_of_the_stem() -> None:
    model = make_model()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1.0, layer_decay=0.5)
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    stem, question, head = model.patch_embed.proj, model.question_embed[1], model.head
    assert scales[id(question.weight)] == scales[id(stem.weight)] < scales[id(head.weight)] == 1


def test_timms_scaling_of_the_first_weights_happens_once() -> None:
    plain, fixed = (make_model(fix_init=fix_init) for fix_init in (False, True))
    for depth, (block, scaled) in enumerate(zip(plain.blocks, fixed.blocks, strict=True), start=1):
        torch.testing.assert_close(scaled.mlp.fc2.weight * (2 * depth) ** 0.5, block.mlp.fc2.weight)


@pytest.mark.parametrize('is_reset', [False, True])
def test_the_classifier_has_the_last_parameters_as_timm_expects(is_reset: bool) -> None:
    model = make_model()
    if is_reset:
        model.reset_classifier(5)
    clipped = {id(p) for p in model_parameters(model, exclude_head=True)}
    assert [name for name, p in model.named_parameters() if id(p) not in clipped] == ['head.weight', 'head.bias']


# What timm and PyTorch do to models


@EACH_LAYOUT
def test_intermediates_are_the_blocks_outputs_without_prefix_tokens(layout: str) -> None:
    model, (image, question) = make_model(layout).eval(), inputs()
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, x: outputs.append(x))
    tokens = model.forward_features(image, question)
    features, levels = model.forward_intermediates(image, question, output_fmt='NLC')
    torch.testing.assert_close(features, tokens)
    for level, output in zip(levels, outputs, strict=False):
        torch.testing.assert_close(level, output[:, model.num_prefix_tokens :])
    (grid,) = model.forward_intermediates(image, question, indices=1, intermediates_only=True)
    assert grid.shape == (B, 34, SIDE // PATCH, SIDE // PATCH)
    assert not model.patch_drop._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize('mask', [dict(is_causal=True), dict(attn_mask=torch.ones(1 + N, 1 + N).tril().bool())])
def test_behind_a_causal_mask_the_question_sees_no_patch(mask: dict[str, Any]) -> None:
    model, (image, question) = make_model().eval(), inputs()
    first, second = (model.forward_features(x, question, **mask)[:, 0] for x in (image, 1 - image))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(model.forward_features(image, question)[:, 0], first, atol=1e-3)
    tokens = model.forward_features(image, question, **mask)
    assert torch.equal(model(image, question, **mask), model.forward_head(tokens))


@torch.no_grad()
def test_after_an_error_in_forward_intermediates_the_model_answers_as_before() -> None:
    model, (image, question) = make_model().eval(), inputs()
    before = model(image, question)
    with pytest.raises(ValueError, match='expected images of shape'):
        model.forward_intermediates(image[:, :2], question)
    assert torch.equal(model(image, question), before)


def test_flattened_tokens_have_a_norm_unless_it_is_told_not_to() -> None:
    norms = [type(make_model(fc_norm=fc_norm).fc_norm) for fc_norm in (None, True, False)]
    assert norms == [nn.LayerNorm, nn.LayerNorm, nn.Identity]


@pytest.mark.parametrize('pool', ['avg', 'max', 'flatten'])
def test_the_classifier_can_be_reset(pool: str) -> None:
    model = make_model()
    model.reset_classifier(19, global_pool=pool)
    tokens = model.forward_features(*inputs())
    assert model.forward_head(tokens).shape == (B, 19)
    assert model.head_hidden_size == (34 * (1 + N) if pool == 'flatten' else 34)


def test_another_image_size_leaves_the_question_as_it_is() -> None:
    model, (_, question) = make_model('vit', global_pool='avg').eval(), inputs()
    model.set_input_size(img_size=(20, 25))
    assert model.pos_embed.shape == (1, 4 * 5, 34)
    assert model(torch.rand(B, 3, 20, 25), question).shape == (B, CLASSES)


def test_dropped_patches_never_take_the_question_along() -> None:
    model, (image, question) = make_model('vit', depth=0, final_norm=False, patch_drop_rate=0.5), inputs()
    tokens = model.forward_features(image, question)
    assert tokens.shape[1] == 4 + N // 2
    torch.testing.assert_close(tokens[:, 3], model.question_embed(question))


def test_from_the_meta_device_it_starts_initialised() -> None:
    torch.manual_seed(3)
    model = timm.create_model('ait_small_relational_75', **SMALL, device='meta').to_empty(device='cpu')
    model.init_weights()
    before, linear, _ = model.question_embed
    assert torch.equal(before.weight, torch.ones(Q))
    assert 0 < linear.weight.abs().max() <= Q**-0.5
    train_step(model)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_cast_model_answers_in_its_dtype() -> None:
    model, (image, question) = make_model().to(torch.bfloat16), inputs()
    logits = model(image.bfloat16(), question)
    assert logits.dtype == torch.bfloat16
    assert {memory.dtype for memory in memories(model)} == {torch.float32}


@EACH_LAYOUT
def test_torchscript_answers_alike_and_asks_for_a_question(layout: str) -> None:
    model, pair = make_model(layout).eval(), inputs()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*torch.jit.* is deprecated', FutureWarning)
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(*pair), model(*pair))
    with pytest.raises(torch.jit.Error, match='expected a question for every image'):
        scripted(pair[0])
    with pytest.raises(torch.jit.Error, match='a scripted model only evaluates'):
        scripted.train()(*pair)


def test_fx_traces_the_same_function() -> None:
    model, (image, question) = make_model().eval(), inputs()
    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    training, evaluation = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=[training[-1]], eval_return_nodes=[evaluation[-1]], tracer_kwargs=tracer
    )
    (logits,) = traced.eval()(image, question).values()
    torch.testing.assert_close(logits, model(image, question))


@EACH_LAYOUT
def test_export_gives_the_same_logits_for_any_batch(layout: str) -> None:
    model, pair = make_model(layout).eval(), inputs()
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, pair, dynamic_shapes=({0: batch}, {0: batch})).module()
    for some in (pair, inputs(1), inputs(7)):
        torch.testing.assert_close(exported(*some), model(*some))


@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor:UserWarning')
@EACH_LAYOUT
def test_compiled_as_one_graph_it_evaluates_and_trains_alike(layout: str) -> None:
    torch._dynamo.reset()
    eager, compiled = make_model(layout), make_model(layout)
    call = torch.compile(compiled, backend='aot_eager', fullgraph=True)
    for seed in range(2):
        train_step(eager, seed)
        F.cross_entropy(call(*inputs(seed=seed)), torch.arange(B)).backward()
    for (name, grad), other in zip(gradients(eager).items(), gradients(compiled).values(), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6, msg=name)
    for memory, other in zip(memories(eager), memories(compiled), strict=True):
        torch.testing.assert_close(memory, other)
    eager.eval(), compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(call(*inputs(7)), eager(*inputs(7)))


def test_a_model_for_features_is_refused_with_what_gives_them() -> None:
    with pytest.raises(ValueError, match=r'test_ait_relational answers questions .* call model\.forward_intermediates'):
        timm.create_model('test_ait_relational', features_only=True, out_indices=(0, 1))
