"""What the Triton kernels of the objective share, and the one file that imports Triton.

``gpu_single_pass`` is for integer labels and the fixed rules of teachers, up to a few thousand classes; ``gpu_general`` takes
soft targets, explicit teachers and more classes; ``gpu_launch`` chooses between them.  Both compute with powers of 2, which is
what the hardware has: ``x`` is an exponent, log2(e) / T times a logit.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005
# Triton's functions have no types for mypy, and build tuples by addition only.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["tl", "triton"]

MASKED = tl.constexpr(-1e30)  # what a logit of -inf counts as in sums, where 0 times it must be 0
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
LANES = tl.constexpr(32)  # what there is one of per exit is kept in vectors with an exit per lane
VALUES = tl.constexpr(9)  # such vectors per sample, see gpu_single_pass
SUMS = tl.constexpr(9)  # such vectors per program, see add_sample


@triton.jit
def put(here, values, vectors):
    """The vectors [LANES], with the values in the lanes that are ``here``."""
    changed = ()
    for i in tl.static_range(len(values)):
        changed = changed + (tl.where(here, values[i], vectors[i]),)
    return changed


@triton.jit
def reciprocal(x):
    """1 / x of a number above 0, to a few units in the last place: two instructions, where a division takes ten."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def exp2_below(z, top, scale):
    """2 ** x and x = scale * (z - top); multiplied and subtracted in one, so that large logits lose no digits."""
    x = tl.fma(z, scale, -(top * scale))
    return tl.exp2(x), x


@triton.jit
def nats_below(z, top):
    """The logit less ``top``, at least MASKED, with the rounding of exp2_below, so that it cancels that of a sum of exponentials."""
    return tl.maximum(exp2_below(z, top, LOG2E)[1] * LN2, MASKED)


@triton.jit
def check_label(label, K: tl.constexpr):
    """The label within [0, K), whether there is one, and whether it is in range."""
    is_valid = (label >= 0) & (label < K)
    return tl.where(is_valid, label, 0).to(tl.int32), label != -100, is_valid


@triton.jit
def label_factor(scale, has_label, is_valid):
    """The factor of a sample's label loss; a label out of range makes the gradient and the loss NaN."""
    return tl.where(is_valid, scale, tl.where(has_label, float("nan"), 0.0))


@triton.jit
def read_labels(n, targets, K: tl.constexpr):
    """(label, second label, weight of the first) of a sample, whether it has a label, whether it is in range."""
    label, has_label, is_valid = check_label(tl.load(targets.labels + n), K)
    second, lam = label, 1.0
    if targets.second is not None:
        share = tl.load(targets.lam + n).to(tl.float32)
        second, has_second, second_is_valid = check_label(tl.load(targets.second + n), K)
        # A sample with one label of two is unlabeled, unless that one is out of range.
        is_wrong = (has_label & (is_valid == 0)) | (has_second & (second_is_valid == 0))
        has_label = (has_label & has_second) | is_wrong
        # A share that is none makes the loss NaN; without a label it counts for nothing.
        lam = tl.where((share >= 0) & (share <= 1), share, tl.where(has_label, float("nan"), 0.0))
        is_valid = is_valid & second_is_valid
    return (label, second, lam), has_label, is_valid


@triton.jit
def read_weight(n, targets):
    """The weight of a sample; a negative one makes the loss NaN."""
    weight = 1.0
    if targets.weights is not None:
        weight = tl.load(targets.weights + n).to(tl.float32)
        weight = tl.where(weight >= 0, weight, float("nan"))
    return weight


@triton.jit
def zeros(count: tl.constexpr):
    """A tuple of vectors [LANES]."""
    vectors = ()
    for _ in tl.static_range(count):
        vectors = vectors + (tl.zeros([LANES], tl.float32),)
    return vectors


@triton.jit
def write_nan(grads, size: tl.constexpr):
    """NaN over ``size`` numbers, whichever threads have written them."""
    nan = tl.full([LANES], float("nan"), tl.float32).to(grads.dtype.element_ty)
    # Without it, a thread could write its gradient over another thread's NaN.
    tl.debug_barrier()
    for start in range(0, size, LANES):
        k = start + tl.arange(0, LANES)
        tl.store(grads + k, nan, mask=k < size)


