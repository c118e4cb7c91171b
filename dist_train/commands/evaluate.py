"""``dist-train eval``: the report on a trained network."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.arguments import Parser
from dist_train.errors import ConfigError
from dist_train.prediction.confidence import HISTORY_MEASURES, MEASURES
from dist_train.prediction.risk import Target

DELTA = 0.05


def run(arguments: list[str]) -> int:
    """Evaluate, print the summary, write the report."""
    known = _parser().parse_args(arguments)
    from dist_train.distributed.group import Ranks
    from dist_train.evaluation.evaluate import evaluate
    from dist_train.evaluation.files import check_writable, log_to_run, summary, write
    from dist_train.evaluation.guarantee import Request
    from dist_train.evaluation.thresholds import parse_budgets

    budgets = parse_budgets(known.budgets)
    check_writable(known.run, known.out)
    if known.clamp and not budgets:
        raise ConfigError("--clamp is for --budgets; give both")
    request = None
    if known.risk:
        request = Request(
            _targets(known.risk, known.epsilon),
            DELTA if known.delta is None else known.delta,
            known.per_class,
            known.measure or "max_probability",
        )
    elif known.epsilon or known.delta is not None or known.per_class or known.measure:
        raise ConfigError(
            "--epsilon, --delta, --per-class and --measure are for --risk; give one, such as --risk gap --epsilon 0.01"
        )
    report = evaluate(
        known.run,
        known.split,
        known.shards,
        known.calibration,
        milliseconds=known.milliseconds,
        cost=known.cost,
        budgets=budgets,
        clamp=known.clamp,
        request=request,
        shift=known.shift,
        precision=known.precision,
    )
    shown = report.budgeted(budgets, clamp=known.clamp) if budgets else None
    # Started by torchrun, all ranks have the same report.
    if Ranks.from_env().rank == 0:
        print(summary(report, shown))
        files = write(report, known.out)
        print("\n".join(log_to_run(report, files, known.out)))
    return 0


def _targets(risks: Sequence[str], epsilons: Sequence[float] | None) -> list[Target]:
    """Each risk with its epsilon, in the order of the command line."""
    if len(epsilons or []) != len(risks):
        raise ConfigError(
            f"{len(risks)} --risk and {len(epsilons or [])} --epsilon are given; give one --epsilon for each --risk"
        )
    return [Target(risk, epsilon) for risk, epsilon in zip(risks, epsilons or [])]  # type: ignore[arg-type]


def _parser() -> Parser:
    parser = Parser(
        "dist-train eval",
        description="Accuracy of every exit, each image of a split once, and at any budget; writes report.json, report.html "
        "and report/ into the run folder and to MLflow. Several processes: torchrun --nproc-per-node 2 -m dist_train eval RUN",
    )
    parser.add_argument(
        "run", metavar="RUN", help="run folder (its best checkpoint), a checkpoint, or a folder of weights"
    )
    parser.add_argument("--split", help="split of the shards (default: the run's data.val)")
    parser.add_argument("--shards", metavar="FOLDER", help="folder of the shards (default: the run's)")
    parser.add_argument(
        "--calibration",
        metavar="SPLIT",
        help="split that thresholds are fitted on; of the one that is tested half is held out for that, with as many images of "
        "every class (default: data.val where another split is tested, else that split)",
    )
    parser.add_argument(
        "--budgets", metavar="B,B,...", help="average multiply-adds per image to show, such as 12e6,2e7"
    )
    parser.add_argument("--clamp", action="store_true", help="move budgets out of range to its ends")
    parser.add_argument(
        "--risk",
        action="append",
        metavar="NAME",
        help="guarantee it on new images, and find thresholds for that: gap (accuracy lost against the last exit), consistency "
        "(another class than the last exit), error, or cost (of the last exit's); may be given several times",
    )
    parser.add_argument(
        "--epsilon",
        action="append",
        type=float,
        metavar="E",
        help="the risk's bound, a share of 1; one for each --risk",
    )
    parser.add_argument(
        "--delta",
        type=float,
        metavar="D",
        help=f"probability with which anything guaranteed may be untrue (default: {DELTA})",
    )
    parser.add_argument("--per-class", action="store_true", help="guarantee the risks for every class as well")
    parser.add_argument(
        "--measure",
        choices=(*MEASURES, *HISTORY_MEASURES),
        help="of confidence, for the guarantee (default: max_probability)",
    )
    parser.add_argument("--shift", action="store_true", help="also under corruptions, and which guarantees break there")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="compute at this precision, for which thresholds and guarantees then hold (default: that of the training)",
    )
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--milliseconds", action="store_true", help="also budgets in measured time, an image at a time")
    times.add_argument(
        "--cost", metavar="JSON", help="also budgets in the times of this file of `dist-train bench predict --json`"
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder to write to (default: the run folder)")
    return parser
