"""The objective over all exits in vectorised torch: what ``dist_train::exit_loss`` runs on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.errors import DataError
from dist_train.loss.inputs import UNLABELED, ExitWeights, LossOptions, Targets, grad_scale
from dist_train.loss.statistics import ExitStats

MASKED = -1e30
"""What a logit of -inf counts as in sums: 0 times it must be 0."""
CHUNK = 1 << 19
"""Logits that are worked on at a time, so that the temporaries of a large batch stay small."""
# [2, 1, 1]: against ranks [M, N] this gives [2, M, N], whose rows are the hits of top-1 and of top-5.
_HITS = torch.tensor([1, 5])[:, None, None]


class _Labels(NamedTuple):
    """Targets of some samples, checked: one label per sample, two with their shares, or whole distributions."""

    ids: list[Tensor]
    """Labels [N] int64 within [0, K); of distributions, their largest entry."""
    shares: list[Tensor]
    """Share [N] of each label where there are two."""
    soft: Tensor | None
    """[N, K] distributions."""
    has_label: Tensor
    """[N] bool."""


class _Softmax(NamedTuple):
    """Softmax of all exits: the logits [M, N, K] shifted to a maximum of 0, the probabilities, log-sum-exp [M, N]."""

    logits: Tensor
    probs: Tensor
    log_sum_exp: Tensor


class _Constants(NamedTuple):
    """What the exits' weights come to for all samples alike."""

    temperature: Tensor | None
    """[M, 1, 1]; None if all are 1."""
    teachers: Tensor
    """[M, M]."""
    distill: Tensor
    """[M]: sums of the distillation to the loss."""
    pair_gradient: Tensor
    """[M, M]: tempered probabilities to the gradient of all pairs of student and teacher."""
    label_weights: Tensor
    """[M, 1]: label losses to the loss."""
    confidence_weights: list[float]
    """[M]."""
    smoothing: float
    cross_entropy: bool
    grad_scale: int


