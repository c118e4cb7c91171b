"""The objective against the plain formula: targets, teachers, extremes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dist_train.config import LossConfig
from dist_train.loss.objective import ExitDistillation, LabelMix, teacher_matrix

SHAPES = [
    (1, 1, 1),
    (2, 3, 1),
    (3, 7, 10),
    (5, 33, 100),
    (11, 4, 100),
    (16, 2, 7),
    (3, 9, 1000),
    (2, 2, 21_841),
    (4, 1, 13),
]
TEACHERS = ["last", "next", "later", "ensemble", "none"]
# Two roundings to the dtype: the stored gradient, and its product with that of the loss.
ACCURACY = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1.1e-3}


def make_logits(exits, samples, classes, dtype=torch.float32):
    return [(3 * torch.randn(samples, classes)).to(dtype).requires_grad_() for _ in range(exits)]


def one_hot(labels, classes):
    return F.one_hot(labels.clamp(min=0), classes) * (labels >= 0).unsqueeze(1)


def assert_same(plain, criterion, logits, targets, distributions, **extra):
    """Loss, gradient and statistics are those of the plain formula."""
    config, labeled = criterion.config, max(1, int((distributions.sum(1) > 0).sum()))
    out = criterion(logits, targets, **extra)
    expected = plain(
        logits,
        distributions,
        teachers=criterion.teachers,
        label_weights=criterion.label_weights,
        distill_weights=criterion.distill_weights,
        temperature=criterion.temperature,
        labeled=labeled,
        smoothing=config.label_smoothing,
        cross_entropy=config.distill_loss == "cross_entropy",
        **extra,
    )
    close = {"rtol": 1e-5, "atol": 1e-5 * len(distributions)}
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.stats.label_loss.double(), expected.label_loss.double(), **close)
    torch.testing.assert_close(out.stats.kl.double(), expected.kl.double(), **close)
    assert int(out.stats.labeled) == int((distributions.sum(1) > 0).sum())
    assert int(out.stats.samples) == len(distributions)
    assert int(out.stats.nonfinite) == int(out.stats.bad_labels) == 0
    grads = torch.autograd.grad(out.loss, logits)
    largest = max(float(gradient.abs().max()) for gradient in expected.grads)
    for gradient, right in zip(grads, expected.grads):
        assert gradient.dtype == logits[0].dtype
        least = 6e-8 if gradient.dtype == torch.float16 else 1e-9
        torch.testing.assert_close(gradient.double(), right, rtol=ACCURACY[gradient.dtype], atol=1e-6 * largest + least)


@pytest.mark.parametrize("dtype", list(ACCURACY), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(plain, shape, dtype):
    torch.manual_seed(0)
    exits, samples, classes = shape
    logits = make_logits(*shape, dtype)
    labels = torch.randint(classes, (samples,))
    criterion = ExitDistillation.from_config(LossConfig(teachers="later", temperature=1.7, weight=3.0), exits)
    assert_same(plain, criterion, logits, labels, one_hot(labels, classes))


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
@pytest.mark.parametrize("temperature", [1.0, 4.0, (1.0, 0.5, 2.0, 3.0)], ids=str)
@pytest.mark.parametrize("teachers", [*TEACHERS, ((0, 1, 0, 2), (0.5, 0, 0, 0), (0, 0, 0, 0), (0, 0, 3, 0))], ids=str)
def test_teachers_temperatures_and_forms(plain, teachers, temperature, form):
    torch.manual_seed(1)
    config = LossConfig(
        teachers=teachers,
        temperature=temperature,
        distill_loss=form,
        alpha=0.3,
        label_weights=(1, 0, 2, 0.5),
        distill_weights=(1, 2, 0, 3),
    )
    labels = torch.tensor([3, -100, 0, 9, -100])
    assert_same(plain, ExitDistillation.from_config(config, 4), make_logits(4, 5, 10), labels, one_hot(labels, 10))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["labels", "none labeled", "soft", "mix"])
def test_targets(plain, kind, smoothing, weighted):
    torch.manual_seed(2)
    exits, samples, classes = 3, 8, 10
    labels = torch.randint(classes, (samples,))
    labels[1] = labels[6] = -100
    targets, distributions = labels, one_hot(labels, classes)
    if kind == "none labeled":
        targets = torch.full((samples,), -100)
        distributions = one_hot(targets, classes)
    elif kind == "soft":
        targets = distributions = torch.rand(samples, classes).softmax(1) * (labels >= 0).unsqueeze(1)
    elif kind == "mix":
        second, share = torch.randint(classes, (samples,)), torch.rand(samples)
        second[3] = -100
        targets = LabelMix(labels, second, share)
        known = ((labels >= 0) & (second >= 0)).unsqueeze(1)
        distributions = known * (
            share[:, None] * one_hot(labels, classes) + (1 - share)[:, None] * one_hot(second, classes)
        )
    extra = {"weights": torch.rand(samples)} if weighted else {}
    config = LossConfig(teachers="later", temperature=2.0, label_smoothing=smoothing, distill_loss="kl")
    criterion = ExitDistillation.from_config(config, exits)
    assert_same(plain, criterion, make_logits(exits, samples, classes), targets, distributions, **extra)


def test_a_batch_in_many_chunks_is_the_same(plain, monkeypatch):
    monkeypatch.setattr("dist_train.loss.cpu.CHUNK", 100)
    torch.manual_seed(3)
    labels = torch.randint(10, (17,))
    labels[4] = -100
    criterion = ExitDistillation.from_config(LossConfig(teachers="ensemble", temperature=2.0), 3)
    extra = {"weights": torch.rand(17)}
    assert_same(plain, criterion, make_logits(3, 17, 10, torch.bfloat16), labels, one_hot(labels, 10), **extra)


@pytest.mark.parametrize("chunk", [100, 1 << 19])
def test_statistics_are_float32_whatever_the_logits_are(chunk, monkeypatch):
    monkeypatch.setattr("dist_train.loss.cpu.CHUNK", chunk)
    criterion = ExitDistillation.from_config(LossConfig(), 3).double()
    loss, stats = criterion(make_logits(3, 17, 10, torch.float64), torch.randint(10, (17,)))
    assert (loss.dtype, stats.vector.dtype) == (torch.float64, torch.float32)


def test_strided_rows(plain):
    torch.manual_seed(4)
    wide = torch.randn(6, 3, 20)
    logits = [wide[:, m, 5:15].requires_grad_() for m in range(3)]
    labels = torch.randint(10, (6,))
    assert_same(plain, ExitDistillation.from_config(LossConfig(), 3), logits, labels, one_hot(labels, 10))


def test_gradcheck():
    torch.manual_seed(5)
    labels = torch.tensor([1, -100, 0])
    for config in (
        LossConfig(teachers="none", alpha=0.0),
        LossConfig(teachers="none", label_smoothing=0.2, temperature=2.0),
    ):
        criterion = ExitDistillation.from_config(config, 3).double()
        logits = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        assert torch.autograd.gradcheck(lambda *z, c=criterion: c(z, labels).loss, logits)
    # Teachers are constants, so with distillation only a student that teaches nobody can be checked by differences.
    criterion = ExitDistillation.from_config(LossConfig(teachers="later", temperature=(2.0, 3.0, 1.0)), 3).double()
    first, *rest = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda z: criterion([z, *rest], labels).loss, first.requires_grad_())


def test_teachers_get_no_gradient():
    logits = make_logits(3, 4, 5)
    criterion = ExitDistillation.from_config(LossConfig(alpha=1.0), 3)
    *students, teacher = torch.autograd.grad(criterion(logits, torch.zeros(4, dtype=torch.int64)).loss, logits)
    assert not teacher.any()
    assert all(gradient.any() for gradient in students)


def test_best_and_better_follow_the_label_losses():
    labels = torch.zeros(4, dtype=torch.int64)
    right = torch.zeros(4, 5).index_fill_(1, torch.tensor([0]), 1.0)
    logits = [strength * right for strength in (1.0, 3.0, 0.5, 2.0)]
    matrices = {
        "best": [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]],
        "better": [[0, 0.5, 0, 0.5], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]],
    }
    for teachers, matrix in matrices.items():
        fields = {"temperature": 2.0, "distill_weights": (1, 2, 3, 4)}
        by_rule = ExitDistillation.from_config(LossConfig(teachers=teachers, **fields), 4)(logits, labels)
        by_hand = ExitDistillation.from_config(LossConfig(teachers=matrix, **fields), 4)(logits, labels)
        torch.testing.assert_close(by_rule.loss, by_hand.loss)
        torch.testing.assert_close(by_rule.stats.vector, by_hand.stats.vector)
    unlabeled = torch.full((4,), -100)
    for teachers, same in (("best", "last"), ("better", "later")):
        losses = [
            ExitDistillation.from_config(LossConfig(teachers=t), 4)(logits, unlabeled).loss for t in (teachers, same)
        ]
        torch.testing.assert_close(*losses)


def test_confidence_is_that_of_the_deepest_exits_teacher():
    torch.manual_seed(6)
    logits, labels = make_logits(3, 5, 4), torch.zeros(5, dtype=torch.int64)
    softened = [(z / 2).softmax(1) for z in logits]
    for teachers, mixture in (
        ("last", softened[2]),
        ("later", softened[2]),
        ("ensemble", sum(softened) / 3),
        ("none", softened[2]),
        (((0, 0, 1), (3, 0, 1), (0, 0, 0)), (3 * softened[0] + softened[2]) / 4),
    ):
        stats = ExitDistillation.from_config(LossConfig(teachers=teachers, temperature=2.0), 3)(logits, labels).stats
        torch.testing.assert_close(stats.confidence, mixture.amax(1).sum().detach())


def test_rows_of_presets_share_a_weight_of_one():
    losses = torch.tensor([3.0, 1.0, 2.0])
    for teachers, taught in (
        ("last", 2),
        ("next", 2),
        ("later", 2),
        ("ensemble", 3),
        ("best", 2),
        ("better", 1),
        ("none", 0),
    ):
        assert sorted(teacher_matrix(teachers, 3, losses).sum(1).tolist()) == sorted(
            [1.0] * taught + [0.0] * (3 - taught)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_huge_and_equal_logits(plain, dtype):
    logits = [
        torch.tensor([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]]).to(dtype).requires_grad_(),
        torch.tensor([[1e4, 1e4, -1e4], [0, 0, 0], [1e4, 1e4 - 8, 1e4]]).to(dtype).requires_grad_(),
    ]
    labels = torch.tensor([1, 0, 2])
    criterion = ExitDistillation.from_config(LossConfig(temperature=3.0), 2)
    assert_same(plain, criterion, logits, labels, one_hot(labels, 3))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_classes_are_as_if_they_were_not_there(smoothing):
    torch.manual_seed(8)
    kept = torch.tensor([0, 2, 3, 6])
    small = [torch.randn(5, 4).requires_grad_() for _ in range(3)]
    large = [torch.full((5, 7), -torch.inf).index_copy(1, kept, z.detach()).requires_grad_() for z in small]
    labels = torch.tensor([0, 3, -100, 1, 2])
    criterion = ExitDistillation.from_config(
        LossConfig(teachers="later", temperature=2.0, label_smoothing=smoothing), 3
    )
    narrow, wide = (
        criterion(small, labels),
        criterion(large, torch.where(labels < 0, labels, kept[labels.clamp(min=0)])),
    )
    torch.testing.assert_close(wide.loss, narrow.loss)
    torch.testing.assert_close(wide.stats.vector, narrow.stats.vector)
    for few, many in zip(torch.autograd.grad(narrow.loss, small), torch.autograd.grad(wide.loss, large)):
        torch.testing.assert_close(many.index_select(1, kept), few)
        assert int((many != 0).sum()) <= few.numel()


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, "all -inf"], ids=str)
@pytest.mark.parametrize("teachers", ["last", "later", "none"])
def test_a_bad_sample_leaves_the_others_alone(teachers, fault):
    torch.manual_seed(9)
    logits = [torch.randn(6, 5) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, -100, 4])
    others = torch.tensor([0, 1, 3, 4, 5])
    criterion = ExitDistillation.from_config(LossConfig(teachers=teachers, temperature=2.0), 3)
    clean = criterion([z[others] for z in logits], labels[others])
    sound = [z.clone().requires_grad_() for z in logits]
    right = torch.autograd.grad(criterion(sound, labels).loss, sound)
    if fault == "all -inf":
        logits[1][2] = -torch.inf
    else:
        logits[1][2, 3] = fault
    broken = [z.requires_grad_() for z in logits]
    out = criterion(broken, labels)
    assert out.loss.isnan()
    assert out.stats.nonfinite == 1
    assert out.stats.samples == 6
    torch.testing.assert_close(out.stats.vector[:-4], clean.stats.vector[:-4])
    assert out.stats.labeled == clean.stats.labeled
    for gradient, expected in zip(torch.autograd.grad(out.loss, broken), right):
        assert gradient[2].isnan().all()
        torch.testing.assert_close(gradient[others], expected[others])


def test_small_gradients_survive_in_fp16():
    """The loss scale multiplies the gradient before it is rounded to fp16, as if the loss had been scaled first."""
    torch.manual_seed(10)
    logits = make_logits(4, 4096, 100, torch.float16)
    criterion = ExitDistillation.from_config(LossConfig(), 4)
    gradient = torch.autograd.grad(criterion(logits, torch.zeros(4096, dtype=torch.int64)).loss * 1024, logits)[0]
    single = [z.detach().float().requires_grad_() for z in logits]
    right = torch.autograd.grad(criterion(single, torch.zeros(4096, dtype=torch.int64)).loss * 1024, single)[0]
    assert float((gradient.float() - right).norm() / right.norm()) < 1e-3
    assert float((right / 1024).half().float().sub(right / 1024).norm() / (right / 1024).norm()) > 1e-3


def test_the_stage_of_the_last_exit_alone_has_its_cross_entropy_and_keeps_the_temperature() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(8, 5, requires_grad=True) for _ in range(3)]
    labels = torch.randint(5, (8,))
    objective = ExitDistillation(LossConfig(anneal_threshold=0.0), 3)
    both = objective(logits, labels).loss
    objective.use_last_exit_alone()
    loss, stats = objective(logits, labels)
    loss.backward()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[2], labels))
    assert not any(tensor.grad.any() for tensor in logits[:2])
    objective.end_batch((stats.confidence, stats.samples))
    assert (objective.temperature == 1).all()
    assert objective.step == 0
    objective.use_last_exit_alone(False)
    assert objective(logits, labels).loss == both
    objective.end_batch((stats.confidence, stats.samples))
    assert (objective.temperature > 1).all()
    assert objective.step == 1


@pytest.mark.parametrize("teachers", TEACHERS)
def test_the_gradients_of_several_passes_add_up_to_their_mean(teachers):
    torch.manual_seed(0)
    criterion = ExitDistillation(LossConfig(teachers=teachers), 3)
    logits, labels = make_logits(3, 8, 5), torch.randint(5, (8,))
    whole, part = (criterion(logits, labels, labeled=3.0, passes=passes) for passes in (1, 4))
    torch.testing.assert_close(part.loss, whole.loss / 4)
    torch.testing.assert_close(part.stats.vector, whole.stats.vector)
    for quarter, gradient in zip(torch.autograd.grad(part.loss, logits), torch.autograd.grad(whole.loss, logits)):
        torch.testing.assert_close(quarter, gradient / 4)
