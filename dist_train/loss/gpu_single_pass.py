"""The objective with each logit read once and kept in registers, for hard labels and fixed rules of teachers.

The mixture of the teachers is carried along from the last exit to the first, so the work is linear in the exits.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: RUF005
# Triton's functions have no types for mypy, and build tuples by addition only.

from __future__ import annotations

from dist_train.loss.gpu import (
    INFINITY,
    LANES,
    LN2,
    LOG2E,
    MASKED,
    SUMS,
    VALUES,
    add_sample,
    check_label,
    exp2_below,
    is_student,
    is_teacher,
    label_factor,
    put,
    reciprocal,
    store_sums,
    teacher_share,
    tl,
    triton,
    write_nan,
    zeros,
)


@triton.jit
def single_pass_kernel(
    logits,
    targets,
    exits,
    partials,
    grads,
    samples,
    grad_scale,
    M: tl.constexpr,
    K: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over the samples of one program, into its rows of ``partials``, and each sample's gradient times grad_scale.

    Args:
        logits: M pointers to contiguous [samples, K].
        targets, exits: :class:`Targets`, of which the labels alone are read, and :class:`ExitWeights`.
        partials: [programs, SUMS, LANES] float32.
        grads: [samples, M, K] in the dtype of the logits, or None.
    """
    lane = tl.arange(0, LANES)
    sums = zeros(SUMS)
    label_scale = reciprocal(tl.load(exits.label_count).to(tl.float32))
    constants = _read_exits(exits, grad_scale, grad_scale / samples, M)
    for number in range(tl.program_id(0), samples, tl.num_programs(0)):
        n = number + tl.zeros([], tl.int64)  # offsets of large batches need 64 bits
        label, has_label, is_valid = check_label(tl.load(targets.labels + n), K)
        factor = label_factor(label_scale, has_label, is_valid)
        mixture, mixture_at_label = tl.zeros([BLOCK_K], tl.float32), 0.0
        if RULE == "ensemble":
            mixture, mixture_at_label = _ensemble(n, label, logits, constants, M, K, BLOCK_K)
        columns = zeros(VALUES)
        row = _load_row(logits[M - 1] + n * K, K, BLOCK_K)
        for m in tl.static_range(M - 1, -1, -1):
            z = _to_float(row, K)
            if m > 0:  # the next exit's row is on its way while this one's is worked on
                row = _load_row(logits[m - 1] + n * K, K, BLOCK_K)
            gradient, mixture, mixture_at_label, values = _exit(
                z, logits[m] + n * K, label, factor, mixture, mixture_at_label, constants[m], m, M, RULE
            )
            columns = put(lane == m, values, columns)
            if grads is not None:
                k = tl.arange(0, BLOCK_K)
                tl.store(grads + (n * M + m) * K + k, gradient.to(grads.dtype.element_ty), mask=k < K)
        x_label, total, tempered_total, cross, entropy, gradient_at_label, rank, confidence = columns
        is_finite = tl.min(tl.where((lane >= M) | (total < INFINITY), 1, 0)) > 0
        if grads is not None:
            _write_labels(gradient_at_label, label, is_valid, is_finite, grads + n * (M * K), M, K)
        # -ln p(label) = ln(total) - (z_label - top).
        ce = tl.log2(total) * LN2 - tl.maximum(x_label * LN2, MASKED)
        logs = (tl.log2(tempered_total), cross, entropy)
        flags = (has_label, is_valid, is_finite)
        sums = add_sample(sums, (ce, ce), logs, rank, confidence, (factor, 1.0), flags, exits, M)
    store_sums(sums, partials)


@triton.jit
def _read_exits(exits, label_scale, distill_scale, M: tl.constexpr):
    """Of each exit: log2(e) / T, and the factors of its distillation and of its label loss in the gradient."""
    constants = ()
    for m in tl.static_range(M):
        temperature = tl.load(exits.temperature + m)
        distill = tl.load(exits.distill_weights + m) * temperature * distill_scale
        label_weight = tl.load(exits.label_weights + m) * label_scale
        constants = constants + ((LOG2E * reciprocal(temperature), distill, label_weight),)
    return constants


