"""A CPU that plays a CUDA accelerator for DeepSpeed, and counts what would make the host wait for the device."""

import contextlib
import sys
from collections import Counter
from pathlib import Path

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    def __init__(self, waits):
        self.waits = waits

    def wait_stream(self, other):
        """The device waits, the host does not."""

    def wait_event(self, event):
        """As well."""

    def record_event(self, event=None):
        return Event(self.waits)

    def synchronize(self):
        self.waits["stream"] += 1


class Event(Stream):
    def __init__(self, waits, **options):
        super().__init__(waits)

    def record(self, stream=None):
        """Costs nothing."""

    def query(self):
        return True


class PlaysCuda(CPU_Accelerator):
    """Asynchronous, with streams, as DeepSpeed believes; ``waits`` counts by kind."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self._stream = Stream(self.waits)
        torch.Tensor.record_stream = lambda tensor, stream: None

    def is_synchronized_device(self):
        return False

    def resolves_data_dependency(self):
        return False

    def synchronize(self, device_index=None):
        self.waits["device"] += 1

    @property
    def Stream(self):
        return lambda *_, **__: Stream(self.waits)

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, device_index=None):
        return self._stream

    def default_stream(self, device_index=None):
        return self._stream

    @property
    def Event(self):
        return lambda **options: Event(self.waits)


class Reads(TorchDispatchMode):
    """Counts values that are read from tensors, by the file that reads: every tensor here would be one of the device."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits[f"value read in {_reader()}"] += 1
        return func(*args, **(kwargs or {}))


def _reader():
    """The file that reads: that of the innermost frame which is not torch's."""
    frame = sys._getframe(2)
    while "torch" in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name


def play_cuda():
    """Have DeepSpeed take this CPU for a GPU, from here on in this process."""
    accelerator = PlaysCuda()
    set_accelerator(accelerator)
    return accelerator
