"""The objective against what the authors' code gives (float64, nine digits), and the presets against the paper and that code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dist_train.config import LossConfig
from dist_train.loss.objective import ExitDistillation

SUM = {"weight": 1.0, "reduction": "sum"}
CONSTANT = {"temperature_rule": "constant"}
DEEPER = [1 / (1 + 0.5 * teachers) for teachers in (3, 2, 1, 0)]
GOLDEN = {
    "ClassificationOnly": (
        {"teachers": "none", "alpha": 0.0},
        [0, 2, 4],
        [9.05303436],
        0,
        [0.651249, 0.585806, 0.491144, 0.540297],
    ),
    "DistillationBased": (
        {},
        [0, 2, 4],
        [9.08070638, 9.37324971, 9.68931359],
        3,
        [0.500221, 0.473813, 0.361377, 0.270149],
    ),
    "DistillationBased, scale 2.5, maxprob 0.3": (
        {"weight": 2.5, "anneal_threshold": 0.3},
        [0, 2, 4],
        [22.70176596, 23.43312427, 24.22328396],
        3,
        [1.250551, 1.184533, 0.903442, 0.675371],
    ),
    "ConstTemp": (
        {"temperature": 4.0, **CONSTANT},
        [0, 2, 4],
        [45.90405090],
        0,
        [0.573599, 0.562484, 0.376279, 0.270149],
    ),
    "DistillationBased, one unlabeled": (
        {},
        [0, -100, 4],
        [9.26194622, 9.55448955],
        2,
        [0.551456, 0.479726, 0.472675, 0.362798],
    ),
    "Next": ({"teachers": "next"}, [0, 2, 4], [7.53498678, 7.78666525], 2, [0.417002, 0.421946, 0.361377, 0.270149]),
    "Later": ({"teachers": "later"}, [0, 2, 4], [8.44979646, 8.72517598], 2, [0.467101, 0.436919, 0.361377, 0.270149]),
    "Last, weight_last False": (
        {"label_weights": (1, 1, 1, 2)},
        [0, 2, 4],
        [9.95233715, 10.24488047],
        2,
        [0.500221, 0.473813, 0.361377, 0.540297],
    ),
    "EnsembleDist": (
        {"teachers": "ensemble", "temperature": 2.0, **CONSTANT},
        [0, 2, 4],
        [19.02959648],
        0,
        [0.457758, 0.386988, 0.305306, 0.379893],
    ),
    "MaxprobEnsemble": ({"teachers": "ensemble"}, [0, 2, 4], [9.18187127], 0, [0.429140, 0.364564, 0.300750, 0.356670]),
    "DistillFromDeeper": (
        {
            "teachers": "later",
            "temperature": 2.0,
            **CONSTANT,
            "label_weights": [2 * share for share in DEEPER],
            "distill_weights": [2 * (1 - share) for share in DEEPER],
        },
        [0, 2, 4],
        [16.34660973],
        0,
        [0.485893, 0.481578, 0.396846, 0.540297],
    ),
    # Exit 0 has three better later exits, exit 1 two; there each teacher weighs C, here they share a weight.
    "Selective": (
        {"teachers": "better", "temperature": 2.0, **CONSTANT, "label_weights": 2, "distill_weights": (3, 2, 1, 1)},
        [0, 2, 4],
        [28.98969351],
        0,
        [1.214732, 0.963156, 0.491144, 0.540297],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_values_of_the_authors_code(name):
    fields, labels, values, annealed, norms = GOLDEN[name]
    criterion = ExitDistillation.from_config(LossConfig(**{**SUM, **fields}), 4).double()
    start = float(criterion.temperature[0])
    m, b, k = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (4, 3, 5)), indexing="ij")
    for call, value in enumerate(values):
        logits = [z.clone().requires_grad_() for z in 2 * torch.sin(1.3 * m + 0.7 * b + 2.1 * k)]
        out = criterion(logits, torch.tensor(labels))
        # Weights are kept in float32: eight digits of 0.4, for instance.
        assert float(out.loss.detach()) == pytest.approx(value, rel=6e-8)
        if call == 0:
            grads = torch.autograd.grad(out.loss, logits)
            assert [float(gradient.norm()) for gradient in grads] == pytest.approx(norms, abs=1.01e-6)
            if criterion.config.teachers in ("last", "next", "later") and start == 1:
                assert float(out.stats.confidence / 3) == pytest.approx(0.55460333, rel=2e-7)
        criterion.end_batch((out.stats.confidence, out.stats.samples))
    assert criterion.temperature.tolist() == pytest.approx([start * 1.05**annealed] * 4, rel=1e-12)


def test_presets_are_the_paper_and_ten_elevenths_of_the_authors_sum():
    logits, labels = [3 * torch.randn(6, 10) for _ in range(11)], torch.arange(6)
    paper, authors, total = (
        ExitDistillation.from_config(LossConfig(**fields), 11)(logits, labels).loss
        for fields in ({"preset": "paper"}, {"preset": "authors"}, SUM)
    )
    torch.testing.assert_close(authors, total * (2 * 5 / 11))
    torch.testing.assert_close(paper, total * (2 / 11))
    teacher = logits[-1].detach().softmax(1)
    by_hand = sum(F.cross_entropy(z, labels) for z in logits) / 11
    by_hand += sum(-(teacher * z.log_softmax(1)).sum(1).mean() for z in logits[:-1]) / 11
    torch.testing.assert_close(paper, by_hand)


def test_exitwise_baselines_are_the_label_part_of_the_presets_and_the_authors_plain_sum():
    logits, labels = [3 * torch.randn(6, 10) for _ in range(5)], torch.arange(6)
    plain = sum(F.cross_entropy(z, labels) for z in logits)
    for fields, factor in (
        ({"teachers": "none"}, 1 / 5),
        ({"preset": "authors", "teachers": "none"}, 5 / 5),
        ({"teachers": "none", "alpha": 0.0, **SUM}, 1.0),
    ):
        loss = ExitDistillation.from_config(LossConfig(**fields), 5)(logits, labels).loss
        torch.testing.assert_close(loss, factor * plain)
