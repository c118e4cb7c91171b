"""The temperature: its rules, its state, and its being one on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config import LossConfig
from dist_train.loss.objective import ExitDistillation


def criterion_for(exits=3, **fields):
    return ExitDistillation.from_config(LossConfig(**fields), exits)


def totals(mean, samples=8.0):
    return torch.tensor([mean * samples, samples])


def test_anneal_moves_above_the_threshold_only():
    criterion = criterion_for(anneal_threshold=0.5, anneal_factor=1.1, temperature=(1.0, 2.0, 3.0))
    for mean, factor in ((0.51, 1.1), (0.5, 1.1), (0.2, 1.1), (0.99, 1.21), (float("nan"), 1.21)):
        criterion.end_batch(totals(mean))
        assert criterion.temperature.tolist() == pytest.approx([factor, 2 * factor, 3 * factor])
    assert criterion.step == 5


def test_bounds_hold():
    criterion = criterion_for(temperature=(1.0, 1.15, 1.05), anneal_factor=1.1, temperature_bounds=(1.0, 1.2))
    for _ in range(4):
        criterion.end_batch(totals(0.9))
    assert criterion.temperature.tolist() == pytest.approx([1.2] * 3)
    criterion = criterion_for(temperature=2.0, anneal_factor=0.5, temperature_bounds=(0.8, 4.0))
    criterion.end_batch(totals(0.9))
    criterion.end_batch(totals(0.9))
    assert criterion.temperature.tolist() == pytest.approx([0.8] * 3)


@pytest.mark.parametrize(("factor", "end"), [(1.5, 1000), (0.5, 0.001)])
def test_without_bounds_the_temperature_stays_where_float32_computes(factor, end):
    """With two classes the confidence is never below 0.5, whatever the temperature."""
    criterion = criterion_for(anneal_factor=factor)
    for _ in range(40):
        criterion.end_batch(totals(0.6))
    assert criterion.temperature.tolist() == pytest.approx([end] * 3)


def test_constant_and_no_teacher_need_no_confidence_and_stay():
    for fields in ({"temperature_rule": "constant"}, {"teachers": "none"}):
        criterion = criterion_for(temperature=2.0, **fields)
        assert not criterion.needs_confidence
        criterion.end_batch(totals(0.9))
        assert criterion.temperature.tolist() == [2.0] * 3
    assert criterion_for().needs_confidence


def test_schedule_is_straight_between_its_points_and_level_outside():
    points = ((2, 1.0), (4, 3.0), (8, 2.0))
    criterion = criterion_for(temperature=(1.0, 2.0, 0.5), temperature_rule="schedule", temperature_schedule=points)
    assert not criterion.needs_confidence
    for step, factor in enumerate([1, 1, 1, 2, 3, 2.75, 2.5, 2.25, 2, 2, 2]):
        assert int(criterion.step) == step
        assert criterion.temperature.tolist() == pytest.approx([factor, 2 * factor, 0.5 * factor])
        criterion.end_batch(totals(0.9))


@pytest.mark.parametrize("rule", [{}, {"temperature_rule": "schedule", "temperature_schedule": ((0, 1.0), (9, 4.0))}])
def test_state_goes_on_exactly(rule):
    first, second = criterion_for(**rule), criterion_for(**rule)
    for _ in range(7):
        first.end_batch(totals(0.9))
    assert set(first.state_dict()) == {"temperature", "step"}
    second.load_state_dict(
        {name: torch.tensor(value.tolist(), dtype=value.dtype) for name, value in first.state_dict().items()}
    )
    for criterion in (first, second):
        criterion.end_batch(totals(0.9))
    assert torch.equal(first.temperature, second.temperature)
    assert first.temperature[0] != 1
    assert first.temperature.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- many ranks

STEPS, EXITS, WIDTH, CLASSES, BATCH = 50, 3, 6, 4, 12
RULES = {"teachers": "later", "anneal_threshold": 0.4, "label_smoothing": 0.1, "distill_loss": "kl"}


class Network(nn.Module):
    """One linear exit after another, enough for different logits at each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXITS))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(EXITS))

    def forward(self, x):
        logits = []
        for layer, head in zip(self.layers, self.heads):
            x = layer(x).tanh()
            logits.append(head(x))
        return logits


def global_batch(step):
    """Images and labels; the first rank gets nearly all labels, in some steps there is none at all."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, WIDTH, generator=generator)
    labels = (images @ torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(99))).argmax(1)
    labels[
        (torch.rand(BATCH, generator=generator) < 0.3) | (torch.arange(BATCH) >= 5) & (torch.arange(BATCH) != 7)
    ] = -100
    if step % 10 == 9:
        labels[:] = -100
    return images, labels


def train(rank=0, ranks=1, passes=1, reduce=lambda tensor: tensor):
    """SGD as the training loop does it; returns per step the loss, gradient and temperature, and the summed statistics."""
    network, criterion = Network(), ExitDistillation.from_config(LossConfig(**RULES), EXITS)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    history, statistics = [], 0
    for step in range(STEPS):
        images, labels = global_batch(step)
        labeled = max(1, int((labels >= 0).sum())) / (ranks * passes)
        part = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        confidence, value = torch.zeros(2), torch.zeros(())
        optimizer.zero_grad()
        for x, y in zip(images[part].chunk(passes), labels[part].chunk(passes)):
            loss, stats = criterion(network(x), y, labeled=labeled)
            (loss / passes).backward()
            confidence += torch.stack([stats.confidence, stats.samples])
            value += loss.detach() / passes
            statistics = statistics + stats.vector
        gradient = reduce(torch.cat([p.grad.flatten() for p in network.parameters()])) / ranks
        for p, g in zip(network.parameters(), gradient.split([p.numel() for p in network.parameters()])):
            p.grad = g.view_as(p)
        history.append([reduce(value) / ranks, gradient, criterion.temperature.clone()])
        optimizer.step()
        criterion.end_batch(reduce(confidence))
    return history, reduce(statistics)


def train_on_this_rank(rank, ranks, port):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)

    def reduce(tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    result = train(rank, ranks, 1, reduce), train(rank, ranks, 2, reduce)
    dist.destroy_process_group()
    return result


def train_from_environment():
    import os

    return train_on_this_rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"]))


@pytest.fixture(scope="module")
def alone():
    return train()


def assert_same_training(history, statistics, alone):
    moved = [float(temperature[0]) for _, _, temperature in alone[0]]
    assert 1.0 in moved
    assert len(set(moved)) > 4
    for (loss, gradient, temperature), (right_loss, right_gradient, right_temperature) in zip(history, alone[0]):
        torch.testing.assert_close(loss, right_loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, right_gradient, rtol=1e-3, atol=1e-5)
        assert torch.equal(temperature, right_temperature)
    torch.testing.assert_close(statistics, alone[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_unequal_labels_train_as_one(ranks, alone, world_size):
    results = ranks(train_from_environment, world_size)
    for result in results:
        for history, statistics in result:
            assert_same_training(history, statistics, alone)


def test_passes_with_unequal_labels_train_as_one(alone):
    assert_same_training(*train(passes=3), alone)
