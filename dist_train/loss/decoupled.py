"""Decoupled knowledge distillation (DKD): the label's class and the other classes are distilled apart, each with its weight.

Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, equation 7: the divergence from the teacher is that of two classes, the
label's and all others together (TCKD), plus the teacher's probability of the others times that among the others (NCKD).  DKD takes
this probability out, which makes what a sure teacher knows of the other classes count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_train.errors import DataError
from dist_train.loss.inputs import UNLABELED, ExitWeights, LossOptions, Targets
from dist_train.loss.operator import exit_loss


def decoupled_loss(
    logits: Sequence[Tensor], targets: Targets, exits: ExitWeights, rule: str, weights: tuple[float, float]
) -> Tensor:
    """The distillation of all exits, [] in float32: for the operator two problems of plain divergences.

    Args:
        logits: M tensors [N, K].
        targets: of mixed images the label with the larger share counts, of distributions the largest entry; without a label the
            class that the mixture ``exits.confidence_weights`` finds most probable.
        exits: of which the weights of the labels are not used.
        rule: as in :class:`LossOptions`.
        weights: of TCKD and NCKD, alpha and beta of the paper.

    Raises:
        DataError: fewer than two classes.
    """
    if logits[0].shape[1] < 2:
        raise DataError("loss.distill_loss is dkd, which needs two classes or more")
    classes = _classes(logits, targets, exits)[:, None]
    without_labels = exits._replace(label_weights=exits.label_weights * 0)
    options = LossOptions(rule, cross_entropy=False, with_grad=any(z.requires_grad for z in logits))
    # The losses to the labels come from the call for the whole objective; here they would count twice.
    unlabeled = Targets(torch.full_like(classes[:, 0], UNLABELED), weights=targets.weights)
    total = torch.zeros((), device=logits[0].device)
    # Without the label's class, the softmax is the distribution among the others (NCKD).
    rests = [z.scatter(1, classes, -torch.inf) for z in logits]
    # Where all of these are masked there is no such distribution.
    masked = [(rest == -torch.inf).all(1, keepdim=True) for rest in rests]
    # Of a sample for which an exit has none, all exits get the same one, and nothing differs.
    is_alone = torch.stack(masked).any(0)
    others = [rest.masked_fill(is_alone, 0) for rest in rests]
    # The label's class against all others together: their logit is such that two classes have the same softmax as all.
    pairs = []
    for z, rest, is_masked, temperature in zip(logits, rests, masked, exits.temperature):
        # Its exponential at temperature T is the sum of those of all others; that of nothing but -inf has a gradient of NaN.
        scaled = rest.masked_fill(is_masked, 0).float() / temperature
        together = (temperature * scaled.logsumexp(1, keepdim=True)).masked_fill(is_masked, -torch.inf)
        pairs.append(torch.cat([z.gather(1, classes).float(), together], 1))
    for problem, weight in zip((pairs, others), weights):
        weighted = without_labels._replace(distill_weights=exits.distill_weights * weight)
        total = total + exit_loss(problem, unlabeled, weighted, options)[0]
    return total


@torch.no_grad()
def _classes(logits: Sequence[Tensor], targets: Targets, exits: ExitWeights) -> Tensor:
    """[N] int64."""
    if targets.labels.is_floating_point():
        labels = torch.where(targets.labels.sum(1) > 0, targets.labels.argmax(1), UNLABELED)
    else:
        labels = targets.labels
        if targets.second is not None and targets.lam is not None:
            # Unlabeled if either label is missing.
            smaller = torch.minimum(labels, targets.second)
            labels = torch.where(smaller < 0, smaller, torch.where(targets.lam < 0.5, targets.second, labels))
    probs = [w * (z.float() / t).softmax(1) for w, z, t in zip(exits.confidence_weights, logits, exits.temperature)]
    likely = torch.stack(probs).sum(0).argmax(1)
    # A label out of range is the operator's to refuse.
    return torch.where((labels < 0) | (labels >= logits[0].shape[1]), likely, labels)
