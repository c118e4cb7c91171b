"""The Triton kernels against the CPU's operator: run by test_kernel.py in Triton's interpreter (TRITON_INTERPRET=1), by tests/gpu on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from dist_train.config import LossConfig
from dist_train.loss import gpu_launch
from dist_train.loss.cpu import exit_loss_cpu
from dist_train.loss.inputs import ExitWeights, Targets
from dist_train.loss.objective import ExitDistillation, ExitStats

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
# A GPU's exponentials and reciprocals are right to a few units in the last place.
ACCURACY = {torch.float32: 2e-6 if DEVICE == "cpu" else 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def to(device, given):
    """Tensors, in whatever tuples and lists they are, on the device."""
    if isinstance(given, torch.Tensor):
        # Strides stay as they are.
        return (
            given
            if given.device.type == device
            else torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=device).copy_(given)
        )
    if isinstance(given, list | tuple):
        moved = [to(device, one) for one in given]
        return type(given)(*moved) if hasattr(given, "_fields") else type(given)(moved)
    return given


def exit_loss_gpu(*given):
    """The kernels' results, on the CPU."""
    return to("cpu", gpu_launch.exit_loss_gpu(*to(DEVICE, given)))


def arguments(logits, targets, second=None, lam=None, weights=None, with_grad=True, labeled=3.0, **fields):
    """What the operators are given."""
    criterion = ExitDistillation.from_config(
        LossConfig(**{"teachers": "later", "temperature": 2.0, **fields}), len(logits)
    )
    names = ("label_weights", "distill_weights", "teachers", "confidence_weights", "temperature")
    exits = ExitWeights(*(getattr(criterion, name) for name in names), torch.tensor(labeled))
    return logits, Targets(targets, second, lam, weights), exits, criterion._options(with_grad)


def assert_same(given):
    loss, vector, grads = exit_loss_gpu(*given)
    right_loss, right_vector, right_grads = exit_loss_cpu(*given)
    torch.testing.assert_close(loss, right_loss, rtol=ACCURACY[torch.float32], atol=1e-6)
    torch.testing.assert_close(vector, right_vector, rtol=1e-5, atol=1e-5)
    assert grads.dtype == right_grads.dtype
    assert grads.shape == right_grads.shape
    atol = 2e-6 * float(right_grads.abs().max()) if grads.numel() else 0
    torch.testing.assert_close(grads, right_grads, rtol=ACCURACY[grads.dtype], atol=atol)


def random_logits(exits, samples, classes, dtype=torch.float32):
    torch.manual_seed(exits + samples + classes)
    return [(3 * torch.randn(samples, classes)).to(dtype) for _ in range(exits)]


