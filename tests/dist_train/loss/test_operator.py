"""The operator within PyTorch: autograd, compilation, what it must leave alone."""

from __future__ import annotations

import pytest
import torch

from dist_train.config import LossConfig
from dist_train.errors import DataError
from dist_train.loss.inputs import ExitWeights, LossOptions, Targets
from dist_train.loss.objective import ExitDistillation, ExitStats, LabelMix
from dist_train.loss.operator import exit_loss


def make_case(exits=3, samples=6, classes=7, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    logits = [torch.randn(samples, classes).to(dtype).requires_grad_() for _ in range(exits)]
    labels = torch.randint(classes, (samples,))
    return ExitDistillation.from_config(LossConfig(**fields), exits), logits, labels


def exit_weights(criterion):
    names = ("label_weights", "distill_weights", "teachers", "confidence_weights", "temperature")
    return ExitWeights(*(getattr(criterion, name) for name in names), torch.tensor(6.0))


def test_it_is_a_well_behaved_operator():
    criterion, logits, labels = make_case(teachers="later", temperature=2.0)
    exits = exit_weights(criterion)
    arguments = (logits, [labels, None, None, None], exits, "later", 0.1, False, True)
    torch.library.opcheck(torch.ops.dist_train.exit_loss.default, arguments)
    assert [output.requires_grad for output in torch.ops.dist_train.exit_loss(*arguments)] == [True, False, False]
    torch.library.opcheck(
        torch.ops.dist_train.exit_loss.default,
        (logits, [labels, labels, torch.rand(6), torch.rand(6)], exits, "later", 0.0, True, False),
    )


@pytest.mark.parametrize("teachers", ["later", "best"])
def test_compiled_whole_it_gives_the_same(teachers):
    criterion, logits, labels = make_case(teachers=teachers)

    def step(*logits):
        out = criterion([2 * z for z in logits], labels, labeled=torch.tensor(3.0))
        return 3 * out.loss, out.stats.vector

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        loss, vector = function(*logits)
        results.append([loss, vector, *torch.autograd.grad(loss, logits)])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)


def test_the_gradient_is_written_out_of_place_and_can_be_had_twice():
    criterion, logits, labels = make_case()
    before = [z.detach().clone() for z in logits]
    loss = criterion(logits, labels).loss
    first = torch.autograd.grad(2 * loss, logits, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, logits)
    for z, copy, gradient, copied, half in zip(logits, before, first, kept, second):
        assert torch.equal(z, copy)
        assert torch.equal(gradient, copied)
        torch.testing.assert_close(gradient, 2 * half)


def test_a_second_derivative_is_refused():
    """Of the logits the gradient is a constant to autograd: second derivatives would be wrong without an error."""
    criterion, logits, labels = make_case()
    with pytest.raises(DataError, match="no second derivatives; call backward or"):
        torch.autograd.grad(criterion([z.tanh() for z in logits], labels).loss, logits, create_graph=True)


def test_a_single_backward_pass_gives_the_gradient_away_without_writing_it_again():
    criterion, logits, labels = make_case()
    for factor in (1, 3):
        loss, _, made = exit_loss(logits, Targets(labels), exit_weights(criterion), LossOptions("last"))
        before = made.clone()
        given = torch.autograd.grad(factor * loss, logits)
        assert [gradient.data_ptr() for gradient in given] == [gradient.data_ptr() for gradient in made]
        assert torch.equal(torch.stack(given), factor * before)


def test_a_large_batch_in_fp16_keeps_its_gradient():
    criterion, logits, labels = make_case(2, 4096, 200, dtype=torch.float16)
    scale = 2.0**15
    small = torch.autograd.grad(scale * criterion(logits, labels).loss, logits)
    right = torch.autograd.grad(criterion([z.float() for z in logits], labels).loss * scale, logits)
    for gradient, expected in zip(small, right):
        torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=float(expected.abs().max()) * 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_statistics_are_float32_and_only_the_loss_has_a_gradient(dtype):
    criterion, logits, labels = make_case(dtype=dtype)
    out = criterion(logits, labels)
    assert out.loss.dtype == out.stats.vector.dtype == torch.float32
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    assert not out.stats.vector.requires_grad
    with torch.inference_mode():
        quiet = criterion(logits, labels)
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.stats.vector, out.stats.vector)
    assert torch.equal(quiet.loss, out.loss)


@pytest.mark.parametrize("teachers", ["later", "better"])
def test_autocast_leaves_it_in_float32(teachers):
    criterion, logits, labels = make_case(5, 32, 100, teachers=teachers)
    plain = criterion(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = criterion(logits, labels)
    assert torch.equal(plain.loss, cast.loss)
    assert torch.equal(plain.stats.vector, cast.stats.vector)


def test_some_exits_without_gradient():
    criterion, logits, labels = make_case()
    right = torch.autograd.grad(criterion(logits, labels).loss, logits)
    frozen = [logits[0].detach(), *logits[1:]]
    for gradient, expected in zip(torch.autograd.grad(criterion(frozen, labels).loss, frozen[1:]), right[1:]):
        assert torch.equal(gradient, expected)


def test_no_samples():
    criterion, logits, labels = make_case(samples=0)
    out = criterion(logits, labels)
    assert out.loss == 0
    assert not out.stats.vector.any()
    assert [g.shape for g in torch.autograd.grad(out.loss, logits)] == [(0, 7)] * 3


def test_statistics_add_up():
    criterion, logits, labels = make_case(samples=9)
    whole = criterion(logits, labels).stats
    parts = ExitStats.zeros(3)
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        parts.vector.add_(criterion([z[part] for z in logits], labels[part]).stats.vector)
    torch.testing.assert_close(parts.vector, whole.vector)
    assert whole.vector.numel() == 4 * 3 + 5
    layout = [whole.label_loss, whole.kl, whole.top1, whole.top5]
    layout += [whole.confidence, whole.samples, whole.labeled, whole.bad_labels, whole.nonfinite]
    assert torch.equal(torch.cat([part.reshape(-1) for part in layout]), whole.vector)


def test_equal_results_from_run_to_run():
    criterion, logits, labels = make_case(5, 64, 100, teachers="later", temperature=2.0)
    first = criterion(logits, labels)
    for _ in range(3):
        again = criterion(logits, labels)
        assert torch.equal(first.loss, again.loss)
        assert torch.equal(first.stats.vector, again.stats.vector)


@pytest.mark.parametrize("kind", ["labels", "soft", "mix"])
def test_labeled_divides_the_label_part_only(kind):
    criterion, logits, labels = make_case(label_smoothing=0.1)
    targets = {
        "labels": labels,
        "soft": torch.rand(6, 7).softmax(1),
        "mix": LabelMix(labels, labels.flip(0), torch.rand(6)),
    }[kind]
    silent = ExitDistillation.from_config(LossConfig(label_weights=0.0), 3)(logits, targets).loss
    ones = criterion(logits, targets).loss - silent
    for labeled in (1.5, torch.tensor(1.5)):
        torch.testing.assert_close(criterion(logits, targets, labeled=labeled).loss - silent, ones * 6 / 1.5)
