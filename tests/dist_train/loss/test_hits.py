"""Top-1 and top-5, counted beside the loss."""

from __future__ import annotations

import torch

from dist_train.config import LossConfig
from dist_train.loss.objective import ExitDistillation, LabelMix


def test_hits_count_the_first_of_equal_logits():
    logits = torch.tensor([[0.0, 1, 1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]]).repeat(3, 1)
    labels = torch.tensor([2, 6, 1, 4, 3, -100])
    #      label 2: behind one equal      6: 6 before    1: first    4: 4 before    3: 4 before    none
    stats = ExitDistillation.from_config(LossConfig(teachers="none"), 1)([logits], labels).stats
    assert stats.top1.tolist() == [1]
    assert stats.top5.tolist() == [4]
    assert stats.labeled == 5


def test_hits_are_those_of_sorting():
    torch.manual_seed(7)
    logits = [(3 * torch.randn(200, 30)).bfloat16() for _ in range(2)]
    labels = torch.randint(30, (200,))
    stats = ExitDistillation.from_config(LossConfig(), 2)(logits, labels).stats
    for m, z in enumerate(logits):
        order = z.sort(dim=1, descending=True, stable=True).indices
        hits = order == labels[:, None]
        assert int(stats.top1[m]) == int(hits[:, 0].sum())
        assert int(stats.top5[m]) == int(hits[:, :5].sum())


def test_hits_of_mixed_images_are_those_of_the_larger_share():
    logits = torch.eye(3)
    mix = LabelMix(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2]), torch.tensor([0.6, 0.5, 0.4]))
    assert ExitDistillation.from_config(LossConfig(), 1)([logits], mix).stats.top1.tolist() == [2]
    soft = torch.tensor([[0.6, 0.4, 0], [0.4, 0.6, 0], [0, 0.4, 0.6]])
    assert ExitDistillation.from_config(LossConfig(), 1)([logits], soft).stats.top1.tolist() == [3]
