"""What is due when, as a function of how far a run has come."""

import pytest

from dist_train.config_file import make_config
from dist_train.training.checkpoint import Progress
from dist_train.training.schedule import Schedule


def schedule(regime="joint", first_epochs=0, **train):
    model = {"regime": regime, "first_epochs": first_epochs}
    optim = {"lr": 0.4, "warmup_epochs": 1, "schedule": "constant"}
    return Schedule(make_config({"data": {"shards": "x"}, "model": model, "optim": optim, "train": train}), 10)


def rates(plan, skipped=()):
    """The learning rate of every global batch of a run in which some updates are skipped."""
    progress, found = Progress(), []
    while not plan.at_end(progress):
        found.append(plan.learning_rate(progress))
        progress.batch += 1
        progress.step += progress.batch - 1 not in skipped
        plan.begin_stage(progress)
    return found


def test_every_stage_of_a_regime_has_its_warm_up_at_its_first_batch_whatever_was_skipped_before():
    plan = schedule("mixed", first_epochs=2, epochs=4)
    ramp = [pytest.approx(0.4 * (step + 1) / 10) for step in range(10)]
    assert rates(plan) == (ramp + [0.4] * 10) * 2
    # A skipped update is tried again at the same rate, and the second stage does not wait for it.
    assert rates(plan, skipped={3, 4, 15}) == ramp[:3] + ramp[3:4] * 2 + ramp[3:] + [0.4] * 8 + ramp + [0.4] * 10


def test_a_run_ends_with_its_epochs_or_its_steps_and_is_validated_once_there():
    plan = schedule(epochs=4, eval_every=2)
    due = [batch for batch in range(41) if plan.validation_is_due(Progress(step=batch, batch=batch))]
    assert due == [20, 40]
    assert not plan.validation_is_due(Progress(step=40, batch=40, evaluated=40))
    assert [plan.epochs_begun(Progress(batch=batch)) for batch in (0, 1, 10, 11)] == [0, 1, 1, 2]
    short = schedule(epochs=4, max_steps=13)
    assert (short.batches, short.at_end(Progress(step=12, batch=30))) == (13, False)
    # max_steps counts applied updates.
    assert short.at_boundary(Progress(step=13, batch=15))
    assert short.validation_is_due(Progress(step=13, batch=15))