@pytest.mark.parametrize(
    ("exits", "samples", "classes"),
    [(1, 1, 1), (3, 20, 10), (5, 2, 100), (7, 1, 33), (11, 2, 100), (16, 1, 5), (2, 2, 1000), (2, 1, 5000)],
)
def test_shapes(exits, samples, classes):
    targets = torch.randint(classes, (samples,))
    assert_same(arguments(random_logits(exits, samples, classes), targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dtypes_have_ties_too(dtype, smoothing):
    logits = random_logits(3, 12, 50, dtype)
    for z in logits:
        z[6:].clamp_(-1, 2)  # in bf16 and fp16 the label is then often one of several equal maxima
    assert_same(arguments(logits, torch.randint(50, (12,)), label_smoothing=smoothing))


RULES = ["last", "next", "later", "ensemble", "none", ((0, 0.5, 0, 1), (0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 2, 0))]


@pytest.mark.parametrize("fields", [{}, {"distill_loss": "kl", "temperature": (1.0, 0.5, 3.0, 1.0)}], ids=str)
@pytest.mark.parametrize("teachers", RULES, ids=str)
def test_rules_of_teachers(teachers, fields):
    """The fixed rules, and the same with sample weights of 1."""
    logits, targets = random_logits(4, 5, 40), torch.tensor([3, -100, 39, 0, 20])
    given = arguments(logits, targets, teachers=teachers, **fields)
    assert_same(given)
    assert_same((given[0], given[1]._replace(weights=torch.ones(5)), *given[2:]))


@pytest.mark.parametrize("teachers", ["last", "next", "later", "ensemble", "none"])
def test_masked_classes(teachers):
    """Classes masked in all exits, all but one class, and some in a teacher alone."""
    logits = random_logits(3, 4, 40)
    for z in logits:
        z[:, ::3] = -torch.inf
        z[1] = torch.where(torch.arange(40) == 5, 0.5, -torch.inf)
    if teachers != "ensemble":  # a class that only the student masks has an infinite loss
        logits[2][3, 20:30] = -torch.inf
    targets = torch.tensor([1, 5, -100, 4])
    assert_same(arguments(logits, targets, teachers=teachers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 32, 33, 300])
def test_padded_and_unpadded_rows(classes, dtype):
    assert_same(arguments(random_logits(3, 3, classes, dtype), torch.randint(classes, (3,))))


def test_the_kernels_agree_with_the_plain_formula(plain):
    """In float64, as the operator on a CPU does: tests of it alone would not see an error that both share."""
    logits, labels = random_logits(4, 6, 30), torch.tensor([3, 29, -100, 0, 7, 7])
    distributions = torch.nn.functional.one_hot(labels.clamp(min=0), 30) * (labels >= 0).unsqueeze(1)
    for teachers in RULES:
        for smoothing in (0.0, 0.1):
            given = arguments(
                logits, labels, teachers=teachers, label_smoothing=smoothing, distill_loss="kl", labeled=5.0
            )
            loss, vector, grads = exit_loss_gpu(*given)
            constants = given[2]._asdict()
            del constants["confidence_weights"], constants["label_count"]
            right = plain(logits, distributions, **constants, labeled=5.0, smoothing=smoothing, cross_entropy=False)
            torch.testing.assert_close(loss.double(), right.loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ExitStats(vector, 4).kl, right.kl, rtol=1e-5, atol=1e-5)
            for gradient, expected in zip(grads, right.grads):
                torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"distill_loss": "kl", "temperature": (1.0, 0.5, 3.0)},
        {"teachers": "ensemble", "label_smoothing": 0.1},
        {"teachers": "none"},
        {"teachers": ((0, 2, 0.5), (0, 0, 1), (1, 0, 0)), "label_weights": (0, 1, 2)},
        {"with_grad": False},
        {"labeled": 0.5},
    ],
    ids=str,
)
def test_objectives(fields):
    assert_same(arguments(random_logits(3, 4, 10), torch.tensor([1, -100, 9, 0]), **fields))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("kind", "classes"), [("labels", 40), ("mix", 40), ("soft", 40), ("labels", 4100), ("mix", 4100)]
)
def test_targets(kind, classes, smoothing, weighted):
    """Integer labels in a single pass, and with many classes by the general kernel."""
    logits = random_logits(3, 5, classes)
    targets, second, share = torch.tensor([1, -100, 39, 0, 20]), None, None
    if kind == "soft":
        targets = torch.rand(5, 40).softmax(1)
        targets[2] = 0
    elif kind == "mix":
        # The last sample is mixed with one of its own class.
        second, share = torch.tensor([2, 3, -100, 7, 20]), torch.rand(5)
    weights = torch.rand(5) if weighted else None
    assert_same(arguments(logits, targets, second, share, weights, label_smoothing=smoothing))


@pytest.mark.parametrize("teachers", ["last", "next", "later", "ensemble", "none"])
def test_smoothed_and_mixed_targets_with_masked_classes(teachers):
    """Smoothing is over the classes that are not masked; a second label that is masked has an infinite loss."""
    logits = random_logits(3, 4, 40)
    for z in logits:
        z[:, 3::7] = -torch.inf
    targets, second, share = torch.tensor([1, 5, -100, 4]), torch.tensor([2, 6, 7, 8]), torch.rand(4)
    assert_same(arguments(logits, targets, second, share, teachers=teachers, label_smoothing=0.1))
    assert_same(arguments(logits, targets, teachers=teachers, label_smoothing=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits(smoothing):
    logits = random_logits(3, 4, 40)
    for z in logits:
        z[:, ::3] = -torch.inf
        z[0] *= 1e4
        z[1] = 7.0
    assert_same(arguments(logits, torch.tensor([1, 2, -100, 4]), label_smoothing=smoothing))


@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.1}, {"distill_loss": "kl"}], ids=str)
@pytest.mark.parametrize("classes", [40, 5000])
def test_large_logits_lose_no_digits(plain, classes, fields):
    """Beyond those that float32 has of the logits themselves."""
    logits, labels = [z - 1e4 for z in random_logits(2, 3, classes)], torch.tensor([1, 30, 4])
    given = arguments(logits, labels, **fields)
    loss, _, grads = exit_loss_gpu(*given)
    constants = given[2]._asdict()
    del constants["confidence_weights"], constants["label_count"]
    options = {"smoothing": given[3].smoothing, "cross_entropy": given[3].cross_entropy}
    right = plain(logits, torch.nn.functional.one_hot(labels, classes), **constants, labeled=3.0, **options)
    torch.testing.assert_close(loss.double(), right.loss, rtol=2e-6, atol=0)
    for gradient, expected in zip(grads, right.grads):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=2e-7)


