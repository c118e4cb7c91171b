"""The objective over all exits as a Triton kernel: what ``dist_train::exit_loss`` runs on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005
# Triton's functions have no types for mypy, and build tuples by addition only.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_train.kernels.cpu import headroom

MASKED = tl.constexpr(-1e30)  # what a logit of -inf counts as in sums: 0 times it must be 0
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def exit_loss_kernel(
    logits, stride, targets, second, share, weights, teachers, row_sums, reader, label_weights, temperature, rates, labeled,
    partials, grads, samples, headroom,
    M: tl.constexpr, K: tl.constexpr, SOFT: tl.constexpr, SMOOTHING: tl.constexpr,
    WIDE: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sums over the samples of one program, into its row of ``partials``, and the gradient of each sample, times headroom.

    A sample's logits are read twice, the second time from the cache: exit by exit for sums over the classes, then class
    by class, all exits at once, for pairs and gradient.  Sums over pairs stay to the end in the lanes that made them.
    The columns of ``partials`` are those of ExitStats, with cross-entropies for divergences (in bits, negative), and the
    label part of the loss in the place of the number of samples.
    """
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float32)
    pairs = ()
    for _ in tl.static_range(M * M):
        pairs = pairs + (zero,)
    label_loss, top1, top5, counts = zero, zero, zero, zero  # a lane per exit; and per column of counts
    per_label = 1 / tl.load(labeled).to(tl.float32)

    for number in range(tl.program_id(0), samples, tl.num_programs(0)):
        n = number + tl.zeros([], tl.int64)  # offsets of large batches need 64 bits
        label, other, part, mass, given, good = _read_labels(n, targets, second, share, K, SOFT, WIDE)
        weight = 1.0
        if weights is not None:
            weight = tl.load(weights + n).to(tl.float32)
        tops, totals, warms, evens, ce, smooth, rank, finite = _first_reading(
            n, logits, stride, targets, label, other, part, mass, rates, M, K, SOFT, SMOOTHING, WIDE, LANES
        )
        # A bad label or a logit that is not finite makes the sample's gradient and the loss NaN.
        factor = tl.where(good, weight * per_label, tl.where(given, float("nan"), 0.0))
        pairs, confidence = _second_reading(
            n, logits, stride, targets, label, other, part, mass, factor * headroom, weight,
            teachers, row_sums, reader, label_weights, temperature, rates,
            tops, totals, warms, evens, pairs, grads, headroom / samples, tl.where(finite, K, 0),
            M, K, SOFT, SMOOTHING, LANES, SLOTS,
        )  # fmt: skip
        counted = good & finite
        label_loss += tl.where(counted, ce, 0.0)
        top1 += tl.where(counted & (rank < 1), 1.0, 0.0)
        top5 += tl.where(counted & (rank < 5), 1.0, 0.0)
        loss = (
            tl.sum(tl.where(lane < M, smooth * tl.load(label_weights + lane, mask=lane < M, other=0.0), 0.0)) * factor
        )
        loss = tl.where(finite, tl.where(given, loss, 0.0), float("nan"))
        counts += tl.where(lane == 0, confidence, 0.0) + tl.where(lane == 1, loss, 0.0)
        counts += tl.where((lane == 2) & counted, 1.0, 0.0) + tl.where((lane == 3) & given & (good == 0), 1.0, 0.0)
        counts += tl.where((lane == 4) & (finite == 0), 1.0, 0.0)

    row = partials + tl.program_id(0) * (M * M + 3 * M + 5)
    tl.store(row + lane, label_loss, mask=lane < M)
    for i in tl.static_range(M * M):
        tl.store(row + M + i, tl.sum(pairs[i]))
    row += M + M * M
    tl.store(row + lane, top1, mask=lane < M)
    tl.store(row + M + lane, top5, mask=lane < M)
    tl.store(row + 2 * M + lane, counts, mask=lane < 5)


