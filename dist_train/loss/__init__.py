"""The objective over all exits, and the operator that computes it."""

from dist_train.loss.objective import ExitDistillation, ExitLoss, LabelMix
from dist_train.loss.statistics import ExitStats
from dist_train.loss.teachers import teacher_matrix

__all__ = ["ExitDistillation", "ExitLoss", "ExitStats", "LabelMix", "teacher_matrix"]