def test_the_rank_of_a_masked_label():
    """Behind the few classes that are not masked, but before what fills a row up."""
    logits = random_logits(2, 3, 10)
    for z in logits:
        z[:2, :7] = -torch.inf
    assert_same(arguments(logits, torch.tensor([0, 3, 3]), teachers="none", alpha=0.0))


@pytest.mark.parametrize(
    ("kind", "unlabeled"),
    [("weights", False), ("weights", True), ("share", False), ("share", True), ("soft", False), ("soft nan", False)],
)
def test_targets_out_of_range_make_the_loss_nan(kind, unlabeled):
    """A GPU is not waited for to look at them, as the CPU's operator does, which raises an error."""
    labels, second, share, weights = torch.tensor([-100 if unlabeled else 1, 2]), None, None, None
    if kind == "weights":
        weights = torch.tensor([-1.0, 1.0])
    elif kind == "share":
        second, share = torch.tensor([3, 4]), torch.tensor([1.5, 0.5])
    else:
        labels = torch.eye(10)[:2]
        labels[0, 3] = -0.1 if kind == "soft" else torch.nan
    loss, _, grads = exit_loss_gpu(*arguments(random_logits(2, 2, 10), labels, second, share, weights))
    # Without labels a share counts for nothing.
    spoilt = not (kind == "share" and unlabeled)
    assert bool(loss.isnan()) == bool(grads.isnan().any()) == spoilt


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, "all -inf"], ids=str)
def test_a_bad_sample(fault, smoothing):
    logits = random_logits(3, 4, 600)
    if fault == "all -inf":
        logits[1][2] = -torch.inf
    else:
        logits[1][2, 599] = fault
    given = arguments(logits, torch.tensor([1, 0, 3, -100]), label_smoothing=smoothing)
    loss, vector, grads = exit_loss_gpu(*given)
    right_loss, right_vector, right_grads = exit_loss_cpu(*given)
    assert loss.isnan()
    assert right_loss.isnan()
    torch.testing.assert_close(vector, right_vector, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, right_grads, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert grads.isnan().all(2).any(0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_label_out_of_range_is_counted_and_spoils_its_own_gradient_only(mixed):
    logits = random_logits(2, 5, 10)
    good, bad = torch.tensor([1, 2, -100, 3, 4]), torch.tensor([1, 10, -100, 3, -7])
    second, share = (torch.tensor([5, 5, 5, 5, 5]), torch.rand(5)) if mixed else (None, None)
    loss, vector, grads = exit_loss_gpu(*arguments(logits, bad, second, share))
    _, right_vector, right_grads = exit_loss_cpu(*arguments(logits, good, second, share))
    stats, right = ExitStats(vector, 2), ExitStats(right_vector, 2)
    assert loss.isnan()
    assert (int(stats.bad_labels), int(stats.labeled), int(stats.samples)) == (2, 2, 5)
    torch.testing.assert_close(stats.kl, right.kl, rtol=1e-5, atol=1e-5)
    kept = torch.tensor([0, 2, 3])
    assert grads[:, [1, 4]].isnan().all()
    torch.testing.assert_close(grads[:, kept], right_grads[:, kept], rtol=1e-5, atol=1e-6)


def test_strided_rows():
    wide = torch.randn(3, 4, 30)
    targets, weights = torch.tensor([1, 0, 2, 0, 3, 0, 4, 0])[::2], torch.rand(8)[::2]
    for rows in (
        [z[:, 5:25] for z in wide],
        [wide[0][:, :20], wide[1].T.contiguous().T[:, :20], wide[2][:, 5:25].contiguous()],
    ):
        assert_same(arguments(rows, targets, weights=weights))


def test_no_samples():
    loss, vector, grads = exit_loss_gpu(*arguments(random_logits(2, 0, 5), torch.zeros(0, dtype=torch.int64)))
    assert loss == 0
    assert not vector.any()
    assert grads.shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5, float("nan")])
def test_gradients_are_scaled_in_place(dtype, factor):
    gradients = torch.randn(70, 3, 33).to(dtype).transpose(0, 1)
    expected = (gradients.float() * factor).to(dtype)
    moved = to(DEVICE, gradients)
    gpu_launch.scale_gradients_gpu(moved, torch.tensor(factor, device=DEVICE))
    gradients = moved.cpu()
    torch.testing.assert_close(gradients, expected, rtol=ACCURACY[dtype], atol=0, equal_nan=True)