@triton.jit
def _read_labels(n, targets, second, share, K: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr):
    """A sample's two labels within [0, K), the share of the first, their mass, whether they were given, and were labels."""
    if SOFT:
        mass, largest, label = 0.0, -1.0, tl.zeros([], tl.int32)
        for start in range(0, K, WIDE):
            k = start + tl.arange(0, WIDE)
            y = tl.load(targets + n * K + k, mask=k < K, other=0.0).to(tl.float32)
            mass += tl.sum(y)
            here = tl.max(y)
            label = tl.where(here > largest, start + tl.argmax(y, 0), label)
            largest = tl.maximum(largest, here)
        given = tl.where(mass > 0, 1, 0) == 1  # the interpreter cannot spread a comparison of floats over lanes
        good = given
        other, part = label, 1.0
    else:
        mass, part = 1.0, 1.0
        label = tl.load(targets + n)
        given = label != -100
        good = (label >= 0) & (label < K)
        other = label
        if second is not None:
            part = tl.load(share + n).to(tl.float32)
            other = tl.load(second + n)
            wrong = (given & (good == 0)) | ((other != -100) & ((other < 0) | (other >= K)))
            given = (given & (other != -100)) | wrong
            good = good & (other >= 0) & (other < K)
            other = tl.where(good, other, 0)
        label = tl.where(good, label, 0)
    return label, other, part, mass, given, good


