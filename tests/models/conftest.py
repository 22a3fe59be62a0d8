import pytest
import torch

import bnpatch
from bnpatch.models import torch_export
from bnpatch.nn.norm import ExampleWeightedNorm


@pytest.fixture(scope="session")
def graph_of_checkpoint(checkpoint):
    return torch_export.module_to_graph(bnpatch.load(checkpoint).module, torch.zeros(2, 1, 32, 32))


@pytest.fixture
def exporter(graph_of_checkpoint, monkeypatch):
    """What torch's exporter makes of the checkpoint, made once: these tests are about what follows it."""

    def once(module, x, names):
        assert not any(isinstance(m, ExampleWeightedNorm) for m in module.modules())
        assert x.shape[1:] == (1, 32, 32)
        return graph_of_checkpoint.clone()

    monkeypatch.setattr(torch_export, "module_to_graph", once)
    return once
