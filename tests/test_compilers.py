"""TorchScript, FX, torch.export and torch.compile give the same logits."""

import pytest
import torch
import torch.nn.functional as F
from models import LAYOUTS, images, make_model
from timm.models import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names


@LAYOUTS
def test_fx_traces_the_same_function(layout: str) -> None:
    model, x = make_model(layout).eval(), images()
    tracer = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    training, evaluation = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=[training[-1]], eval_return_nodes=[evaluation[-1]], tracer_kwargs=tracer
    )
    (logits,) = traced.eval()(x).values()
    torch.testing.assert_close(logits, model(x))
    (logits,) = traced.train()(x).values()
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.parametrize(('layout', 'grad'), [('paper', False), ('vit', True)])
def test_compiled_as_one_graph_evaluation_gives_the_same_logits(layout: str, grad: bool) -> None:
    torch._dynamo.reset()
    model, x = make_model(layout).eval(), images()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(images(7)), model(images(7)))
