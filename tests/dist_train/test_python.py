"""The Python interface: a value of another kind, or a senseless one, is one line that names it and what to give instead."""

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import ExitDistillation, MSDNet, attach_exits, evaluate, load_config, load_model, plan, predict, train
from dist_train.config import LossConfig
from dist_train.errors import UserError
from dist_train.prediction import Patience, Thresholds, at_exit
from tests.common import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"
IMAGES = torch.zeros(2, 3, 32, 32)


def msdnet(num_classes=10, **options):
    small = {"exits": 3, "base": 1, "step": 1, "growth": 2, "initial_channels": 4, "head_width": 8}
    return MSDNet(num_classes, **(small | options)).eval()


def attached(at=("0",), num_classes=10, network=None, **options):
    network = network or nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten())
    return attach_exits(network, at, num_classes, **({"image_size": 8} | options))


def predicted(policy, images=IMAGES, network=None):
    return predict(network or msdnet(), images, policy)


def distilled(labels, exits=3, config=None):
    criterion = ExitDistillation.from_config(config or LossConfig(), exits)
    return criterion([torch.zeros(2, 10)] * 3, labels)


WRONG = [
    (lambda: msdnet(0), "num_classes is 0; give an integer of at least 1"),
    (lambda: msdnet("10"), "num_classes is '10'"),
    (lambda: msdnet(exits=0), "exits is 0; give an integer of at least 1"),
    (lambda: msdnet(exits=1.5), "exits is 1.5"),
    (lambda: msdnet(exits=True), "exits is True"),
    (lambda: msdnet(growth=0), "growth is 0"),
    (lambda: msdnet(step=0), "step is 0"),
    (lambda: msdnet(head_width=-3), "head_width is -3"),
    (lambda: msdnet(dialect="foo"), "dialect is 'foo'; use one of lua, msdnet_pytorch, multiexit_distillation"),
    (lambda: msdnet(step_mode="foo"), "step_mode is 'foo'; use one of even, growing"),
    (lambda: msdnet(prune="foo"), "prune is 'foo'; use one of min, max, none"),
    (lambda: msdnet(stem=64), "stem is 64; use one of 32, 224"),
    (lambda: msdnet(reduction=2.0), "reduction is 2.0; give a number from 0 to 1"),
    (lambda: msdnet(growth_factors=5), "growth_factors is 5; give a list of one factor per scale"),
    (lambda: msdnet(growth_factors=[1, 2, 0]), "a number of growth_factors is 0"),
    (lambda: attached("0"), "at is '0', of type str; give a list of names of submodules"),
    (lambda: attached([0]), "there is no submodule 0 for an exit; the nearest is '0'"),
    (lambda: attached(num_classes=0), "num_classes is 0"),
    (lambda: attached(image_size=0), "image_size is 0"),
    (lambda: attached(head="foo"), "head is 'foo'; use mean, class_token, or a function"),
    (lambda: attached(network="resnet"), "network is 'resnet', of type str; give a torch.nn.Module"),
    (lambda: attached(network=nn.Sequential(nn.ReLU())), "the network Sequential has no parameters"),
    (lambda: predicted([0.9, 0.8]), r"policy is \[0.9, 0.8\]; give Thresholds, Patience or at_exit"),
    (lambda: predicted(None), "policy is None"),
    (lambda: predicted(Patience(1.5)), "patience is 1.5; give an integer of at least 1"),
    (lambda: predicted(Patience("1")), "patience is '1'"),
    (lambda: predicted(Thresholds(0.5)), "thresholds are 0.5; give a list of numbers, one per exit"),
    (lambda: predicted(Thresholds(["0.9", 0.8])), "thresholds are .*; give a list of numbers"),
    (lambda: predicted(Thresholds([0.9, 0.8], temperatures=2.0)), "temperatures are 2.0; give a list of numbers"),
    (lambda: predicted(Patience(1), IMAGES[0]), r"images are \[3, 32, 32\] in torch.float32; give a tensor of floats"),
    (lambda: predicted(Patience(1), IMAGES.byte()), "images are .* in torch.uint8"),
    (lambda: predicted(Patience(1), [1]), r"images is \[1\], of type list"),
    (lambda: predicted(Patience(1), network="runs/a"), "network is a str; give one of load_model, MSDNet or attach"),
    (lambda: at_exit(1.5, 3), "exit is 1.5"),
    (lambda: load_config(None), "path is None, of type NoneType; give the path of a YAML file"),
    (lambda: load_config(QUICKSTART, "--optim.lr", 0.05), "an override is 0.05, of type float; give text, such as"),
    (lambda: load_config(QUICKSTART, "--optim.lr", None), "an override is None"),
    (lambda: load_config(QUICKSTART, {"optim.lr": 1}), "an override is {'optim.lr': 1}"),
    (lambda: train(QUICKSTART), r"config is .*, of type PosixPath; read a file with load_config\(PATH\)"),
    (lambda: plan(str(QUICKSTART)), r"config is .*, of type str; read a file with load_config\(PATH\)"),
    (lambda: load_model(5), "path is 5, of type int; give a run folder, one of its checkpoints, or hf://ORG/NAME"),
    (lambda: evaluate(load_config(QUICKSTART)), "path is .*, of type Config; give a run folder"),
    (lambda: distilled([1, 2]), r"targets is \[1, 2\], of type list; give a tensor of labels"),
    (lambda: distilled(None, exits="3"), "num_exits is '3'"),
    (lambda: distilled(None, config="later"), "config is 'later', of type str; give a LossConfig"),
]


@pytest.mark.parametrize(("call", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_one_line(call, said):
    with pytest.raises(UserError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_tensors_are_numbers():
    assert msdnet(np.int64(10), exits=np.int32(3)).num_exits == 3
    predicted(Thresholds(np.array([0.9, 0.8])))
    predicted(Thresholds(torch.tensor([0.9, 0.8]).tolist()))
    predicted(Patience(np.int64(1)))
