"""A routed tower is one graph for torch.compile, with given weights, with gates, and for gradients to them."""

import pytest
import torch
from routes import backbone, gated, gates, images, merge

from merging.routing.install import install


@pytest.mark.parametrize("kernel, backend", [("auto", "aot_eager"), ("materialised", "eager")])
def test_compiled_as_one_graph(kernel, backend):
    torch.compiler.reset()
    merged = merge(("Tucker", "Dense", "LowRank"), routes=lambda key: "resblocks.0.mlp" in key)
    tower = install(backbone().build(), merged).use(kernel)
    compiled = torch.compile(tower, backend=backend, fullgraph=True)
    w, other = gates().requires_grad_(), gates().requires_grad_()
    found, expected = compiled(images(), w=w), tower(images(), w=other)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(w.grad, other.grad)


@pytest.mark.parametrize("sees", ["block", "pass"])
def test_compiled_with_gates(sees):
    torch.compiler.reset()
    tower = install(backbone().build(), gated(sees))
    with torch.no_grad():
        found = torch.compile(tower, backend="eager", fullgraph=True)(images())
        torch.testing.assert_close(found, tower(images()))
