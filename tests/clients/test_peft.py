"""peft: every adapter is trained and acts, and the memory comes along in a file beside the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import Recorder, Trained, assert_trains_like_by_hand, make_batches, make_model, memories

from timm_ait import load_memory, save_memory

peft = pytest.importorskip('peft', reason="peft is missing: pip install -e '.[clients]'")

TARGETS: dict[str, Any] = {
    'write': ['query', 'key', 'value', 'proj'],  # `proj` is also in the attention and in the stem
    'all linear layers': 'all-linear',
    'attention': ['qkv'],
    'feed-forward part and retrieval': ['fc1', 'fc2', 'linear_transform'],
}


def adapt(model: Any, targets: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **kwargs)).train()


def pairs(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if getattr(m, 'lora_B', None)}


def start(model: Any) -> Any:
    """Let the adapters act from the start: peft begins with ``lora_B = 0``, and then ``lora_A`` has no gradient."""
    torch.manual_seed(5)
    for module in pairs(model).values():
        torch.nn.init.normal_(module.lora_B['default'].weight, std=0.5)
    return model


@pytest.mark.parametrize('targets', TARGETS.values(), ids=TARGETS)
def test_every_adapter_has_a_gradient_and_acts(targets: Any) -> None:
    ((images, target),) = make_batches(1)
    model = start(adapt(make_model(), targets))
    logits = model(images)
    F.cross_entropy(logits, target).backward()
    assert len(pairs(model)) >= 2
    for name, module in pairs(model).items():
        for weight in (module.lora_A['default'].weight, module.lora_B['default'].weight):
            assert weight.grad is not None, name
            assert float(weight.grad.norm()) > 0, name
        twin = start(adapt(make_model(), targets))
        torch.nn.init.zeros_(dict(twin.named_modules())[name].lora_B['default'].weight)
        assert float((twin(images) - logits).detach().abs().max()) > 1e-6, name


def test_adapters_on_the_attention_alone_leave_the_memory_of_frozen_workspaces() -> None:
    model = adapt(make_model(), TARGETS['attention'])
    before = memories(model)
    for images, target in make_batches(2):
        F.cross_entropy(model(images), target).backward()
    assert all(map(torch.equal, memories(model), before))


WRITING = {name: targets for name, targets in TARGETS.items() if name != 'attention'}


@pytest.mark.parametrize('targets', WRITING.values(), ids=WRITING)
def test_adapters_get_the_gradient_of_the_sum(targets: Any) -> None:
    batches = make_batches(2)

    def train(model: Any) -> Trained:
        optimizer = Recorder(model.parameters())
        for images, target in batches:
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        return Trained(optimizer.seen, memories(model))

    assert_trains_like_by_hand(train, batches, make=lambda: start(adapt(make_model(), targets)))


@pytest.mark.parametrize('head', [None, ['head']], ids=['head frozen', 'head trained'])
def test_a_saved_adapter_and_its_memory_give_the_same_logits(head: Any, tmp_path: Path) -> None:
    model = adapt(make_model(), TARGETS['write'], modules_to_save=head)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for images, target in make_batches(3):
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    save_memory(model, tmp_path / 'memory.safetensors')

    again = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert not torch.equal(again(images), model(images))  # without its memory it is another model
    load_memory(again, tmp_path / 'memory.safetensors')
    assert torch.equal(again(images), model(images))

    base = make_model()  # before or after: the memory is no part of the adapter
    load_memory(base, tmp_path / 'memory.safetensors')
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path).eval()(images), model(images))


def test_merged_into_the_model_the_adapters_give_the_same_logits() -> None:
    ((images, target),) = make_batches(1)
    model = start(adapt(make_model(), 'all-linear'))
    model(images)
    expected = model.eval()(images)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)
    assert not pairs(merged)


def test_a_workspace_that_peft_trains_whole_saves_the_memory_in_use(tmp_path: Path) -> None:
    model = adapt(make_model(), ['qkv'], modules_to_save=['mlp'])
    ((images, target),) = make_batches(1)
    F.cross_entropy(model(images), target).backward()
    model.eval().save_pretrained(tmp_path)
    save_memory(model, tmp_path / 'memory.safetensors')
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()
    load_memory(again, tmp_path / 'memory.safetensors')
    assert torch.equal(again(images), model(images))
