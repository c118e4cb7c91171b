"""A network for tests of faults: one rank is slow, hangs, raises or is killed in a certain forward pass."""

import os
import signal
import time

import torch
from torch import nn


class Faulty(nn.Module):
    """What goes wrong is in the variable FAULT: KIND:RANK:PASS."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, num_classes)
        self.passes = 0

    def forward(self, images):
        kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
        if self.training and torch.is_grad_enabled() and rank == os.environ.get("RANK"):
            self.passes += 1
            if kind == "slow":
                time.sleep(0.3)
            elif self.passes == int(at):
                fail(kind)
        return self.head(self.body(images).relu().mean((2, 3)))


def fail(kind):
    if kind == "hang":
        time.sleep(1000)
    elif kind == "raise":
        raise ArithmeticError("the network is broken")
    elif kind == "memory":
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of ..."
        )
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def network(num_classes):
    return Faulty(num_classes)
