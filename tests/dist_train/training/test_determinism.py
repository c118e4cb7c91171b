"""What train.deterministic switches, and what it says to a network that cannot be deterministic."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.config_file import make_config
from dist_train.errors import ConfigError
from dist_train.models import build_model
from dist_train.training.determinism import explain_nondeterministic_operations, make_deterministic
from tests.common import network_config

RAISES_ON_CUDA = {
    "adaptive_max_pool2d_backward",
    "_adaptive_avg_pool2d_backward",
    "avg_pool3d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "reflection_pad2d_backward",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "cumsum",
    "histc",
    "put_",
    "median",
    "grid_sampler_2d_backward",
}
"""Of the operations that torch's documentation of use_deterministic_algorithms lists, those that a network for images may have."""


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def settings(deterministic):
    return make_config({"data": {"shards": "none"}, "train": {"deterministic": deterministic}})


def test_everything_that_varies_is_switched_and_a_run_without_it_switches_back():
    config = make_deterministic(settings(True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch._inductor.config.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert config.data.hw_decoder_load == 0
    config = make_deterministic(settings(False))
    assert not torch.are_deterministic_algorithms_enabled()
    assert config == settings(False)


def test_what_only_warned_before_is_refused():
    torch.use_deterministic_algorithms(True, warn_only=True)
    make_deterministic(settings(True))
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (32, {"exits": 2, "base": 1, "step": 1}),
        (64, {"exits": 2, "base": 1, "step": 1, "stem": 224}),
        (32, {"name": "resnet", "exits": ["stages.0", "stages.1"]}),
    ],
)
def test_our_networks_have_no_operation_that_torch_refuses(size, fields):
    with Operations() as operations:
        logits = build_model(network_config(**fields), 10, size)(torch.randn(2, 3, size, size))
        sum(each.sum() for each in logits).backward()
    assert "convolution_backward" in operations.names
    assert operations.names.isdisjoint(RAISES_ON_CUDA)


def test_a_refused_operation_is_one_line():
    text = "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set 'torch.use_...'"
    with pytest.raises(ConfigError, match="but adaptive_max_pool2d_backward_cuda of this network has no deterministic"):
        with explain_nondeterministic_operations():
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="other"), explain_nondeterministic_operations():
        raise RuntimeError("other")
