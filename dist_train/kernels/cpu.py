"""The objective over all exits in vectorised torch: what ``dist_train::exit_loss`` runs on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.errors import DataError

UNLABELED = -100
MASKED = -1e30
"""What a logit of -inf counts as in sums: 0 times it must be 0."""
CHUNK = 1 << 19
"""Logits that are worked on at a time, so that the temporaries of a large batch stay small."""
_HITS = torch.tensor([1, 5])[:, None, None]


class _Labels(NamedTuple):
    """Targets, checked: one label per sample, two with shares, or whole distributions."""

    ids: list[Tensor]
    """Labels [N] int64 within [0, K); of distributions, their largest entry."""
    shares: list[Tensor]
    """Share [N] of each label where there are two."""
    soft: Tensor | None
    """[N, K] distributions."""
    valid: Tensor
    """[N] bool: samples with a label."""


class _Softened(NamedTuple):
    """Softmax of all exits: the logits [M, N, K] shifted to a maximum of 0, the probabilities, log-sum-exp [M, N]."""

    x: Tensor
    p: Tensor
    lse: Tensor


class _Constants(NamedTuple):
    """What the exits' weights come to for all samples alike."""

    temperature: Tensor | None
    """[M, 1, 1]; None if all are 1."""
    mixing: Tensor
    """[M, M]: softened probabilities to the gradient of all pairs."""
    values: Tensor
    """[M, M]: values of the pairs to the loss, per sample."""
    coefficients: Tensor
    """[M, 1]: label losses to the loss."""
    reader: list[float]
    """[M]."""
    smoothing: float
    cross_entropy: bool
    headroom: int
    """What the gradient is multiplied by."""


def headroom(dtype: torch.dtype, samples: int) -> int:
    """What the operator multiplies its gradient by: in fp16, that of a large batch would be rounded to 0 without it."""
    return max(samples, 1) if dtype == torch.float16 else 1


