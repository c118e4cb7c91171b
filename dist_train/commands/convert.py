"""``dist-train convert``: converts a checkpoint file of a public MSDNet repository."""

from __future__ import annotations

from dist_train.arguments import Parser


def run(arguments: list[str]) -> int:
    """Convert, and print the folder that was written."""
    parser = Parser(
        "dist-train convert",
        description="Convert a checkpoint of a public MSDNet repository into a folder that eval, predict and load_model read.",
        epilog="Any field of the configuration can be given: --data.mean '[0.49, 0.48, 0.45]', --data.shards data/cifar100.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="their checkpoint: a torch file, read with weights_only, or safetensors"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to make")
    parser.add_argument("--repository", required=True, choices=("msdnet_pytorch", "multiexit_distillation"))
    parser.add_argument("--arguments", required=True, metavar="YAML", help="the network's configuration by their names")
    known, overrides = parser.parse_known_args(arguments)
    from dist_train.training.convert import convert

    print(convert(known.file, known.output, known.repository, known.arguments, *overrides))
    return 0
