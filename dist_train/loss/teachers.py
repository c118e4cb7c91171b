"""Which exits teach which: the teacher matrix of every rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_train.errors import ConfigError


def teacher_matrix(teachers: str | Sequence[Sequence[float]], num_exits: int, label_loss: Tensor) -> Tensor:
    """The teacher matrix W [M, M] float32, row: student, column: teacher; a row's teachers share its weight of 1.

    Args:
        teachers: a rule of :class:`~dist_train.config.LossConfig`, or an explicit matrix, which is taken as it is.
        num_exits: M.
        label_loss: [M] label losses by which ``best`` and ``better`` decide; at a tie the later exit is the better one.

    Raises:
        ConfigError: an explicit matrix that is not [M, M], or in which an exit teaches itself.
    """
    if not isinstance(teachers, str):
        return _explicit_matrix(teachers, num_exits)
    exits = torch.arange(num_exits, device=label_loss.device)
    student, teacher = exits[:, None], exits[None, :]
    later = teacher > student
    if teachers == "last":
        chosen = later & (teacher == num_exits - 1)
    elif teachers == "next":
        chosen = teacher == student + 1
    elif teachers == "later":
        chosen = later
    elif teachers == "ensemble":
        # The student included, as in the authors' code: its own part is a constant like the others.
        chosen = torch.ones_like(later)
    elif teachers == "best":
        # argmin takes the first of equal ones, which in reverse is the latest exit.
        chosen = (teacher == num_exits - 1 - label_loss.flip(0).argmin()) & (teacher != student)
    elif teachers == "better":
        chosen = later & (label_loss[None, :] <= label_loss[:, None])
    else:
        assert teachers == "none", teachers
        chosen = torch.zeros_like(later)
    # W_mt = 1 / |T(m)|; the row of an exit without teachers stays 0.
    return chosen / chosen.sum(1, keepdim=True).clamp(min=1)


def with_outside(matrix: Tensor, outside: int, share: float) -> Tensor:
    """The teacher matrix [M + O, M + O] of M exits and as many outside teachers, which follow the exits and learn nothing.

    Args:
        matrix: [M, M], of the exits alone.
        outside: O.
        share: of the outside teachers, 0 to 1, in what an exit learns that has other teachers; they share it evenly, and are all
            that teaches an exit without others.
    """
    exits = len(matrix)
    inside = matrix.sum(1, keepdim=True)
    own = torch.where(inside > 0, 1 - share, 0.0)
    # An explicit matrix has rows of other sums; the share is one of them.
    weight = (1 - own) * torch.where(inside > 0, inside, 1.0) / outside
    # Row m: own * W_mt for exit t, and (1 - own) * (the sum of W's row, 1 where it is 0) / O for an outside teacher.
    whole = matrix.new_zeros(exits + outside, exits + outside)
    whole[:exits, :exits] = own * matrix
    whole[:exits, exits:] = weight
    return whole


def _explicit_matrix(rows: Sequence[Sequence[float]], num_exits: int) -> Tensor:
    shape = [len(row) for row in rows]
    if shape != [num_exits] * num_exits:
        raise ConfigError(
            f"loss.teachers is a matrix with rows of {shape} numbers; for {num_exits} exits it must be {num_exits} x {num_exits}"
        )
    for exit_, row in enumerate(rows):
        if row[exit_] != 0:
            raise ConfigError(f"loss.teachers[{exit_}][{exit_}] is {row[exit_]:g}; an exit cannot teach itself, give 0")
    return torch.tensor(rows, dtype=torch.float32)


def last_teacher_mixture(matrix: Tensor) -> Tensor:
    """The mixture [M] that teaches the deepest exit that has a teacher (what the authors' temperature rule looks at)."""
    exits = torch.arange(len(matrix), device=matrix.device)
    taught = (exits * (matrix.sum(1) > 0)).argmax()
    # index_select, because an index that is a tensor is read on the host, which waits for the device.
    row = matrix.index_select(0, taught.view(1)).squeeze(0)
    last = (exits == len(matrix) - 1).to(row.dtype)
    # Without any teacher, the confidence is the last exit's own.
    return torch.where(row.sum() > 0, row / row.sum(), last)
