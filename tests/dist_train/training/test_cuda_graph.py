"""CUDA graphs: when a run takes them, and, where a CPU replays, the same updates as without; tests/gpu has real ones."""

import re
from types import SimpleNamespace

import pytest
import torch

from dist_train.config_file import make_config
from dist_train.distributed.group import Group, Ranks
from dist_train.errors import ConfigError
from dist_train.training import cuda_graph
from dist_train.training.cuda_graph import NetworkGraphs, record, takes_cuda_graphs
from dist_train.training.engine import Engine
from tests.common import SMALL_MODEL
from tests.dist_train.training.test_engine import TwoExits

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def config(train=None, **sections):
    return make_config({"data": {"shards": "none"}, "model": SMALL_MODEL, **sections, "train": train or {}})


@pytest.mark.parametrize(
    ("sections", "taken"),
    [
        ({}, True),
        ({"train": {"cuda_graphs": False}}, False),
        ({"train": {"compile": True}}, False),
        ({"optim": {"exit_gradients": "equilibrium"}}, False),
        ({"model": {**SMALL_MODEL, "activation_checkpointing": True}}, False),
        ({"model": {"name": "module:function", "exits": ["body"]}}, False),
        ({"model": {"name": "module:function", "exits": ["body"]}, "train": {"cuda_graphs": True}}, True),
    ],
    ids=str,
)
def test_when_a_run_takes_them(sections, taken):
    assert takes_cuda_graphs(config(**sections), 0, GPU) == taken
    assert not takes_cuda_graphs(config(**sections), 0, CPU)


def test_not_where_zero_partitions():
    assert not takes_cuda_graphs(config(), 1, GPU)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"train": {"cuda_graphs": True, "zero_stage": 1}}, "train.zero_stage 1"),
        ({"train": {"cuda_graphs": True, "compile": True}}, "train.compile True"),
        ({"train": {"cuda_graphs": True}, "optim": {"exit_gradients": "pcgrad"}}, "optim.exit_gradients pcgrad"),
    ],
)
def test_asked_for_where_they_cannot_be(sections, named):
    with pytest.raises(ConfigError, match=re.escape(f"train.cuda_graphs is true and {named}")):
        config(**sections)


class OnTheCpu(NetworkGraphs):
    """Replays into the same tensors every time, as a GPU does."""

    def __init__(self, network, images, autocast):
        self._images = images.clone()
        self._parameters = list(network.parameters())
        self._logits = [torch.empty(len(images), 5) for _ in range(2)]
        self._logit_gradients = [torch.empty_like(z) for z in self._logits]
        self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]

        def forward():
            with torch.enable_grad(), autocast():
                self._made = network(self._images)
            torch._foreach_copy_(self._logits, [z.detach() for z in self._made])

        def backward():
            made = torch.autograd.grad(self._made, self._parameters, self._logit_gradients)
            torch._foreach_copy_(self._gradients, made)

        self._forward, self._backward = SimpleNamespace(replay=forward), SimpleNamespace(replay=backward)


def updates(steps_of_accumulation):
    """Weights after three updates, without and with graphs."""
    group = Group(Ranks.from_env(), 1)
    results = []
    for taken in (False, True):
        torch.manual_seed(0)
        micro = 16 // steps_of_accumulation
        train = {"zero_stage": 0, "precision": "fp32", "global_batch": 16, "micro_batch": micro}
        engine = Engine(TwoExits(), config(train, optim={"lr": 0.05}), group)
        engine._takes_graphs = taken
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_graph, "NetworkGraphs", OnTheCpu)
            for number in range(3):
                images = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(number))
                parts = images.split(micro)
                for place, part in enumerate(parts):
                    loss = sum((z**2).mean() for z in engine.forward(part)) / len(parts)
                    engine.backward(loss)
                    if place < len(parts) - 1:
                        engine.next_micro_batch()
                engine.update(0.05)
        assert (engine._graphs is not None) == taken
        results.append(engine.weights())
    return results


@pytest.mark.parametrize("steps_of_accumulation", [1, 2, 4])
def test_updates_are_those_without(ranks, steps_of_accumulation):
    [(plain, replayed)] = ranks(updates, 1, steps_of_accumulation)
    assert plain.keys() == replayed.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, replayed[name]), name


def test_a_network_that_cannot_be_recorded(monkeypatch, caplog):
    """As a capture fails: with a RuntimeError of several lines."""

    class Fails(NetworkGraphs):
        def __init__(self, *_):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "NetworkGraphs", Fails)
    assert record(None, None, None, "auto") is None
    assert caplog.messages == [
        "without CUDA graphs: this network cannot be recorded (RuntimeError: CUDA error: operation not permitted when "
        "stream is capturing)"
    ]
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs is true, and this network cannot be recorded"):
        record(None, None, None, True)
