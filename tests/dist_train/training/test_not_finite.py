"""What is not finite never passes for a result: neither in the statistics of batch norms nor in a validation."""

import pytest
import torch
from torch import nn

from dist_train.config_file import make_config
from dist_train.distributed.group import Group, Ranks
from dist_train.errors import TrainingError
from dist_train.training.meter import Meter, StepClock


class Network(nn.Module):
    """One layer, whose logits are not finite for images that are brighter than most, but in evaluation only."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        logits = self.head(self.body(images).mean((2, 3)))
        bright = images.mean((1, 2, 3)) > images.mean()
        return logits if self.training else torch.where(bright[:, None], float("inf"), logits)


def validated(digits, runs):
    from dist_train import train

    fields = {
        "runs": str(runs),
        "data": {"shards": str(digits), "flip": False, "image_size": 16},
        "model": {"name": "tests.dist_train.training.test_not_finite:Network", "exits": ["body"]},
        "train": {"global_batch": 256, "micro_batch": 256, "epochs": 1, "precision": "fp32"},
        "tracking": {"uri": "off"},
    }
    with pytest.raises(TrainingError) as caught:
        train(make_config(fields))
    return str(caught.value)


def test_a_validation_of_the_finite_part_of_the_images_is_none(ranks, digits, tmp_path):
    """The others would drop out of the counts, and the accuracies be those of what is left."""
    (said,) = ranks(validated, 1, digits, tmp_path)
    assert "validation: the network gives logits that are not finite for " in said
    assert " of 360 images" in said


def test_the_speed_after_a_resume_is_that_of_the_images_since_then():
    group = Group(Ranks(0, 1, 0, 1), 1)
    before, after, clock = Meter(2, group), Meter(2, group), StepClock(group)
    from dist_train.loss import ExitStats

    stats = ExitStats.zeros(2, group.device).vector + 1
    before.add(stats, torch.tensor(3.0), 64)
    after.load_state(before.state())
    after.add(stats, torch.tensor(1.0), 0)
    metrics = after.reduce_and_reset(clock)
    assert metrics["speed/images_per_second"] == 0
    # All else goes on where it was.
    assert metrics["train/loss"] == 2
