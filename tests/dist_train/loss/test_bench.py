"""``dist-train bench loss``: what it compares is the same objective, and what it writes can be read."""

from __future__ import annotations

import json

import pytest
import torch

from dist_train.bench import loss as bench


@pytest.mark.parametrize("exits", [2, 5])
def test_all_ways_compute_the_same(exits):
    torch.manual_seed(0)
    logits = [torch.randn(8, 12).requires_grad_() for _ in range(exits)]
    targets = torch.randint(12, (8,))
    results = []
    for objective in (bench.pairwise, bench.fused(exits, torch.device("cpu"))):
        loss = objective(logits, targets)
        results.append([loss, *torch.autograd.grad(loss, logits)])
    for pairs, fused in zip(*results):
        torch.testing.assert_close(pairs, fused)


def test_the_file_holds_every_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "TURN", 0.0)
    rows = bench.bench_loss(tmp_path / "bench.json", shapes=[(2, 4, 10), (5, 8192, 1000)])
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [row["way"] for row in document["rows"]] == ["pairs", "compiled pairs", "fused"] * 2
    assert [row["dtype"] for row in document["rows"]] == ["float32"] * 3 + ["bfloat16"] * 3
    assert document["rows"][0]["least_bytes"] == 2 * 2 * 4 * 10 * 4
    for row in rows:
        assert row.milliseconds > 0
        assert row.speedup.keys() == {"pairs", "compiled pairs", "fused"} - {row.way}
    assert "5 x 8192 x 1000  left out: no GPU" in capsys.readouterr().out