def exit_loss_cpu(
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
    """See :mod:`dist_train.kernels.exit_loss`; values out of range raise DataError, since looking costs nothing here."""
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    exits, (samples, classes) = len(logits), logits[0].shape
    tau = temperature.to(dtype)[:, None]
    pairs = tau * teachers.to(dtype)
    factor = headroom(logits[0].dtype, samples)
    constants = _Constants(
        tau[:, None] if set(temperature.tolist()) != {1.0} else None,
        (torch.diag(pairs.sum(1)) - pairs) * (factor / max(samples, 1)),
        pairs * tau / max(samples, 1),
        (label_weights.to(dtype) / labeled)[:, None],
        reader.tolist(),
        smoothing,
        cross_entropy,
        factor,
    )
    sums: list[tuple[Tensor, Tensor]] = []
    grads = logits[0].new_empty((exits, samples, classes) if with_grad else (0, 0, 0))
    rows = max(1, CHUNK // (exits * classes))
    for start in range(0, samples, rows):
        part = slice(start, start + rows)
        sums.append(
            _chunk(
                [z[part] for z in logits] if rows < samples else list(logits),
                _read_labels(targets[part], _cut(second, part), _cut(share, part), classes, dtype),
                _read_weights(_cut(weights, part), dtype),
                constants,
                grads[:, part] if with_grad else None,
            )
        )
    if len(sums) == 1:
        return *sums[0], grads
    loss, vector = torch.zeros((), dtype=dtype), torch.zeros(exits * exits + 3 * exits + 5)
    for partial_loss, partial_vector in sums:
        loss += partial_loss
        vector += partial_vector
    return loss, vector, grads


def _chunk(
    logits: list[Tensor], labels: _Labels, weights: Tensor | None, constants: _Constants, grads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and statistics of some of the samples; writes their gradient."""
    x = torch.stack(logits).to(constants.mixing.dtype)
    x -= x.amax(-1, keepdim=True)
    plain = _soften(x)
    warm = plain if constants.temperature is None else _soften(x / constants.temperature)
    finite = None if math.isfinite(float(warm.lse.sum())) else warm.lse.isfinite().all(0)

    q = warm.p if weights is None else warm.p * weights[:, None]
    coefficients = constants.coefficients * (labels.valid if weights is None else labels.valid * weights)
    gradient = None
    if grads is not None:
        gradient = grads if grads.dtype == q.dtype else torch.empty_like(q)
        # All weighted pairs together have the gradient of one cross-entropy to the mixed teachers.
        torch.mm(constants.mixing, q.view(len(q), -1), out=gradient.view(len(q), -1))
    index = [ids.expand(len(x), -1).unsqueeze(-1) for ids in labels.ids]
    picked = [x.gather(-1, one) for one in index]
    ce, smooth_ce = _label_terms(
        plain, labels, index, picked, constants.smoothing, coefficients * constants.headroom, gradient
    )
    loss = (smooth_ce * coefficients).sum()
    if grads is not None and gradient is not None:
        if finite is not None:
            gradient[:, ~finite] = torch.nan  # also where a BLAS skips products with 0
        if gradient is not grads:
            grads.copy_(gradient)

    cross = _cross_entropies(warm.x, q, warm.lse if weights is None else warm.lse * weights, finite)
    kl = cross - cross.diagonal()
    loss += ((cross if constants.cross_entropy else kl) * constants.values).sum()
    counted = labels.valid if finite is None else labels.valid & finite
    confidence = _where(finite, _confidence(warm, constants.reader)).sum()
    hits = (_ranks(x, *_judged(labels, picked), room=plain.p) < _HITS) & counted
    nonfinite = 0 if finite is None else len(finite) - int(finite.sum())
    counts = torch.tensor([float(confidence), q.shape[1], int(counted.sum()), 0, nonfinite])
    vector = [_where(counted, ce).sum(1), kl.view(-1), hits.sum(2).view(-1), counts]
    return loss, torch.cat(vector)


def _where(finite: Tensor | None, values: Tensor) -> Tensor:
    """``values`` with zeros for samples [N] that are not to count."""
    return values if finite is None else torch.where(finite, values, 0)


def _soften(x: Tensor) -> _Softened:
    """Softmax of logits [M, N, K] with a maximum of 0: log-sum-exp is minus the logarithm of the largest probability."""
    p = x.softmax(-1)
    return _Softened(x, p, -p.amax(-1).log())


def _read_labels(
    targets: Tensor, second: Tensor | None, share: Tensor | None, classes: int, dtype: torch.dtype
) -> _Labels:
    if targets.is_floating_point():
        soft = targets.to(dtype)
        if not (bool(soft.amin() >= 0) and bool(soft.sum().isfinite())):
            raise DataError(
                "targets holds a share that is negative or not finite; allowed is 0 and above (a row of zeros: unlabeled)"
            )
        return _Labels([soft.argmax(-1)], [], soft, soft.sum(-1) > 0)
    ids = [targets] if second is None else [targets, second]
    for labels in ids:
        low, high = (int(value) for value in labels.aminmax())
        if high >= classes or bool(low < 0 and ((labels < 0) & (labels != UNLABELED)).any()):
            wrong = labels[(labels >= classes) | (labels < 0) & (labels != UNLABELED)]
            raise DataError(
                f"targets holds the label {int(wrong[0])}; allowed are 0 to {classes - 1}, and {UNLABELED} for unlabeled images"
            )
    shares = []
    if share is not None:
        if not (bool(share.amin() >= 0) and bool(share.amax() <= 1)):
            raise DataError(
                f"targets.share runs from {float(share.amin()):g} to {float(share.amax()):g}; allowed is 0 to 1"
            )
        shares = [share.to(dtype), 1 - share.to(dtype)]
    valid = ids[0] >= 0 if second is None else (ids[0] >= 0) & (ids[1] >= 0)
    return _Labels([labels.clamp(min=0) for labels in ids], shares, None, valid)


def _read_weights(weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if weights is None:
        return None
    if not (bool(weights.amin() >= 0) and bool(weights.sum().isfinite())):
        raise DataError("weights holds a number that is negative or not finite; allowed is 0 and above")
    return weights.to(dtype)


def _cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _label_terms(
    plain: _Softened,
    labels: _Labels,
    index: list[Tensor],
    picked: list[Tensor],
    smoothing: float,
    factor: Tensor,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [M, N] without and with smoothing; adds ``factor`` [M, N] times the gradient of the latter.

    ``index`` and ``picked`` [M, N, 1] are each label's class and logit.
    """
    keep = 1 - smoothing
    factor = factor.unsqueeze(-1)
    mass: float | Tensor = 1.0
    ce = plain.lse
    if labels.soft is None:
        for number, (place, logit) in enumerate(zip(index, picked)):
            part = labels.shares[number].unsqueeze(-1) if labels.shares else 1.0
            ce = ce - (part * logit.clamp(min=MASKED)).squeeze(-1)
            if gradient is not None:
                gradient.scatter_add_(-1, place, factor * (-keep * part))
    else:
        mass = labels.soft.sum(-1, keepdim=True)
        ce = plain.lse * mass.squeeze(-1) - (plain.x.clamp(min=MASKED) * labels.soft).sum(-1)
        if gradient is not None:
            gradient.addcmul_(factor, labels.soft, value=-keep)
    smooth_ce = ce
    if smoothing:
        classes = plain.x > -torch.inf
        even = classes / classes.sum(-1, keepdim=True)
        smooth_ce = keep * ce + smoothing * (plain.lse - (plain.x.clamp(min=MASKED) * even).sum(-1))
        if gradient is not None:
            gradient.addcmul_(factor, even, value=-smoothing)
        mass = keep * mass + smoothing
    if gradient is not None:
        gradient.addcmul_(factor * mass, plain.p)
    return ce, smooth_ce


def _judged(labels: _Labels, picked: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The label [N] by which hits are counted, of two the one with the larger share, and its logit [M, N, 1]."""
    if not labels.shares:
        return labels.ids[0], picked[0]
    first = labels.shares[0] >= 0.5
    one, other = labels.ids
    return torch.where(first, one, other), torch.where(first[:, None], picked[0], picked[1])


def _ranks(x: Tensor, ids: Tensor, label: Tensor, room: Tensor) -> Tensor:
    """How many classes [M, N] come before the label: larger logits, and equal ones of earlier classes.

    Comparisons are written over ``room``, which is like ``x``, as floats, because sums of floats are vectorised.
    """
    larger = torch.gt(x, label, out=room).sum(-1)
    torch.eq(x, label, out=room)
    if float(room.sum()) != label.numel():  # each label equals itself; a tie, or a NaN, makes another sum
        tied = (room.sum(-1) > 1) & (larger < 5)
        earlier = torch.arange(x.shape[-1]) < ids[:, None]
        exits, samples = tied.nonzero(as_tuple=True)
        larger[exits, samples] += (room[exits, samples] * earlier[samples]).sum(-1)
    return larger


def _confidence(warm: _Softened, reader: list[float]) -> Tensor:
    """Largest probability [N] of the mixture of exits that ``reader`` describes."""
    if reader.count(0.0) == len(reader) - 1:
        return torch.exp(-warm.lse[reader.index(max(reader))])
    return torch.einsum("m,mnk->nk", warm.p.new_tensor(reader), warm.p).amax(-1)


def _cross_entropies(x: Tensor, q: Tensor, lse: Tensor, finite: Tensor | None) -> Tensor:
    """[M, M] cross-entropy of exit m (row) to exit t (column), summed over samples with finite logits."""
    products = torch.mm(x.view(len(x), -1), q.view(len(q), -1).T)
    if not math.isfinite(float(products.sum())):
        x, q, lse = x.clamp(min=MASKED), q, _where(finite, lse)
        if finite is not None:
            x, q = _where(finite[:, None], x), _where(finite[:, None], q)
        products = torch.mm(x.view(len(x), -1), q.view(len(q), -1).T)
    return lse.sum(1, keepdim=True) - products
