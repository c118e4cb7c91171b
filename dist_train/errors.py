"""Errors that a user can mend: one line that says what was given, what is allowed and what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Base of all errors whose text is meant for the user; the command line prints it and exits with 2."""


class ConfigError(UserError):
    """The configuration has an unknown key, a wrong type, or values that do not fit together."""


class DataError(UserError):
    """Shards are missing, do not match their index, or hold more unreadable images than allowed."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another network or other data."""


class TrainingError(UserError):
    """Training cannot go on, although the configuration is right."""


class TrackingError(UserError):
    """A run cannot be mirrored in MLflow."""


class SlurmError(UserError):
    """SLURM is not there, or does not offer what a job asks for."""
