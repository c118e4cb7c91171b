"""``dist-train convert``: makes a folder that eval and predict read of another network's weights."""

from __future__ import annotations

from dist_train.arguments import Parser
from dist_train.errors import ConfigError

ENSEMBLES = ("geometric", "arithmetic", "product")
"""Not boosted: once it is trained, it is the same as product."""


def run(arguments: list[str]) -> int:
    """Convert, and print the folder that was written."""
    parser = Parser(
        "dist-train convert",
        description="Convert a checkpoint of a public MSDNet repository into a folder that eval, predict and load_model read; or "
        "a run, into one whose exits predict together.",
        epilog="With --repository any field of the configuration can be given: --data.mean '[0.49, 0.48, 0.45]', --data.shards "
        "data/cifar100.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="their checkpoint: a torch file, read with weights_only, or safetensors; with --ensemble a run folder",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to make")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--repository", choices=("msdnet_pytorch", "multiexit_distillation"))
    kind.add_argument(
        "--ensemble", choices=ENSEMBLES, help="how an exit predicts together with those before it, as model.ensemble"
    )
    parser.add_argument("--arguments", metavar="YAML", help="the network's configuration by their names")
    known, overrides = parser.parse_known_args(arguments)
    from dist_train.training.convert import as_ensemble, convert

    if known.ensemble:
        if overrides or known.arguments:
            given = overrides[0] if overrides else "--arguments"
            raise ConfigError(f"{given} is given with --ensemble, which changes nothing else; leave it out")
        print(as_ensemble(known.file, known.output, known.ensemble))
        return 0
    if not known.arguments:
        raise ConfigError("--arguments is missing: a YAML file with the network's configuration by their names")
    print(convert(known.file, known.output, known.repository, known.arguments, *overrides))
    return 0
