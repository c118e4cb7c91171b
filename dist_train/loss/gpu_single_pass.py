"""The objective with each logit read once and kept in registers, for integer labels and fixed rules of teachers.

The mixture of the teachers is carried along from the last exit to the first, so the work is linear in the exits.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
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
    exp2_below,
    label_factor,
    nats_below,
    put,
    read_labels,
    read_weight,
    reciprocal,
    store_sums,
    tl,
    triton,
    write_nan,
    zeros,
)


@triton.jit(do_not_specialize=["samples", "grad_scale"])
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
    OBJECTIVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over the samples of one program, into its rows of ``partials``, and each sample's gradient times grad_scale.

    Args:
        logits: M pointers to contiguous [samples, K].
        targets, exits: :class:`Targets`, with integer labels, and :class:`ExitWeights`.
        partials: [programs, SUMS, width(M)] float32.
        grads: [samples, M, K] in the dtype of the logits, or None.
        OBJECTIVE: the rule of the teachers and the label smoothing.
    """
    RULE: tl.constexpr = OBJECTIVE[0]
    lane = tl.arange(0, LANES)
    sums, tensors = zeros(SUMS), (logits, targets, exits, grads)
    label_scale = reciprocal(tl.load(exits.label_count).to(tl.float32))
    first = tl.program_id(0) + tl.zeros([], tl.int64)  # offsets of large batches need 64 bits
    row = _load_row(logits[M - 1] + first * K, K, BLOCK_K)
    for number in range(tl.program_id(0), samples, tl.num_programs(0)):
        n = number + tl.zeros([], tl.int64)
        labels, has_label, is_valid = read_labels(n, targets, K)
        weight = read_weight(n, targets)
        factor = weight * label_factor(label_scale, has_label, is_valid)
        mixture = (tl.zeros([BLOCK_K], tl.float32), 0.0)
        if RULE == "ensemble":
            mixture = _ensemble(n, labels[0], logits, exits, M, K, BLOCK_K)
        factors = (factor * grad_scale, weight * grad_scale / samples)
        # The next sample's row is loaded ahead; after the last sample it must not be one beyond the batch.
        sample = (n, labels, factors, tl.minimum(n + tl.num_programs(0), samples - 1))
        # The last exit, then the others in a loop that is not unrolled: a sample's code has to fit into the instruction cache.
        row, mixture, columns = _exit(row, mixture, zeros(VALUES), sample, tensors, M - 1, M, K, OBJECTIVE, True)
        for step in range(1, M):
            row, mixture, columns = _exit(row, mixture, columns, sample, tensors, M - 1 - step, M, K, OBJECTIVE, False)
        product, mean, total, tempered_total, cross, entropy, gradient_at_label, rank, confidence = columns
        is_finite = tl.min(tl.where((lane >= M) | (total < INFINITY), 1, 0)) > 0
        if grads is not None:
            if is_one_hot(targets.second, OBJECTIVE):
                _write_labels(gradient_at_label, labels[0], is_valid, grads + n * (M * K), M, K)
            if is_finite == 0:
                write_nan(grads + n * (M * K), M * K)
        # CE(y, p) = ln(total) - sum_k y_k (z_k - top); with the uniform distribution of smoothing likewise.
        log_total = tl.log2(total) * LN2
        ce = log_total - product
        smooth_ce = (1 - OBJECTIVE[1]) * ce + OBJECTIVE[1] * (log_total - mean)
        logs = (tl.log2(tempered_total), cross, entropy)
        flags = (has_label, is_valid, is_finite)
        sums = add_sample(sums, (ce, smooth_ce), logs, rank, confidence, (factor, weight), flags, exits, M)
    store_sums(sums, partials, M)