@triton.jit
def add_sample(sums, losses, logs, rank, confidence, scales, flags, exits, M: tl.constexpr):
    """The program's sums with one sample.

    The sums, with an exit per lane unless said otherwise: label loss; log2 of the sum of exponentials; products of the
    exponents with the mixture, and with the exit's own probabilities; top-1 and top-5 hits; confidence, to be summed over
    lanes; label part of the loss; counts in three lanes: labeled samples, labels out of range, samples not finite.

    Args:
        losses: cross-entropies to the label without and with smoothing.
        logs: the sample's part of the second to the fourth sum; -log2 of a probability is the first of them less its exponent.
        rank: of the label.
        scales: factor of the label loss, and weight of the sample.
        flags: whether the sample has a label, the label is in range, all logits are finite.
    """
    lane = tl.arange(0, LANES)
    has_label, is_valid, is_finite = flags
    is_exit = (lane < M) & is_finite
    is_counted = is_exit & is_valid
    factor, weight = scales
    loss = losses[1] * factor * tl.load(exits.label_weights + lane, mask=lane < M, other=0.0)
    # A sample that is not finite makes the loss NaN by one lane, over which it is summed.
    loss = tl.where(is_exit & has_label, loss, tl.where(is_finite | (lane > 0), 0.0, float("nan")))
    counts = tl.where((lane == 0) & is_finite & is_valid, 1.0, 0.0)
    counts += tl.where((lane == 1) & has_label & (is_valid == 0), 1.0, 0.0)
    counts += tl.where((lane == 2) & (is_finite == 0), 1.0, 0.0)
    return (
        sums[0] + tl.where(is_counted, losses[0], 0.0),
        sums[1] + tl.where(is_exit, weight * logs[0], 0.0),
        sums[2] + tl.where(is_exit, weight * logs[1], 0.0),
        sums[3] + tl.where(is_exit, weight * logs[2], 0.0),
        sums[4] + tl.where(is_counted & (rank < 1), 1.0, 0.0),
        sums[5] + tl.where(is_counted & (rank < 5), 1.0, 0.0),
        sums[6] + tl.where(is_finite, confidence, 0.0),
        sums[7] + loss,
        sums[8] + counts,
    )


@triton.constexpr_function
def width(exits):
    """Lanes of the sums that are used: a power of 2, and the counts take three."""
    return max(4, triton.next_power_of_2(exits))


@triton.jit
def store_sums(sums, partials, M: tl.constexpr):
    """The sums of this program to its rows of ``partials`` [programs, SUMS, width(M)]."""
    lane = tl.arange(0, LANES)
    for i in tl.static_range(SUMS):
        tl.store(partials + (tl.program_id(0) * SUMS + i) * width(M) + lane, sums[i], mask=lane < width(M))


@triton.jit
def _sum_rows(vectors):
    """The sums of tensors over their first dimension."""
    sums = ()
    for i in tl.static_range(len(vectors)):
        sums = sums + (tl.sum(vectors[i], 0),)
    return sums


@triton.jit(do_not_specialize=["samples", "programs"])
def finish_kernel(
    partials, exits, vector, loss, samples, programs, M: tl.constexpr, CROSS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """The statistics and the loss from the sums of all programs, see add_sample for those."""
    W: tl.constexpr = width(M)
    lane = tl.arange(0, W)
    is_exit = lane < M
    student, teacher = lane[:, None], lane[None, :]
    # Before the sums, which take longer than these loads.
    pairs = tl.load(exits.teachers + student * M + teacher, mask=(student < M) & (teacher < M), other=0.0)
    temperature = tl.load(exits.temperature + lane, mask=is_exit, other=0.0)
    weights = tl.load(exits.distill_weights + lane, mask=is_exit, other=0.0)
    totals = ()
    for _ in tl.static_range(SUMS):
        totals = totals + (tl.zeros([BLOCK, W], tl.float32),)
    # In a fixed order, so that the last digits are the same in every run.
    for start in range(0, programs, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place, is_row = partials + row[:, None] * (SUMS * W) + lane[None, :], row[:, None] < programs
        added = ()
        for i in tl.static_range(SUMS):
            added = added + (totals[i] + tl.load(place + i * W, mask=is_row, other=0.0),)
        totals = added
    label_loss, log_totals, crosses, entropies, top1, top5, confidence, label_part, counts = _sum_rows(totals)
    # In bits: sum over teachers t of w_mt * CE(q_t, q_m), and of w_mt * H(q_t).
    cross_entropy = tl.sum(pairs, 1) * log_totals - crosses
    kl = LN2 * (cross_entropy - tl.sum(pairs * (log_totals - entropies)[None, :], 1))
    tl.store(vector + lane, label_loss, mask=is_exit)
    tl.store(vector + M + lane, kl, mask=is_exit)
    tl.store(vector + 2 * M + lane, top1, mask=is_exit)
    tl.store(vector + 3 * M + lane, top5, mask=is_exit)
    tl.store(vector + 4 * M, tl.sum(confidence))
    tl.store(vector + 4 * M + 1, samples.to(tl.float32))
    tl.store(vector + 4 * M + 2 + lane, counts, mask=lane < 3)
    # loss = label part + sum over exits of w_m * T_m^2 / N * (cross-entropy or divergence)
    weights *= temperature * temperature / samples
    value = LN2 * cross_entropy if CROSS_ENTROPY else kl
    tl.store(loss, tl.sum(weights * value) + tl.sum(label_part))


@triton.jit
def scale_kernel(gradients, factor, size, BLOCK: tl.constexpr):
    """Multiplies in place; by 1, which is the usual case, it does not touch the gradients."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            offset = start + tl.arange(0, BLOCK).to(tl.int64)
            values = tl.load(gradients + offset, mask=offset < size).to(tl.float32)
            tl.store(gradients + offset, values * scale, mask=offset < size)
