from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.config import DataConfig, LossConfig
from dist_train.data.mix import mix, partners, shares
from dist_train.data.pipeline import Loader
from dist_train.loss.objective import ExitDistillation, LabelMix
from shards.index import UNLABELED, Index

MakeLoader = Callable[..., Loader]
BOTH = {"mixup": 0.4, "cutmix": 1.0}


def data(**options: float) -> DataConfig:
    return DataConfig(shards=Path("x"), **options)  # type: ignore[arg-type]


def test_images_are_mixed_as_their_parameters_say() -> None:
    images = torch.rand(9, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    labels, views = np.array([3, -100, 1, 0, -100, 2, 2, 5, 4]), np.arange(100, 109)
    mixed, targets = mix(data(**BOTH), 1, 2, views, images, labels)
    share, anchor, shape = shares(data(**BOTH), 1, 2, views, 16)
    partner = [8, 4, 7, 6, 1, 5, 3, 2, 0]
    kinds = set()
    for row, other in enumerate(partner):
        y, x, tall, wide = *anchor[row], *shape[row]
        expected = images[row].clone()
        if tall:
            expected[:, y : y + tall, x : x + wide] = images[other][:, y : y + tall, x : x + wide]
            assert share[row] == pytest.approx(1 - tall * wide / 256)
        else:
            expected = share[row] * images[row] + (1 - share[row]) * images[other]
        kinds.add(bool(tall))
        assert torch.allclose(mixed[row], expected, atol=1e-6)
    assert kinds == {True, False}
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert targets.first.tolist() == labels.tolist()
    assert targets.second.tolist() == labels[partner].tolist()
    assert targets.share.tolist() == share.tolist()


def test_shares_are_drawn_from_the_beta_distribution() -> None:
    views = np.arange(40_000)
    for alpha in (0.2, 1.0, 3.0):
        for kind in ("mixup", "cutmix"):
            share, _, shape = shares(data(**{kind: alpha}), 0, 0, views, 224)
            assert (shape.prod(axis=1) > 0).mean() == pytest.approx(float(kind == "cutmix"), abs=0.2)
            if kind == "mixup":
                assert (share.mean(), share.var()) == pytest.approx((0.5, 1 / (8 * alpha + 4)), abs=0.01)
    both = shares(data(**BOTH), 0, 0, views, 224)
    alone = shares(data(**BOTH), 0, 0, views[700:701], 224)
    assert all(np.array_equal(whole[700], single[0]) for whole, single in zip(both, alone))


def test_partners_are_of_the_same_kind() -> None:
    labeled = np.array([True, False, False, True, True, False])
    assert partners(labeled).tolist() == [4, 5, 2, 3, 0, 1]
    assert partners(np.zeros(0, dtype=bool)).tolist() == []


def test_mixed_batches_are_the_same_on_any_number_of_ranks_and_the_loss_takes_them(
    digits: Path, tmp_path: Path, make_loader: MakeLoader
) -> None:
    index = Index.load(digits / "train")
    for path in (digits / "train").glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    replace(index, label=np.where(np.arange(len(index)) % 3 == 0, index.label, UNLABELED)).save(tmp_path)
    options = {"micro_batch": 8, "labeled_fraction": 0.5, **BOTH}
    whole = [list(batch) for batch in make_loader(tmp_path, **options).epoch(1, start_batch=5)]
    loaders = [make_loader(tmp_path, rank=rank, world_size=3, **options) for rank in range(3)]
    together = [
        [micro for batch in group for micro in batch] for group in zip(*(loader.epoch(1) for loader in loaders))
    ][5:]
    criterion = ExitDistillation.from_config(LossConfig(), 2)
    for ours, theirs in zip(whole, together, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.images, b.images)
            assert isinstance(a.targets, LabelMix)
            assert isinstance(b.targets, LabelMix)
            assert all(torch.equal(x, y) for x, y in zip(a.targets, b.targets))
        logits = [torch.randn(8, 10) for _ in range(2)]
        stats = [criterion(logits, micro.targets).stats for micro in ours]
        # As many labeled samples as the loader says: no mixing of a labeled image with an unlabeled one.
        assert sum(int(stat.labeled) for stat in stats) == 24
    plain = make_loader(tmp_path, train=False, **BOTH).evaluation()
    assert all(micro.targets is micro.labels for micro in plain)
