"""segmentation-models-pytorch: a DPT decoder on an AiT, whose memory trains along."""

import pytest
import torch
import torch.nn.functional as F
from by_hand import make_batches, memories

smp = pytest.importorskip(
    'segmentation_models_pytorch', reason="segmentation-models-pytorch is missing: pip install -e '.[clients]'"
)


def test_a_dpt_segments_and_the_memory_trains_along() -> None:
    ((images, _),) = make_batches(1)
    model = smp.DPT('tu-test_ait', encoder_depth=4, encoder_weights=None, classes=3, img_size=32).train()
    before = memories(model)
    masks = model(images)
    assert masks.shape == (len(images), 3, *images.shape[-2:])
    F.cross_entropy(masks, torch.zeros(len(images), *images.shape[-2:], dtype=torch.long)).backward()
    assert not any(map(torch.equal, before, memories(model)))
    queries = [p for name, p in model.named_parameters() if name.endswith('mlp.query.weight')]
    assert len(queries) == 4
    assert all(p.grad.abs().max() > 0 for p in queries)
