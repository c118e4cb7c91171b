"""Your own network, with exits, trained and evaluated.

The network is an ordinary torch module that gives logits. A configuration names the function that makes it, as
`module:function`, and the submodules after which exits are attached; the network's end is one more exit. On the command line:

    cd docs/examples; dist-train train CONFIG --model "{name: own_network:network, exits: [stage1, stage2]}"

Run it where `data/digits` and `configs/` are, such as after `make demo`: python docs/examples/own_network.py [--section.key value ...]
Prints a line per exit: its multiply-adds, and its accuracy on the validation images.
"""

import sys
from collections import OrderedDict

from torch import nn

from dist_train import evaluate, load_config, train


def network(num_classes: int) -> nn.Module:
    """A small convolutional network; images [N, 3, 32, 32] to logits [N, num_classes]."""

    def stage(channels_in: int, channels_out: int) -> nn.Sequential:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    stages = {"stage1": stage(3, 16), "stage2": stage(16, 32), "stage3": stage(32, 64), "head": head}
    return nn.Sequential(OrderedDict(stages))


# The function is imported from this file, also by `dist-train plan|eval|predict`: what follows must not run then.
if __name__ == "__main__":
    config = load_config(
        "configs/quickstart.yaml",
        *("--name", "own_network"),
        *("--model", "{name: own_network:network, exits: [stage1, stage2]}"),
        *("--train.epochs", "5"),
        *sys.argv[1:],
    )
    run = train(config)
    report = evaluate(run.folder)
    for number, (cost, exit_) in enumerate(zip(report.costs["multiply_adds"], report.exits), start=1):
        print(f"exit {number}: {cost / 1e6:.2f} M multiply-adds, top-1 {100 * exit_.top1:.1f} %")
