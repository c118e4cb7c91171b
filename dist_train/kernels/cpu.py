"""The objective over all exits in vectorised torch: what ``dist_train::exit_loss`` runs on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.errors import DataError

UNLABELED = -100
MASKED = -1e30
"""What a logit of -inf counts as in sums: 0 times it must be 0."""


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
    """Softmax of all exits: probabilities [M, N, K], and the shifted logits and log-sum-exp [M, N] they come from."""

    x: Tensor
    p: Tensor
    lse: Tensor


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
    """See :func:`dist_train.kernels.exit_loss.exit_loss`; labels out of range raise DataError, which costs nothing here."""
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    exits, (samples, classes) = len(logits), logits[0].shape
    if samples == 0:
        empty = logits[0].new_empty((exits, 0, classes) if with_grad else 0)
        return torch.zeros((), dtype=dtype), torch.zeros(exits * exits + 3 * exits + 5), empty
    labels = _read_labels(targets, second, share, classes, dtype)
    if weights is not None:
        weights = _read_weights(weights, dtype)
    plain = _soften(logits, dtype)
    tau = temperature.to(dtype)
    warm = plain if bool((tau == 1).all()) else _at_temperature(plain, tau)
    finite = warm.lse.isfinite().all(0)
    sound = bool(finite.all())

    grads = plain.x.new_empty(0)
    pairs = tau[:, None] * teachers.to(dtype)
    q = warm.p if weights is None else warm.p * weights[:, None]
    if with_grad:
        # All weighted pairs together have the gradient of one cross-entropy to the mixed teacher: one small matrix.
        mixing = torch.diag(pairs.sum(1)) - pairs
        grads = torch.mm(mixing, q.view(exits, -1)).view(exits, samples, classes)
    coefficient = (label_weights.to(dtype) / labeled)[:, None] * labels.valid * (1 if weights is None else weights)
    ce, smooth_ce = _label_terms(plain, labels, smoothing, coefficient * samples, grads if with_grad else None)
    loss = (smooth_ce * coefficient).sum()
    ranks = _ranks(plain.x, _judged(labels))
    confidence = _confidence(warm, reader.to(dtype))
    if with_grad and not sound:
        grads[:, ~finite] = torch.nan

    cross = _cross_entropies(warm, warm.p, warm.lse, finite)
    weighted = cross if weights is None else _cross_entropies(warm, q, warm.lse * weights, finite)
    value = weighted if cross_entropy else weighted - weighted.diagonal()
    loss = loss + (pairs * tau[:, None] * value).sum() / samples
    if not sound:
        loss = loss * torch.nan
    counted = finite & labels.valid
    counts = torch.stack([counted.sum(), torch.tensor(0), (~finite).sum()])
    vector = [
        torch.where(counted, ce, 0).sum(1),
        (cross - cross.diagonal()).view(-1),
        ((ranks < 1) & counted).sum(1),
        ((ranks < 5) & counted).sum(1),
        torch.where(finite, confidence, 0).sum().view(1),
        torch.tensor([samples]),
        counts,
    ]
    return loss, torch.cat(vector).float(), grads.to(logits[0].dtype)


def _read_labels(targets: Tensor, second: Tensor | None, share: Tensor | None, classes: int, dtype: torch.dtype) -> _Labels:
    if targets.is_floating_point():
        soft = targets.to(dtype)
        if not bool(soft.amin() >= 0) or not bool(soft.sum().isfinite()):
            raise DataError("targets holds a negative or non-finite share; soft targets are at least 0 (a row of zeros: unlabeled)")
        return _Labels([soft.argmax(-1)], [], soft, soft.sum(-1) > 0)
    ids = [targets] if second is None else [targets, second]
    unlabeled = torch.zeros_like(targets, dtype=torch.bool)
    for labels in ids:
        missing = labels == UNLABELED
        bad = ((labels < 0) & ~missing) | (labels >= classes)
        if bool(bad.any()):
            raise DataError(
                f"targets holds the label {int(labels[bad][0])}; allowed are 0 to {classes - 1}, "
                f"and {UNLABELED} for unlabeled images"
            )
        unlabeled |= missing
    shares = []
    if share is not None:
        low, high = share.aminmax()
        if not bool(low >= 0) or not bool(high <= 1):
            raise DataError(f"share runs from {float(low):g} to {float(high):g}; allowed is 0 to 1")
        shares = [share.to(dtype), 1 - share.to(dtype)]
    return _Labels([labels.clamp(min=0) for labels in ids], shares, None, ~unlabeled)


def _read_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    if not bool(weights.amin() >= 0) or not bool(weights.sum().isfinite()):
        raise DataError("weights holds a negative or non-finite number; weights of samples are at least 0")
    return weights.to(dtype)


def _soften(logits: Sequence[Tensor], dtype: torch.dtype) -> _Softened:
    x = torch.empty((len(logits), *logits[0].shape), dtype=dtype)
    for row, z in zip(x, logits):
        row.copy_(z)
    # Shifted by its maximum, a row's log-sum-exp is minus the logarithm of its largest probability.
    x -= x.amax(-1, keepdim=True)
    p = x.softmax(-1)
    return _Softened(x, p, -p.amax(-1).log())


def _at_temperature(plain: _Softened, tau: Tensor) -> _Softened:
    x = plain.x / tau[:, None, None]
    p = x.softmax(-1)
    return _Softened(x, p, -p.amax(-1).log())


def _label_terms(
    plain: _Softened, labels: _Labels, smoothing: float, factor: Tensor, grads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [M, N] without and with smoothing; adds ``factor`` [M, N] times the gradient of the latter."""
    keep = 1 - smoothing
    if labels.soft is None:
        ce, mass = plain.lse.clone(), torch.ones(())
        for number, ids in enumerate(labels.ids):
            index = ids.expand(len(ce), -1).unsqueeze(-1)
            part = labels.shares[number] if labels.shares else 1
            ce -= part * plain.x.gather(-1, index).squeeze(-1).clamp(min=MASKED)
            if grads is not None:
                grads.scatter_add_(-1, index, (-keep * part * factor).unsqueeze(-1))
    else:
        mass = labels.soft.sum(-1)
        ce = plain.lse * mass - (plain.x.clamp(min=MASKED) * labels.soft).sum(-1)
        if grads is not None:
            grads.addcmul_(labels.soft, factor.unsqueeze(-1), value=-keep)
    smooth = ce
    if smoothing:
        classes = plain.x > -torch.inf
        even = classes / classes.sum(-1, keepdim=True)
        smooth = keep * ce + smoothing * (plain.lse - (plain.x.clamp(min=MASKED) * even).sum(-1))
        if grads is not None:
            grads.addcmul_(even, factor.unsqueeze(-1), value=-smoothing)
    if grads is not None:
        grads.addcmul_(plain.p, (factor * (keep * mass + smoothing)).unsqueeze(-1))
    return ce, smooth