@triton.jit
def _exit(
    row,
    mixture,
    columns,
    sample,
    tensors,
    m,
    M: tl.constexpr,
    K: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    """Writes the gradient of exit ``m`` of a sample; gives the row of logits that comes next, the mixture, the columns.

    ``mixture`` is the sum of the later exits' tempered probabilities that teach this one, and its value at the label; with
    the rule ``ensemble``, the mean over all.  The columns, with an exit per lane: product of target and logits less their
    maximum, mean of those logits (0 without smoothing), sums of exponentials at temperature 1 and at the exit's own, products
    of the exponents with the mixture and with the exit's own probabilities, gradient at the label, rank of the label, confidence.
    """
    RULE: tl.constexpr = OBJECTIVE[0]
    BLOCK_K: tl.constexpr = row.shape[0]
    logits, targets, exits, grads = tensors
    n, labels, factors, next_n = sample
    label = tl.where(labels[2] >= 0.5, labels[0], labels[1]) if targets.second is not None else labels[0]
    z = _to_float(row, K)
    this_row = _pointer(logits, m, M) + n * K
    # The next exit's row, or the next sample's first one, is on its way while this one is worked on.
    row = _load_row(_pointer(logits, tl.where(m > 0, m - 1, M - 1), M) + tl.where(m > 0, n, next_n) * K, K, BLOCK_K)
    label_logit = tl.load(this_row + label).to(tl.float32)
    top = tl.max(z)
    # Its shuffles run beside those of the sums that follow: there is no branch between them.
    rank = tl.sum((z > label_logit).to(tl.int32))
    # What fills the row up beyond K is larger than the logit of a masked label.
    rank -= tl.where(label_logit < MASKED, BLOCK_K - K, 0)
    gradient, mixture, values = _distill(z, top, label_logit, mixture, exits, factors[1], m, M, RULE, IS_LAST)
    rank = _break_ties(rank, z, this_row, label, label_logit)
    exps, _ = exp2_below(z, top, LOG2E)
    total = tl.where(top > 0.5 * MASKED, tl.sum(exps), float("nan"))  # NaN also where all classes are masked
    # CE(y, p) has the gradient p - y.
    label_weight = tl.load(exits.label_weights + m) * factors[0]
    weight = label_weight * reciprocal(total)
    everywhere, at_label, mean = gradient[0] + exps * weight, 0.0, 0.0
    if is_one_hot(targets.second, OBJECTIVE):
        # The label's part is written over it at the end, which takes less than a comparison of each class with the label.
        exp_label, x_label = exp2_below(label_logit, top, LOG2E)
        # Exponents are of 2, and a loss is in nats.
        product = tl.maximum(x_label * LN2, MASKED)
        at_label = gradient[1] + exp_label * weight - label_weight
    else:
        target, product, mean = _target(z, top, this_row, labels, K, OBJECTIVE[1])
        everywhere -= target * label_weight
    if grads is not None:
        k = tl.arange(0, BLOCK_K)
        tl.store(grads + (n * M + m) * K + k, everywhere.to(grads.dtype.element_ty), mask=k < K)
    values = (product, mean, total, values[0], values[1], values[2], at_label, rank.to(tl.float32), values[3])
    return row, mixture, put(tl.arange(0, LANES) == m, values, columns)


@triton.constexpr_function
def is_one_hot(second, objective):
    """Whether the target of a sample is one label."""
    return second is None and objective[1] == 0


@triton.jit
def _target(z, top, row, labels, K: tl.constexpr, SMOOTHING: tl.constexpr):
    """The target at every class; the product of the target before smoothing and the logits less ``top``, and their mean.

    Smoothing is over the classes that are not masked, and so is the mean.
    """
    label, second, lam = labels
    k = tl.arange(0, z.shape[0])
    target, mean = tl.where(k == label, lam, 0.0) + tl.where(k == second, 1 - lam, 0.0), 0.0
    product = lam * nats_below(tl.load(row + label).to(tl.float32), top)
    product += (1 - lam) * nats_below(tl.load(row + second).to(tl.float32), top)
    if SMOOTHING > 0:
        is_open = (z > -INFINITY) & (k < K)
        share = reciprocal(tl.sum(is_open.to(tl.float32)))
        mean = tl.sum(tl.where(is_open, nats_below(z, top), 0.0)) * share
        target = (1 - SMOOTHING) * target + tl.where(is_open, SMOOTHING * share, 0.0)
    return target, product, mean


@triton.jit
def _distill(
    z, top, label_logit, mixture, exits, weight, m, M: tl.constexpr, RULE: tl.constexpr, IS_LAST: tl.constexpr
):
    """The distillation's part of an exit: its gradient, and that at the label; the mixture with this exit in it; values.

    The values: sum of exponentials, products of the exponents with the mixture and with the own probabilities, confidence.
    """
    IS_STUDENT: tl.constexpr = RULE == "ensemble" or (RULE != "none" and not IS_LAST)
    # Exit 0 teaches nobody under the rules next and later, but a branch for it would cost more than it saves.
    IS_TEACHER: tl.constexpr = RULE != "none" and (IS_LAST or RULE != "last")
    others, others_at_label = mixture
    gradient, gradient_at_label, tempered_total, cross, entropy, confidence = 0.0, 0.0, 1.0, 0.0, 0.0, 0.0
    if IS_STUDENT or IS_TEACHER or IS_LAST:
        temperature = tl.load(exits.temperature + m)
        scale = LOG2E * reciprocal(temperature)
        tempered, x = exp2_below(z, top, scale)
        tempered_label, _ = exp2_below(label_logit, top, scale)
        tempered_total = tl.sum(tempered)
        cross, entropy = _dots(others, tempered, x, IS_STUDENT, IS_TEACHER)
        inverse, share = reciprocal(tempered_total), 1.0
        if RULE == "later" and not IS_LAST:
            share = 1.0 / (M - 1 - m)
        cross, entropy = cross * share, entropy * inverse
        if IS_STUDENT:
            # T^2 * CE(mixture, q) has the gradient T * (q - mixture).
            distill = tl.load(exits.distill_weights + m) * temperature * weight
            gradient = tempered * (distill * inverse) - others * (distill * share)
            gradient_at_label = distill * (tempered_label * inverse - others_at_label * share)
        if IS_LAST:
            confidence = tl.max(others) if RULE == "ensemble" else exp2_below(top, top, scale)[0] * inverse
        if RULE == "next":
            mixture = (tempered * inverse, tempered_label * inverse)
        elif RULE != "ensemble" and IS_TEACHER:
            mixture = (others + tempered * inverse, others_at_label + tempered_label * inverse)
    return (gradient, gradient_at_label), mixture, (tempered_total, cross, entropy, confidence)


@triton.jit
def _pointer(pointers, m, M: tl.constexpr):
    """The pointer of exit m: a tuple can only be indexed by what is known when the kernel is compiled."""
    chosen = pointers[0]
    for i in tl.static_range(1, M):
        chosen = tl.where(m == i, pointers[i], chosen)
    return chosen


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
def _break_ties(rank, z, row, label, label_logit):
    """The rank of the label, with the earlier classes of equal logits, where it is small enough for these to matter.

    From 5 on, ties change neither top-1 nor top-5.
    """
    if rank < 5:  # noqa: SIM102 - Triton computes both sides of `and`
        if tl.sum((z == label_logit).to(tl.int32)) > 1:
            for start in range(0, label, LANES):
                k = start + tl.arange(0, LANES)
                earlier = tl.load(row + k, mask=k < label, other=-INFINITY).to(tl.float32)
                rank += tl.sum(((earlier == label_logit) & (k < label)).to(tl.int32))
    return rank


@triton.jit
def _ensemble(n, label, logits, exits, M: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mean of all exits' tempered probabilities, and its value at the label."""
    mixture, mixture_at_label = tl.zeros([BLOCK_K], tl.float32), 0.0
    for m in range(M):
        row = _pointer(logits, m, M) + n * K
        z = _to_float(_load_row(row, K, BLOCK_K), K)
        top, scale = tl.max(z), LOG2E * reciprocal(tl.load(exits.temperature + m))
        tempered, _ = exp2_below(z, top, scale)
        tempered_label, _ = exp2_below(tl.load(row + label).to(tl.float32), top, scale)
        share = reciprocal(tl.sum(tempered)) / M
        mixture += tempered * share
        mixture_at_label += tempered_label * share
    return mixture, mixture_at_label


@triton.jit
def _write_labels(gradient, label, is_valid, grads, M: tl.constexpr, K: tl.constexpr):
    """Writes the gradient at the label of all exits over what is there."""
    lane = tl.arange(0, LANES)
    tl.debug_barrier()  # other threads have written the rows
    tl.store(grads + lane * K + label, gradient.to(grads.dtype.element_ty), mask=lane < tl.where(is_valid, M, 0))


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
