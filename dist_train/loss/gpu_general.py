"""The objective for any targets, teachers and number of classes; it reads the logits twice."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
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


@triton.constexpr_function
def is_soft(labels):
    """Whether the targets are distributions."""
    return labels.dtype.element_ty.is_floating()


@triton.constexpr_function
def is_student(rule, m, exits):
    """Whether exit m has teachers; with an explicit matrix any exit may."""
    return rule in ("ensemble", "matrix") or (rule != "none" and m < exits - 1)


@triton.constexpr_function
def is_teacher(rule, m, exits):
    """Whether exit m teaches another one; with an explicit matrix any exit may."""
    if rule == "last":
        return m == exits - 1
    return m > 0 if rule in ("next", "later") else rule != "none"


@triton.constexpr_function
def teacher_share(rule, m, exits):
    """What the sum of the teachers' probabilities is multiplied by to be the mixture that exit m learns from."""
    return 1 / max(exits - 1 - m, 1) if rule == "later" else 1.0


@triton.constexpr_function
def count_dots(rule, exits):
    """The number of sums that _second_reading makes."""
    return sum(is_student(rule, m, exits) + is_teacher(rule, m, exits) for m in range(exits))


@triton.jit(do_not_specialize=["samples", "grad_scale"])
def general_kernel(
    logits, targets, exits, partials, grads, samples, grad_scale,
    M: tl.constexpr, K: tl.constexpr, OBJECTIVE: tl.constexpr, BLOCK_K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """As ``single_pass_kernel``, for any :class:`Targets`; OBJECTIVE is the rule (none, last, next, later or matrix) and
    the label smoothing.

    The first reading of a sample, exit by exit, makes sums over the classes; the second one, class by class, the rest.
    """
    lane = tl.arange(0, LANES)
    sums = zeros(SUMS)
    label_scale = reciprocal(tl.load(exits.label_count).to(tl.float32))
    for number in range(tl.program_id(0), samples, tl.num_programs(0)):
        n = number + tl.zeros([], tl.int64)
        labels, target_sum, has_label, is_valid = _read_labels(n, targets, K, BLOCK_K)
        weight = read_weight(n, targets)
        factor = weight * label_factor(label_scale, has_label, is_valid)
        columns, softmaxes = zeros(5), ((), (), (), ())
        for m in tl.static_range(M):
            row = logits[m] + n * K
            values, softmax = _first_reading(row, labels, targets, n, exits.temperature + m, K, OBJECTIVE[1], BLOCK_K)
            columns = put(lane == m, values, columns)
            # Tuple by tuple: tops, 1 / totals, 1 / tempered totals, 1 / number of classes.
            softmaxes = _append(softmaxes, softmax)
        product, mean, rank, total, tempered_total = columns
        is_finite = tl.min(tl.where((lane >= M) | ((total > 0) & (total < INFINITY)), 1, 0)) > 0
        # Of the label's gradient, of the distillation's, and the mass of the target.
        scales = (factor * grad_scale, weight * grad_scale / samples, target_sum)
        crosses, entropies, confidence = _second_reading(
            (n, labels, scales, softmaxes), logits, targets, exits, grads, M, K, OBJECTIVE, BLOCK_K, THREADS
        )
        if grads is not None and is_finite == 0:
            write_nan(grads + n * (M * K), M * K)
        # CE(y, p) = sum_k y_k (ln(total) - (z_k - top)); with the uniform distribution of smoothing likewise.
        log_total = tl.log2(total) * LN2
        ce = target_sum * log_total - product
        smooth_ce = (1 - OBJECTIVE[1]) * ce + OBJECTIVE[1] * (log_total - mean)
        logs = (tl.log2(tempered_total), crosses, entropies)
        flags = (has_label, is_valid, is_finite)
        sums = add_sample(
            sums, (ce, smooth_ce), logs, rank, tl.where(lane == 0, confidence, 0.0), (factor, weight), flags, exits, M
        )
    store_sums(sums, partials, M)


@triton.jit
def _append(tuples, values):
    """Each tuple with one of the values at its end."""
    longer = ()
    for i in tl.static_range(len(values)):
        longer = longer + (tuples[i] + (values[i],),)
    return longer


@triton.jit
def _read_labels(n, targets, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(label, second label, weight of the first), the sum of the target, whether there is a label, whether it is valid."""
    if is_soft(targets.labels):
        target_sum, largest, label = 0.0, -1.0, tl.zeros([], tl.int32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            y = tl.load(targets.labels + n * K + k, mask=k < K, other=0.0).to(tl.float32)
            # A negative share makes the loss NaN.
            target_sum += tl.sum(tl.where(y >= 0, y, float("nan")))
            here = tl.max(y)
            label = tl.where(here > largest, start + tl.argmax(y, 0), label)
            largest = tl.maximum(largest, here)
        # As an integer, because Triton's interpreter cannot spread a comparison of floats over lanes.
        has_label = tl.where(target_sum <= 0, 0, 1) == 1  # also where the sum is NaN
        return (label, label, 1.0), target_sum, has_label, has_label
    labels, has_label, is_valid = read_labels(n, targets, K)
    return labels, 1.0, has_label, is_valid


@triton.jit
def _first_reading(
    row, labels, targets, n, temperature, K: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Of an exit: what its losses are made of, and its softmax.

    The former: product of target and logits less their maximum, mean of those logits over the classes that are not
    masked, rank of the label, sums of exponentials at temperature 1 and at the exit's own.  The latter: maximum, the
    sums' reciprocals, 1 / the number of classes that are not masked.
    """
    label, second, lam = labels
    scored = tl.where(lam >= 0.5, label, second)
    scored_logit = tl.load(row + scored).to(tl.float32)
    scale = LOG2E * reciprocal(tl.load(temperature))
    # Not -inf: after a first block of masked classes alone, before - top would be -inf + inf, a NaN.
    top, total, tempered_total, rank = -1e30, 0.0, 0.0, tl.zeros([], tl.int32)
    product, mean, count = 0.0, 0.0, 0.0
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        z = tl.load(row + k, mask=k < K, other=-INFINITY).to(tl.float32)
        # Online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018): what was summed so far is
        # rescaled when a larger maximum comes.
        before = top
        top = tl.maximum(top, tl.max(z))
        total = total * _rescale(before, top, LOG2E) + tl.sum(exp2_below(z, top, LOG2E)[0])
        tempered_total = tempered_total * _rescale(before, top, scale) + tl.sum(exp2_below(z, top, scale)[0])
        rank += tl.sum(((z > scored_logit) | ((z == scored_logit) & (k < scored))).to(tl.int32))
    if is_soft(targets.labels) or SMOOTHING > 0:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            z = tl.load(row + k, mask=k < K, other=-INFINITY).to(tl.float32)
            if is_soft(targets.labels):
                y = tl.load(targets.labels + n * K + k, mask=k < K, other=0.0).to(tl.float32)
                product += tl.sum(y * nats_below(z, top))
            count += tl.sum((z > -INFINITY).to(tl.float32))
            mean += tl.sum(tl.where(z > -INFINITY, nats_below(z, top), 0.0))
        mean, count = mean / count, 1 / count
    if not is_soft(targets.labels):
        product = lam * nats_below(tl.load(row + label).to(tl.float32), top)
        product += (1 - lam) * nats_below(tl.load(row + second).to(tl.float32), top)
    values = (product, mean, rank.to(tl.float32), total, tempered_total)
    return values, (top, reciprocal(total), reciprocal(tempered_total), count)


@triton.jit
def _rescale(before, top, scale):
    """What exponentials less the maximum ``before`` are multiplied by to be less ``top``, rounded as :func:`exp2_below` does.

    That rounds scale * before, which of large logits moves the exponents by much more than their own rounding.
    """
    return tl.exp2(exp2_below(before, top, scale)[1] - exp2_below(before, before, scale)[1])


@triton.jit
def _second_reading(
    sample, logits, targets, exits, grads,
    M: tl.constexpr, K: tl.constexpr, OBJECTIVE: tl.constexpr, BLOCK_K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient; products of exponents with mixture and own probabilities, an exit per lane; confidence."""
    RULE: tl.constexpr = OBJECTIVE[0]
    n, labels, scales, softmaxes = sample
    dots, confidence = (), tl.zeros([BLOCK_K], tl.float32)
    for _ in tl.static_range(count_dots(RULE, M)):
        dots = dots + (tl.zeros([THREADS], tl.float32),)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        probs, exponents, mixture = (), (), tl.zeros([BLOCK_K], tl.float32)
        if RULE == "matrix":  # any exit may teach: all are needed before the first mixture
            for m in tl.static_range(M):
                q, x = _tempered(_load(n, k, logits[m], K), exits, softmaxes, m)
                probs, exponents = probs + (q,), exponents + (x,)
        added = ()
        for m in tl.static_range(M - 1, -1, -1):
            z = _load(n, k, logits[m], K)
            mixture_sum = 1.0
            if RULE == "matrix":
                q, x = probs[m], exponents[m]
                mixture, mixture_sum = _mix(probs, exits.teachers + m * M, M)
            else:
                q, x = _tempered(z, exits, softmaxes, m)
            gradient = _label_gradient(n, k, z, labels, targets, softmaxes, scales, m, K, OBJECTIVE[1])
            gradient *= scales[0] * tl.load(exits.label_weights + m)
            if is_student(RULE, m, M):
                distill = scales[1] * tl.load(exits.distill_weights + m) * tl.load(exits.temperature + m)
                teacher = mixture * teacher_share(RULE, m, M)
                # sum_t w_t (q_m - q_t): a row of an explicit matrix need not sum to 1.
                gradient += distill * (mixture_sum * q - teacher)
                added = added + (_by_thread(teacher * x, THREADS),)
            if is_teacher(RULE, m, M):
                added = added + (_by_thread(q * x, THREADS),)
            if grads is not None:
                tl.store(grads + (n * M + m) * K + k, gradient.to(grads.dtype.element_ty), mask=k < K)
            if RULE == "matrix":
                # Once for all exits: the mixture whose confidence is taken does not depend on the student.
                if m == 0:
                    confidence = tl.maximum(confidence, _mix(probs, exits.confidence_weights, M)[0])
            elif m == M - 1:
                confidence = tl.maximum(confidence, q)
            # Exit m alone teaches the exit before it.
            if RULE == "next":
                mixture = q
            elif RULE != "matrix" and is_teacher(RULE, m, M):
                mixture += q
        dots = _add(dots, added)
    # Taken off in the order in which the exits have appended them.
    crosses, entropies = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for m in tl.static_range(M - 1, -1, -1):
        here = tl.arange(0, LANES) == m
        if is_student(RULE, m, M):
            crosses = tl.where(here, tl.sum(dots[0]), crosses)
            dots = dots[1:]
        if is_teacher(RULE, m, M):
            entropies = tl.where(here, tl.sum(dots[0]), entropies)
            dots = dots[1:]
    return crosses, entropies, tl.max(confidence)


@triton.jit
def _load(n, k, logits, K: tl.constexpr):
    return tl.load(logits + n * K + k, mask=k < K, other=-INFINITY).to(tl.float32)


@triton.jit
def _tempered(z, exits, softmaxes, m: tl.constexpr):
    """Tempered probabilities of exit m at some classes, and their exponents."""
    exps, x = exp2_below(z, softmaxes[0][m], LOG2E * reciprocal(tl.load(exits.temperature + m)))
    # MASKED, because a probability of 0 times the exponent -inf of a masked class would be NaN.
    return exps * softmaxes[2][m], tl.maximum(x, MASKED)


@triton.jit
def _mix(probs, weights, M: tl.constexpr):
    """Sum of weighted probabilities, and of the weights."""
    mixture, total = tl.zeros(probs[0].shape, tl.float32), 0.0
    for t in tl.static_range(M):
        weight = tl.load(weights + t)
        mixture += weight * probs[t]
        total += weight
    return mixture, total


@triton.jit
def _label_gradient(
    n, k, z, labels, targets, softmaxes, scales, m: tl.constexpr, K: tl.constexpr, SMOOTHING: tl.constexpr
):
    """sum(y) * p - y at the classes k, where y is the target after smoothing."""
    label, second, lam = labels
    probs = exp2_below(z, softmaxes[0][m], LOG2E)[0] * softmaxes[1][m]
    if is_soft(targets.labels):
        target = tl.load(targets.labels + n * K + k, mask=k < K, other=0.0).to(tl.float32)
    else:
        target = tl.where(k == label, lam, 0.0) + tl.where(k == second, 1 - lam, 0.0)
    if SMOOTHING > 0:
        target = (1 - SMOOTHING) * target + tl.where(z > -INFINITY, SMOOTHING * softmaxes[3][m], 0.0)
    # The smoothed target sums to (1 - s) * sum(y) + s.
    return ((1 - SMOOTHING) * scales[2] + SMOOTHING) * probs - target


@triton.jit
def _by_thread(values, THREADS: tl.constexpr):
    """Sums of the neighbours that one thread holds; threads are summed once, at the end."""
    return tl.sum(tl.reshape(values, [THREADS, values.shape[0] // THREADS]), 1)


@triton.jit
def _add(vectors, more):
    """Vector by vector."""
    added = ()
    for i in tl.static_range(len(more)):
        added = added + (vectors[i] + more[i],)
    return added