def _ranks(x: Tensor, ids: Tensor) -> Tensor:
    """How many classes [M, N] come before the label: larger logits, and equal ones of earlier classes."""
    label = x.gather(-1, ids.expand(len(x), -1).unsqueeze(-1))
    mask = torch.empty_like(x)  # comparisons into floats, whose sums are vectorised
    larger = torch.gt(x, label, out=mask).sum(-1)
    equal = torch.eq(x, label, out=mask).sum(-1)
    tied = (equal > 1) & (larger < 5)
    if bool(tied.any()):
        earlier = torch.arange(x.shape[-1]) < ids[:, None]
        exits, samples = tied.nonzero(as_tuple=True)
        larger[exits, samples] += (mask[exits, samples] * earlier[samples]).sum(-1)
    return larger


def _judged(labels: _Labels) -> Tensor:
    """The label [N] by which hits are counted: of two, the one with the larger share."""
    return torch.where(labels.shares[0] >= 0.5, *labels.ids) if labels.shares else labels.ids[0]


def _confidence(warm: _Softened, reader: Tensor) -> Tensor:
    """Largest probability [N] of the mixture of exits that ``reader`` [M] describes."""
    if bool((reader == 1).any()):
        return torch.exp(-warm.lse[int(reader.argmax())])
    return torch.tensordot(reader, warm.p, 1).amax(-1)


def _cross_entropies(warm: _Softened, q: Tensor, lse: Tensor, finite: Tensor) -> Tensor:
    """[M, M] cross-entropy of exit m (row) to exit t (column), summed over samples with finite logits."""
    exits = len(q)
    products = torch.mm(warm.x.view(exits, -1), q.view(exits, -1).T)
    if not bool(products.isfinite().all()):
        x = torch.where(finite[:, None], warm.x.clamp(min=MASKED), 0)
        products = torch.mm(x.view(exits, -1), torch.where(finite[:, None], q, 0).view(exits, -1).T)
    return torch.where(finite, lse, 0).sum(1, keepdim=True) - products