@triton.jit
def _exit(
    z, row, label, factor, mixture, mixture_at_label, constants, m: tl.constexpr, M: tl.constexpr, RULE: tl.constexpr
):
    """The gradient of exit ``m`` of a sample, the teachers' mixture with this exit in it, and the exit's VALUES.

    ``mixture`` is the sum of the later exits' tempered probabilities that teach this one; with the rule ``ensemble``, the
    mean over all.  The values: exponent of the label, sums of exponentials at temperature 1 and at the exit's own,
    products of the exponents with the mixture and with the exit's own probabilities, gradient at the label, rank of the
    label, confidence.
    """
    label_logit = tl.load(row + label).to(tl.float32)
    top = tl.max(z)
    rank = _rank(z, row, label, label_logit)
    scale, distill, label_weight = constants
    tempered_total, cross, entropy, confidence, gradient, gradient_at_label = 1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if is_student(RULE, m, M) or is_teacher(RULE, m, M) or m == M - 1:
        tempered, x = exp2_below(z, top, scale)
        tempered_label, _ = exp2_below(label_logit, top, scale)
        tempered_total = tl.sum(tempered)
        inverse = reciprocal(tempered_total)
        dots = _dots(mixture, tempered, x, is_student(RULE, m, M), is_teacher(RULE, m, M))
        cross, entropy = dots[0] * teacher_share(RULE, m, M), dots[1] * inverse
        if is_student(RULE, m, M):
            # T^2 * CE(mixture, q) has the gradient T * (q - mixture).
            share = teacher_share(RULE, m, M)
            gradient = tempered * (distill * inverse) - mixture * (distill * share)
            gradient_at_label = distill * (tempered_label * inverse - mixture_at_label * share)
        if m == M - 1:
            confidence = tl.max(mixture) if RULE == "ensemble" else exp2_below(top, top, scale)[0] * inverse
        if RULE == "next":
            mixture, mixture_at_label = tempered * inverse, tempered_label * inverse
        elif RULE != "ensemble" and is_teacher(RULE, m, M):
            mixture += tempered * inverse
            mixture_at_label += tempered_label * inverse
    exps, _ = exp2_below(z, top, LOG2E)
    exp_label, x_label = exp2_below(label_logit, top, LOG2E)
    total = tl.where(top > 0.5 * MASKED, tl.sum(exps), float("nan"))  # NaN also where all classes are masked
    # CE(label, p) has the gradient p - one_hot(label); the one-hot part is only in gradient_at_label.
    label_weight *= factor
    weight = label_weight * reciprocal(total)
    gradient += exps * weight
    gradient_at_label += exp_label * weight - label_weight
    values = (x_label, total, tempered_total, cross, entropy, gradient_at_label, rank.to(tl.float32), confidence)
    return gradient, mixture, mixture_at_label, values


@triton.jit
def _dots(mixture, tempered, x, WITH_MIXTURE: tl.constexpr, WITH_ITSELF: tl.constexpr):
    """Sums of mixture * x and of tempered * x, where 0 times the -inf of a masked class is 0.

    CE(mixture, q) = log2(sum of exponentials) - sum(mixture * x), in bits.
    """
    cross, entropy = 0.0, 0.0
    if WITH_MIXTURE:
        cross = tl.sum(mixture * x)
    if WITH_ITSELF:
        entropy = tl.sum(tempered * x)
    # Reduced as an integer, which shows the compiler that all threads of a warp take the same branch.
    is_finite = tl.abs(cross + entropy) + tl.zeros([LANES], tl.float32) < INFINITY
    if tl.max(tl.where(is_finite, 0, 1)) > 0:
        x = tl.maximum(x, MASKED)
        if WITH_MIXTURE:
            cross = tl.sum(mixture * x)
        if WITH_ITSELF:
            entropy = tl.sum(tempered * x)
    return cross, entropy


@triton.jit
def _rank(z, row, label, label_logit):
    """The number of classes before the label: those with larger logits, and earlier ones with equal logits."""
    rank = tl.sum((z > label_logit).to(tl.int32))
    if rank < 5:  # noqa: SIM102 - Triton computes both sides of `and`; from 5 on, ties change neither top-1 nor top-5
        if tl.sum((z == label_logit).to(tl.int32)) > 1:
            for start in range(0, label, LANES):
                k = start + tl.arange(0, LANES)
                earlier = tl.load(row + k, mask=k < label, other=-INFINITY).to(tl.float32)
                rank += tl.sum(((earlier == label_logit) & (k < label)).to(tl.int32))
    return rank


@triton.jit
def _ensemble(n, label, logits, constants, M: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mean of all exits' tempered probabilities, and its value at the label."""
    mixture, mixture_at_label = tl.zeros([BLOCK_K], tl.float32), 0.0
    for m in tl.static_range(M):
        row = logits[m] + n * K
        z = _to_float(_load_row(row, K, BLOCK_K), K)
        top, scale = tl.max(z), constants[m][0]
        tempered, _ = exp2_below(z, top, scale)
        tempered_label, _ = exp2_below(tl.load(row + label).to(tl.float32), top, scale)
        share = reciprocal(tl.sum(tempered)) / M
        tl.debug_barrier()  # keeps the compiler from working on several exits at once, which would spill registers
        mixture += tempered * share
        mixture_at_label += tempered_label * share
    return mixture, mixture_at_label


@triton.jit
def _write_labels(gradient, label, is_valid, is_finite, grads, M: tl.constexpr, K: tl.constexpr):
    """Writes the label's own part of all exits' gradients over what is there; NaN everywhere if the sample is not finite.

    One number per exit takes less than a comparison of each class with the label.
    """
    lane = tl.arange(0, LANES)
    tl.debug_barrier()  # other threads have written the rows
    tl.store(grads + lane * K + label, gradient.to(grads.dtype.element_ty), mask=lane < tl.where(is_valid, M, 0))
    if is_finite == 0:
        write_nan(grads, M * K)


@triton.jit
def _load_row(row, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = tl.arange(0, BLOCK_K)
    return tl.load(row + k, mask=k < K, other=MASKED)


@triton.jit
def _to_float(row, K: tl.constexpr):
    """Logits in float32; beyond K they have to be finite, and fp16 has no number that is small enough."""
    z = row.to(tl.float32)
    if row.dtype == tl.float16:
        z = tl.where(tl.arange(0, row.shape[0]) < K, z, MASKED)
    return z
