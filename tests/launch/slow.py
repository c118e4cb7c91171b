"""A network for tests of SLURM: its training steps take as long as SLOW says, whatever the machine, and it can be told to die."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


class Slow(nn.Module):
    """SLOW is the seconds of a forward pass in training, SLOW_EVALUATION in evaluation, which makes the file EVALUATING.

    DIE is a file that, while it is there, kills rank 1 in training.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        if torch.is_grad_enabled():
            time.sleep(float(os.environ.get("SLOW", "0")))
            if dist.is_initialized() and dist.get_rank() == 1 and Path(os.environ.get("DIE", "/nowhere")).exists():
                os.kill(os.getpid(), signal.SIGKILL)
        elif "EVALUATING" in os.environ and len(images) > 3:  # with fewer, the network is measured
            Path(os.environ["EVALUATING"]).touch()
            time.sleep(float(os.environ["SLOW_EVALUATION"]))
        return self.head(self.body(images).relu().mean((2, 3)))


def network(num_classes):
    return Slow(num_classes)