def exit_loss_cpu(
    logits: Sequence[Tensor], targets: Targets, exits: ExitWeights, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`dist_train.loss.operator`; a value out of range raises DataError, since looking costs nothing here."""
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    num_exits, (samples, classes) = len(logits), logits[0].shape
    constants = _make_constants(exits, options, samples, dtype, grad_scale(logits[0].dtype, samples))
    grads = logits[0].new_empty((num_exits, samples, classes) if options.with_grad else (0, 0, 0))
    sums: list[tuple[Tensor, Tensor]] = []
    # All exits of a sample are in the same chunk: students are compared with their teachers.
    rows = max(1, CHUNK // (num_exits * classes))
    for start in range(0, samples, rows):
        part = slice(start, start + rows)
        cut = Targets(*(None if t is None else t[part] for t in targets))  # type: ignore[arg-type]
        sums.append(
            _chunk(
                [z[part] for z in logits] if rows < samples else list(logits),
                _read_labels(cut, classes, dtype),
                _read_weights(cut.weights, dtype),
                constants,
                grads[:, part] if options.with_grad else None,
            )
        )
    if len(sums) == 1:
        loss, vector = sums[0]
        return loss, vector.float(), grads
    loss, vector = torch.zeros((), dtype=dtype), ExitStats.zeros(num_exits).vector
    for partial_loss, partial_vector in sums:
        loss += partial_loss
        vector += partial_vector
    return loss, vector, grads


def _make_constants(
    exits: ExitWeights, options: LossOptions, samples: int, dtype: torch.dtype, scale: int
) -> _Constants:
    temperature, teachers = exits.temperature.to(dtype), exits.teachers.to(dtype)
    per_sample = exits.distill_weights.to(dtype) * temperature / max(samples, 1)
    # The gradient of T^2 * D(q_t, q_m) in the logits of student m is T * (q_m - q_t).
    # All pairs together, with Q [M, N K] the tempered probabilities: row m of (diag(P 1) - P) Q is sum_t P_mt (q_m - q_t).
    pairs = (per_sample * scale)[:, None] * teachers
    return _Constants(
        # At 1, where annealing starts, the softmax of the labels serves the distillation as well.
        temperature[:, None, None] if set(exits.temperature.tolist()) != {1.0} else None,
        teachers,
        per_sample * temperature,
        torch.diag(pairs.sum(1)) - pairs,
        (exits.label_weights.to(dtype) / exits.label_count)[:, None],
        exits.confidence_weights.tolist(),
        options.smoothing,
        options.cross_entropy,
        scale,
    )


def _chunk(
    logits: list[Tensor], labels: _Labels, weights: Tensor | None, constants: _Constants, grads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and statistics of some of the samples; writes their gradient."""
    x = torch.stack(logits).to(constants.distill.dtype)
    # A softmax does not change by a shift; with a maximum of 0 no exponential overflows.
    x -= x.amax(-1, keepdim=True)
    plain = _softmax(x)
    tempered = plain if constants.temperature is None else _softmax(x / constants.temperature)
    # One sum tells whether any sample is to be looked at; there hardly ever is one.
    finite = None if math.isfinite(float(tempered.log_sum_exp.sum())) else tempered.log_sum_exp.isfinite().all(0)

    q = tempered.probs if weights is None else tempered.probs * weights[:, None]
    label_weights = constants.label_weights * (labels.has_label if weights is None else labels.has_label * weights)
    gradient = None
    if grads is not None:
        # Summed in the dtype of the computation and rounded once, when all terms are in it.
        gradient = grads if grads.dtype == q.dtype else torch.empty_like(q)
        # All weighted pairs of a student together have the gradient of one cross-entropy to the mixture of its teachers.
        # The view exists for a chunk too: the gradient of the whole batch has the samples of an exit side by side.
        torch.mm(constants.pair_gradient, q.view(len(q), -1), out=gradient.view(len(q), -1))
    index = [ids.expand(len(x), -1).unsqueeze(-1) for ids in labels.ids]
    label_logits = [x.gather(-1, classes) for classes in index]
    ce, smooth_ce = _label_terms(
        plain, labels, index, label_logits, constants.smoothing, label_weights * constants.grad_scale, gradient
    )
    loss = (smooth_ce * label_weights).sum()
    if grads is not None and gradient is not None:
        if finite is not None:
            gradient[:, ~finite] = torch.nan  # also where a BLAS skips products with 0
        if gradient is not grads:
            grads.copy_(gradient)

    log_sum_exp = tempered.log_sum_exp if weights is None else tempered.log_sum_exp * weights
    cross = _cross_entropies(tempered.logits, q, log_sum_exp, finite)
    # KL(q_t, q_m) = CE(q_t, q_m) - H(q_t), and the entropy H(q_t) = CE(q_t, q_t) is on the diagonal.
    kl = (constants.teachers * (cross - cross.diagonal())).sum(1)
    value = (constants.teachers * cross).sum(1) if constants.cross_entropy else kl
    loss += (value * constants.distill).sum()
    counted = labels.has_label if finite is None else labels.has_label & finite
    confidence = _where(finite, _confidence(tempered, constants.confidence_weights)).sum()
    # The last use of the probabilities of the labels: their memory takes the comparisons.
    hits = (_ranks(x, *_scored_label(labels, label_logits), out=plain.probs) < _HITS) & counted
    nonfinite = 0 if finite is None else len(finite) - int(finite.sum())
    # The zero is the count of labels out of range: here they are refused in _read_labels.
    counts = torch.tensor([float(confidence), q.shape[1], int(counted.sum()), 0, nonfinite])
    # kl needs no mask: _cross_entropies leaves out samples that are not finite.
    vector = [_where(counted, ce).sum(1), kl, hits.sum(2).view(-1), counts]
    return loss, torch.cat(vector)


def _where(finite: Tensor | None, values: Tensor) -> Tensor:
    """``values`` with zeros for samples [N] that are not to count."""
    return values if finite is None else torch.where(finite, values, 0)


def _softmax(x: Tensor) -> _Softmax:
    """Softmax of logits [M, N, K] with a maximum of 0: log-sum-exp is minus the logarithm of the largest probability."""
    probs = x.softmax(-1)
    # No logarithm of 0: the largest of K probabilities is at least 1 / K.
    return _Softmax(x, probs, -probs.amax(-1).log())


def _read_labels(targets: Targets, classes: int, dtype: torch.dtype) -> _Labels:
    if targets.labels.is_floating_point():
        soft = targets.labels.to(dtype)
        if not (bool(soft.amin() >= 0) and bool(soft.sum().isfinite())):
            raise DataError(
                "targets holds a share that is negative or not finite; allowed is 0 and above (a row of zeros: unlabeled)"
            )
        return _Labels([soft.argmax(-1)], [], soft, soft.sum(-1) > 0)
    ids = [targets.labels] if targets.second is None else [targets.labels, targets.second]
    for labels in ids:
        # Both bounds in one pass; masks [N] are made only if something is below 0 or too large.
        low, high = (int(value) for value in labels.aminmax())
        if high >= classes or bool(low < 0 and ((labels < 0) & (labels != UNLABELED)).any()):
            wrong = labels[(labels >= classes) | (labels < 0) & (labels != UNLABELED)]
            raise DataError(
                f"targets holds the label {int(wrong[0])}; allowed are 0 to {classes - 1}, and {UNLABELED} for unlabeled images"
            )
    shares, lam = [], targets.lam
    if lam is not None:
        if not (bool(lam.amin() >= 0) and bool(lam.amax() <= 1)):
            raise DataError(
                f"targets.share runs from {float(lam.amin()):g} to {float(lam.amax()):g}; allowed is 0 to 1"
            )
        shares = [lam.to(dtype), 1 - lam.to(dtype)]
    has_label = ids[0] >= 0 if len(ids) == 1 else (ids[0] >= 0) & (ids[1] >= 0)
    # Unlabeled samples get class 0, so that they can be gathered; the factor of their label loss is 0.
    return _Labels([labels.clamp(min=0) for labels in ids], shares, None, has_label)


def _read_weights(weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if weights is None:
        return None
    if not (bool(weights.amin() >= 0) and bool(weights.sum().isfinite())):
        raise DataError("weights holds a number that is negative or not finite; allowed is 0 and above")
    return weights.to(dtype)


def _label_terms(
    plain: _Softmax,
    labels: _Labels,
    index: list[Tensor],
    label_logits: list[Tensor],
    smoothing: float,
    factor: Tensor,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [M, N] without and with smoothing; adds ``factor`` [M, N] times the gradient of the latter.

    ``index`` and ``label_logits`` [M, N, 1] are each label's class and logit.
    """
    keep = 1 - smoothing
    factor = factor.unsqueeze(-1)
    target_sum: float | Tensor = 1.0
    ce = plain.log_sum_exp
    # CE(y, p) = sum_k y_k * (log_sum_exp - z_k); its gradient in the logits is sum(y) * p - y.
    if labels.soft is None:
        for number, (classes, logit) in enumerate(zip(index, label_logits)):
            share = labels.shares[number].unsqueeze(-1) if labels.shares else 1.0
            ce = ce - (share * logit.clamp(min=MASKED)).squeeze(-1)
            if gradient is not None:
                gradient.scatter_add_(-1, classes, factor * (-keep * share))
    else:
        # A distribution need not sum to 1; a row of zeros gives a loss and a gradient of 0.
        target_sum = labels.soft.sum(-1, keepdim=True)
        ce = plain.log_sum_exp * target_sum.squeeze(-1) - (plain.logits.clamp(min=MASKED) * labels.soft).sum(-1)
        if gradient is not None:
            gradient.addcmul_(factor, labels.soft, value=-keep)
    smooth_ce = ce
    if smoothing:
        kept = plain.logits > -torch.inf
        # A class that is masked by -inf has no probability: mass on it would make the loss infinite.
        uniform = kept / kept.sum(-1, keepdim=True)
        uniform_ce = plain.log_sum_exp - (plain.logits.clamp(min=MASKED) * uniform).sum(-1)
        smooth_ce = keep * ce + smoothing * uniform_ce
        if gradient is not None:
            gradient.addcmul_(factor, uniform, value=-smoothing)
        # The uniform part has mass 1, whatever the target sums to.
        target_sum = keep * target_sum + smoothing
    if gradient is not None:
        gradient.addcmul_(factor * target_sum, plain.probs)
    return ce, smooth_ce


def _scored_label(labels: _Labels, label_logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The label [N] by which hits are counted, of two the one with the larger share, and its logit [M, N, 1]."""
    if not labels.shares:
        return labels.ids[0], label_logits[0]
    is_first, (first, second) = labels.shares[0] >= 0.5, labels.ids
    logit = torch.where(is_first[:, None], label_logits[0], label_logits[1])
    return torch.where(is_first, first, second), logit


def _ranks(x: Tensor, ids: Tensor, label_logit: Tensor, out: Tensor) -> Tensor:
    """How many classes [M, N] come before the label: larger logits, and equal ones of earlier classes.

    Comparisons are written over ``out``, which is like ``x``, as floats, because sums of floats are vectorised.
    """
    larger = torch.gt(x, label_logit, out=out).sum(-1)
    torch.eq(x, label_logit, out=out)
    if float(out.sum()) != label_logit.numel():  # each label equals itself; a tie, or a NaN, makes another sum
        # From rank 5 on, ties change neither top-1 nor top-5.
        tied = (out.sum(-1) > 1) & (larger < 5)
        earlier = torch.arange(x.shape[-1]) < ids[:, None]
        exits, samples = tied.nonzero(as_tuple=True)
        larger[exits, samples] += (out[exits, samples] * earlier[samples]).sum(-1)
    return larger


def _confidence(tempered: _Softmax, weights: list[float]) -> Tensor:
    """Largest probability [N] of the mixture of exits with these weights."""
    # A single teacher: its largest probability is exp(0 - log_sum_exp).
    if weights.count(0.0) == len(weights) - 1:
        return torch.exp(-tempered.log_sum_exp[weights.index(max(weights))])
    return torch.einsum("m,mnk->nk", tempered.probs.new_tensor(weights), tempered.probs).amax(-1)


def _cross_entropies(x: Tensor, q: Tensor, log_sum_exp: Tensor, finite: Tensor | None) -> Tensor:
    """[M, M] cross-entropy of exit m (row) to exit t (column), summed over samples with finite logits."""
    # CE(q_t, q_m) = log_sum_exp_m * sum_k q_tk - sum_k q_tk x_mk: one matrix product over samples and classes for all pairs.
    products = torch.mm(x.view(len(x), -1), q.view(len(q), -1).T)
    # 0 * -inf is NaN: where a class is masked, or a sample not finite, once more without them.
    if not math.isfinite(float(products.sum())):
        x, log_sum_exp = x.clamp(min=MASKED), _where(finite, log_sum_exp)
        if finite is not None:
            x, q = _where(finite[:, None], x), _where(finite[:, None], q)
        products = torch.mm(x.view(len(x), -1), q.view(len(q), -1).T)
    return log_sum_exp.sum(1, keepdim=True) - products