@triton.jit
def _first_reading(
    n, logits, stride, targets, label, other, part, mass, rates,
    M: tl.constexpr, K: tl.constexpr, SOFT: tl.constexpr, SMOOTHING: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of each exit: the maximum, log2 of the sums of exponentials at temperature 1 and its own, smoothing's even share.

    And, a lane per exit: cross-entropy without and with smoothing, rank of the label.  And whether all logits are finite.
    """
    lane = tl.arange(0, LANES)
    tops, totals, warms, evens = (), (), (), ()
    ces, smooths, ranks = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.int32)
    finite = n >= 0
    for m in tl.static_range(M):
        row = logits[m] + n * stride
        first = tl.load(row + label).to(tl.float32)
        last = tl.load(row + other).to(tl.float32)
        judged = tl.where(part >= 0.5, label, other)
        top, total, warm, rank = _sums(row, judged, tl.load(rates + m), K, WIDE)
        finite = finite & (total > 0) & (total < INFINITY)
        spread = tl.log2(total) * LN2
        even = 0.0
        if SOFT or SMOOTHING > 0:
            product, level, even = _shares(row, top, targets + n * K, K, SOFT, WIDE)
        if SOFT:
            ce = mass * spread - product
        else:
            ce = spread - part * tl.maximum(first - top, MASKED) - (1 - part) * tl.maximum(last - top, MASKED)
        smooth = ce
        if SMOOTHING > 0:
            smooth = (1 - SMOOTHING) * ce + SMOOTHING * (spread - level)
        tops, totals, warms = tops + (top,), totals + (tl.log2(total),), warms + (tl.log2(warm),)
        evens = evens + (even,)
        ces = tl.where(lane == m, ce, ces)
        smooths = tl.where(lane == m, smooth, smooths)
        ranks = tl.where(lane == m, rank, ranks)
    return tops, totals, warms, evens, ces, smooths, ranks, finite


@triton.jit
def _sums(row, label, rate, K: tl.constexpr, WIDE: tl.constexpr):
    """A row's maximum, its sums of 2 ** (log2(e) * z) and 2 ** (rate * z) over that, and the classes before the label.

    Before it come larger logits, and equal ones of earlier classes.
    """
    label_logit = tl.load(row + label).to(tl.float32)
    top, total, warm, rank = -1e30, 0.0, 0.0, tl.zeros([], tl.int32)
    for start in range(0, K, WIDE):
        k = start + tl.arange(0, WIDE)
        z = tl.load(row + k, mask=k < K, other=-INFINITY).to(tl.float32)
        before = top
        top = tl.maximum(top, tl.max(z))
        total = total * tl.exp2((before - top) * LOG2E) + tl.sum(tl.exp2((z - top) * LOG2E))
        warm = warm * tl.exp2((before - top) * rate) + tl.sum(tl.exp2((z - top) * rate))
        rank += tl.sum(((z > label_logit) | ((z == label_logit) & (k < label))).to(tl.int32))
    return top, total, warm, rank


@triton.jit
def _shares(row, top, targets, K: tl.constexpr, SOFT: tl.constexpr, WIDE: tl.constexpr):
    """Of a row less its maximum: the product with a soft target, the mean of what is not masked, 1 / the number of those."""
    product, total, count = 0.0, 0.0, 0.0
    for start in range(0, K, WIDE):
        k = start + tl.arange(0, WIDE)
        z = tl.load(row + k, mask=k < K, other=-INFINITY).to(tl.float32)
        if SOFT:
            product += tl.sum(tl.load(targets + k, mask=k < K, other=0.0).to(tl.float32) * tl.maximum(z - top, MASKED))
        count += tl.sum((z > -INFINITY).to(tl.float32))
        total += tl.sum(tl.where(z > -INFINITY, z - top, 0.0))
    return product, total / count, 1 / count


@triton.jit
def _second_reading(
    n, logits, stride, targets, label, other, part, mass, factor, weight,
    teachers, row_sums, reader, label_weights, temperature, rates,
    tops, totals, warms, evens, pairs, grads, scale, stop,
    M: tl.constexpr, K: tl.constexpr, SOFT: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds the sample's sums over pairs, writes its gradient (NaN from the class ``stop``), returns the teacher's confidence."""
    lane = tl.arange(0, LANES)
    sure = tl.zeros([LANES], tl.float32)
    for start in range(0, stop, LANES * SLOTS):
        logs, qs = (), ()  # softened probabilities and their log2, index slot * M + exit
        for slot in tl.static_range(SLOTS):
            k = start + slot * LANES + lane
            offset = n * stride + k
            mixed = tl.zeros([LANES], tl.float32)
            for m in tl.static_range(M):
                z = tl.load(logits[m] + offset, mask=k < K, other=-INFINITY).to(tl.float32)
                log = tl.maximum(z - tops[m], MASKED) * tl.load(rates + m) - warms[m]
                logs, qs = logs + (log,), qs + (tl.exp2(log),)
                mixed += tl.load(reader + m) * tl.exp2(log)
            sure = tl.maximum(sure, mixed)
        sums = ()
        for i in tl.static_range(M * M):
            here = tl.zeros([LANES], tl.float32)
            for slot in tl.static_range(SLOTS):
                here += qs[slot * M + i % M] * logs[slot * M + i // M]
            sums = sums + (pairs[i] + weight * here,)
        pairs = sums
        if grads is not None:
            for m in tl.static_range(M):
                _write_gradient(
                    m, n, start, targets, label, other, part, mass, factor * tl.load(label_weights + m), weight * scale,
                    teachers, tl.load(row_sums + m), tl.load(temperature + m), totals[m], warms[m], evens[m], logs, qs,
                    grads + n * (M * K) + m * K, M, K, SOFT, SMOOTHING, LANES, SLOTS,
                )  # fmt: skip
    if grads is not None:
        for start in range(stop, K, LANES):
            for m in tl.static_range(M):
                row = grads + n * (M * K) + m * K
                tl.store(row + start + lane, tl.full([LANES], float("nan"), tl.float32), mask=start + lane < K)
    return pairs, tl.max(sure)


@triton.jit
def _write_gradient(
    m: tl.constexpr, n, start, targets, label, other, part, mass, factor, weight,
    teachers, row_sum, temperature, total, warm, even, logs, qs, row,
    M: tl.constexpr, K: tl.constexpr, SOFT: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The gradient of exit ``m`` at some classes: all its pairs are one cross-entropy to the mixture of its teachers."""
    mixed = ()
    for slot in tl.static_range(SLOTS):
        mixed = mixed + (row_sum * qs[slot * M + m],)
    for t in tl.static_range(M):
        teacher = tl.load(teachers + m * M + t)
        sums = ()
        for slot in tl.static_range(SLOTS):
            sums = sums + (mixed[slot] - teacher * qs[slot * M + t],)
        mixed = sums
    for slot in tl.static_range(SLOTS):
        k = start + slot * LANES + tl.arange(0, LANES)
        log = logs[slot * M + m]
        p = tl.exp2((log + warm) * temperature - total)
        gradient = temperature * weight * mixed[slot] + factor * ((1 - SMOOTHING) * mass + SMOOTHING) * p
        if SOFT:
            gradient -= factor * (1 - SMOOTHING) * tl.load(targets + n * K + k, mask=k < K, other=0.0).to(tl.float32)
        else:
            gradient -= (
                factor * (1 - SMOOTHING) * (tl.where(k == label, part, 0.0) + tl.where(k == other, 1 - part, 0.0))
            )
        if SMOOTHING > 0:
            gradient -= factor * SMOOTHING * tl.where(log > MASKED * 1e-6, even, 0.0)
        tl.store(row + k, gradient, mask=k < K)


@triton.jit
def finish_kernel(
    sums,
    vector,
    loss,
    teachers,
    temperature,
    samples,
    M: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics and the loss from the sums over all samples."""
    column = tl.arange(0, BLOCK)
    used = column < M * M + 3 * M + 5
    pair = column - M
    is_pair = (pair >= 0) & (pair < M * M)
    student = tl.where(is_pair, pair // M, 0)
    teacher = tl.where(is_pair, pair % M, 0)
    total = tl.load(sums + column, mask=used, other=0.0)
    cross = -LN2 * total
    divergence = cross + LN2 * tl.load(sums + M + teacher * M + teacher)
    is_samples = column == M * M + 3 * M + 1
    statistics = tl.where(is_pair, divergence, tl.where(is_samples, samples, total))
    tl.store(vector + column, statistics, mask=used)
    tau = tl.load(temperature + student).to(tl.float32)
    weight = tl.load(teachers + student * M + teacher).to(tl.float32) * tau * tau / samples
    value = tl.where(CROSS_ENTROPY, cross, divergence)
    tl.store(loss, tl.sum(tl.where(is_pair, weight * value, 0.0)) + tl.sum(tl.where(is_samples, total, 0.0)))


def exit_loss_gpu(
    logits: Sequence[Tensor],
    targets: Tensor,
    second: Tensor | None,
    share: Tensor | None,
    weights: Tensor | None,
    teachers: Tensor,
    reader: Tensor,
    label_weights: Tensor,
    temperature: Tensor,
    labeled: Tensor,
    smoothing: float,
    cross_entropy: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`dist_train.kernels.exit_loss`; nothing here waits for the GPU."""
    exits, (samples, classes), device = len(logits), logits[0].shape, logits[0].device
    # Exits side by side in a sample: their distances are then known when the kernel is compiled, which saves registers.
    grads = logits[0].new_empty((samples, exits, classes) if with_grad else (0, 0, 0))
    columns = exits * exits + 3 * exits + 5
    loss, vector = torch.zeros((), device=device), torch.zeros(columns, device=device)
    if samples == 0:
        return loss, vector, grads.transpose(0, 1)
    # One row stride for all exits and neighbouring classes, as networks give them; anything else is copied.
    stride = logits[0].stride(0)
    rows = tuple(logits) if all(z.stride() == (stride, 1) for z in logits) else tuple(z.contiguous() for z in logits)
    warps, settings = launch_settings(exits, classes)
    partials = torch.empty((min(samples, 16 * _processors(device) // warps), columns), device=device)
    second, share, weights = (None if t is None else t.contiguous() for t in (second, share, weights))
    with torch.cuda.device_of(logits[0]):  # type: ignore[no-untyped-call]
        exit_loss_kernel[(len(partials),)](
            rows, rows[0].stride(0), targets.contiguous(), second, share, weights, teachers, teachers.sum(1), reader,
            label_weights, temperature, LOG2E.value / temperature, labeled, partials, grads if with_grad else None, samples,
            headroom(logits[0].dtype, samples),
            M=exits, K=classes, SOFT=targets.is_floating_point(), SMOOTHING=smoothing, num_warps=warps, **settings,
        )  # fmt: skip
        finish_kernel[(1,)](
            partials.sum(0), vector, loss, teachers, temperature, samples,
            M=exits, CROSS_ENTROPY=cross_entropy, BLOCK=triton.next_power_of_2(columns), num_warps=1,
        )  # fmt: skip
    return loss, vector, grads.transpose(0, 1)


@triton.jit
def scale_kernel(gradients, factor, size, BLOCK: tl.constexpr):
    """Multiplies in place; by 1, which is the usual case, it does not touch the gradients."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            place = start + tl.arange(0, BLOCK).to(tl.int64)
            values = tl.load(gradients + place, mask=place < size).to(tl.float32)
            tl.store(gradients + place, values * scale, mask=place < size)


def scale_gradients_gpu(gradients: Tensor, factor: Tensor) -> None:
    """Multiply gradients [M, N, K], as :func:`exit_loss_gpu` gives them, by ``factor`` [] without waiting for it."""
    with torch.cuda.device_of(gradients):  # type: ignore[no-untyped-call]
        scale_kernel[(_processors(gradients.device) * 8,)](
            gradients.transpose(0, 1), factor, gradients.numel(), BLOCK=2048
        )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch_settings(exits: int, classes: int) -> tuple[int, dict[str, int]]:
    """Warps per program, and the block sizes and options with which no register spills up to 11 exits.

    A sample with up to a few thousand classes is one warp's, whose reductions need no barrier.
    """
    warps = 1 if classes <= 4096 else 4
    wide = min(triton.next_power_of_2(classes), 512 * warps)
    settings = {"WIDE": wide, "LANES": 32 * warps, "SLOTS": 4 if exits <= 5 else 2 if exits <= 8 else 1}
    settings["enable_fp_fusion"] = True  # Triton's default from 3.10 on is to multiply and add apart
    if exits > 5 and torch.version.hip is None:
        settings["maxnreg"] = 255  # ptxas would rather spill for the sake of more warps at a time
    return warps, settings
