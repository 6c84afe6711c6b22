"""The golden vectors: what the authors' published code computes from the same weights, over three training steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from timm_ait import AssociativeTransformer, checkpoint_filter_fn
from timm_ait.convert import convert_authors

REFERENCE = Path(__file__).parents[2] / 'shared' / 'reference'
CASES = ['classify', 'classify_beta4_k_exceeds_tokens', 'sort_of_clevr']
MODELS = dict.fromkeys(CASES, 'ait_small_patch4_32') | {'sort_of_clevr': 'ait_small_relational_75'}

pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f'no golden vectors: there is no folder {REFERENCE}')


def shape_of(case: str) -> dict[str, Any]:
    """Keywords of a model from the shape that the weights' file states."""
    with safe_open(REFERENCE / f'{case}.weights.safetensors', 'pt') as file:
        config = json.loads(file.metadata()['config'])
    return dict(
        img_size=config['image_size'],
        patch_size=config['patch_size'],
        embed_dim=config['hidden_dim'],
        mlp_ratio=config['mlp_dim'] / config['hidden_dim'],
        depth=config['n_layer'],
        num_heads=config['heads'],
        num_slots=config['pattern_size'],
        slot_dim=config['memory_dim'],
        write_heads=config['memory_head'],
        bottleneck=config['bottleneck'],
        beta=config['beta'],
        num_classes=config['num_classes'],
    )


def load_model(case: str, dtype: torch.dtype, **kwargs: Any) -> AssociativeTransformer:
    model = timm.create_model(MODELS[case], **dict(shape_of(case), **kwargs))
    weights = load_file(REFERENCE / f'{case}.weights.safetensors')
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return model.to(dtype).train()


def load_vectors(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    vectors = load_file(REFERENCE / f'{case}.vectors.safetensors')
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in vectors.items()}


def run(model: AssociativeTransformer, vectors: dict[str, Tensor], step: int) -> Tensor:
    inputs = [vectors[key] for key in (f'step{step}.input', f'step{step}.question') if key in vectors]
    return model(*inputs)


def total_loss(model: AssociativeTransformer, vectors: dict[str, Tensor]) -> Tensor:
    """Cross entropy + balance loss of step 0, from the memory before it."""
    model.auto_balance = False
    for i, block in enumerate(model.blocks):
        block.mlp.memory = vectors[f'step0.before.memory.{i}'].clone()
    return F.cross_entropy(run(model, vectors, 0), vectors['step0.target']) + model.balance_loss()


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=['f32', 'f64'])
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('write_grad', [True, False])
def test_three_training_steps_give_the_authors_logits_losses_and_memory(
    case: str, dtype: torch.dtype, tolerance: float, write_grad: bool
) -> None:
    model, vectors = load_model(case, dtype, write_grad=write_grad), load_vectors(case, dtype)

    def close(ours: Tensor, key: str) -> None:
        torch.testing.assert_close(ours.detach(), vectors[key].view_as(ours), rtol=0, atol=tolerance, msg=key)

    for step in range(3):
        for i, block in enumerate(model.blocks):
            close(block.mlp.memory, f'step{step}.before.memory.{i}')
        logits = run(model, vectors, step)
        close(logits, f'step{step}.logits')
        close(F.cross_entropy(logits, vectors[f'step{step}.target']), f'step{step}.cross_entropy')
        close(model.balance_loss(), f'step{step}.balance_loss')
        for i, block in enumerate(model.blocks):
            close(block.mlp.memory, f'step{step}.after.memory.{i}')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['f32', 'f64'])
@pytest.mark.parametrize('case', CASES)
def test_a_detached_write_has_the_authors_gradients_but_for_their_wrong_w_q(case: str, dtype: torch.dtype) -> None:
    model, vectors = load_model(case, dtype, write_grad=False), load_vectors(case, dtype)
    prefix = 'step0.grad.'
    theirs = {key.removeprefix(prefix): grad for key, grad in vectors.items() if key.startswith(prefix)}
    theirs = convert_authors(theirs, model.patch_embed.patch_size)
    total_loss(model, vectors).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        distance = float((ours[name] - grad).norm() / grad.norm())
        if name.endswith('query.weight'):
            assert distance > 1e-3, f'{name}: the wrong gradient was reproduced'
        else:
            assert distance < 1e-5, f'{name}: {distance}'


@pytest.mark.parametrize('write_grad', [True, False])
@pytest.mark.parametrize('case', CASES)
def test_the_gradient_of_w_q_is_that_of_finite_differences(
    case: str, write_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along random directions; a detached write is held where it was, since no gradient is to pass through it."""
    model, vectors = load_model(case, torch.float64, write_grad=write_grad), load_vectors(case, torch.float64)
    total_loss(model, vectors).backward()
    if not write_grad:
        for block in model.blocks:
            held = block.mlp.memory.clone()
            monkeypatch.setattr(block.mlp, 'update', lambda memory, heads, held=held: held)
    torch.manual_seed(0)
    for block in model.blocks:
        weight = block.mlp.query.weight
        for _ in range(3):
            direction = F.normalize(torch.randn_like(weight), dim=(0, 1))
            losses = []
            with torch.no_grad():
                for step in (1e-5, -2e-5):
                    weight += step * direction
                    losses.append(total_loss(model, vectors))
                weight += 1e-5 * direction
            measured = float(losses[0] - losses[1]) / 2e-5
            slope = float((weight.grad * direction).sum())
            assert abs(slope - measured) < 1e-5 * float(weight.grad.norm()), (slope, measured)


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
@pytest.mark.parametrize('case', ['classify', 'sort_of_clevr'])
def test_an_authors_file_loads_through_create_model(case: str, suffix: str, tmp_path: Path) -> None:
    file, vectors = REFERENCE / f'{case}.weights.safetensors', load_vectors(case, torch.float32)
    if suffix == 'pth':
        torch.save(load_file(file), tmp_path / 'authors.pth')
        file = tmp_path / 'authors.pth'
    overlay = dict(file=str(file))
    model = timm.create_model(MODELS[case], pretrained=True, pretrained_cfg_overlay=overlay, **shape_of(case))
    torch.testing.assert_close(run(model.train(), vectors, 0).detach(), vectors['step0.logits'], rtol=0, atol=1e-5)
