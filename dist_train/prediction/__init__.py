"""Prediction that stops early."""

from dist_train.prediction.stopping import Patience, Policy, Predictions, Thresholds, at_exit, for_inference, predict

__all__ = ["Patience", "Policy", "Predictions", "Thresholds", "at_exit", "for_inference", "predict"]
