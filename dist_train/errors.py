"""Exit codes, and errors the user can fix: one line that says what was given, what is allowed and what to do."""

from __future__ import annotations

FAILED = 1
"""A failure that a retry may cure; SLURM jobs are requeued."""
USER_ERROR = 2
"""An error the user has to fix, one line on standard error; a retry would not help."""
NOT_SAVED = 74
"""Training has ended, but its last checkpoint could not be written (EX_IOERR of sysexits.h); the one before is whole."""
STOPPED = 75
"""Asked to stop, and saved: the same command resumes (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Interrupted by Ctrl-C outside of training."""


class UserError(ValueError):
    """Base of all errors whose text is meant for the user; the command line prints it and exits with ``exit_code``."""

    exit_code = USER_ERROR
    """What the command line exits with."""
    on_all_ranks = False
    """Whether all ranks of a running process group raise it; rank 0 says it for all."""


class ConfigError(UserError):
    """The configuration has an unknown key, a wrong type, or values that do not fit together."""


class DataError(UserError):
    """Shards are missing, do not match their index, or contain more unreadable images than allowed."""


class StorageError(UserError):
    """Shards that were there cannot be reached: a network or a file system is down, and no image is to blame.

    It may be back for the next try, so the exit code is that of a failure, and SLURM jobs are requeued.
    """

    exit_code = FAILED


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another network or other data."""


class DeviceError(UserError):
    """A GPU, its driver or its memory cannot do what the run asks for."""


class TrainingError(UserError):
    """Training cannot continue, although the configuration is right."""

    on_all_ranks = True


class NotSavedError(TrainingError):
    """Training has ended, but its last checkpoint could not be written."""

    exit_code = NOT_SAVED


class TrackingError(UserError):
    """MLflow cannot be used for what was asked: a run cannot be mirrored, or a model not registered."""


class HubError(UserError):
    """A repository of the Hugging Face Hub is missing, closed to this account, or cannot be reached."""


class SlurmError(UserError):
    """SLURM is not there, or does not offer what a job asks for."""
