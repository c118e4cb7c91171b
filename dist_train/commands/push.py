"""``dist-train push``: a trained network for others, as a repository of the Hugging Face Hub or as a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dist_train import hub
from dist_train.arguments import Parser
from dist_train.errors import ConfigError


def run(arguments: list[str]) -> int:
    """Write what is published, push it, and say where to and what it lacks."""
    known = _parser().parse_args(arguments)
    if (known.repository is None) == (known.folder is None):
        raise ConfigError("give ORG/NAME to push to, or --folder FOLDER to write what would be pushed")
    if known.private and known.folder is not None:
        raise ConfigError("--private is of a repository; give it with ORG/NAME, or leave it out with --folder")
    from dist_train.export import publish

    if known.folder is not None:
        folder = Path(known.folder)
        where, lacking = str(folder), publish.write_folder(known.run, folder)
    else:
        repository = hub.check_name(known.repository)
        # Before the weights are copied: a missing login is said at once.
        hub.check_ready()
        with tempfile.TemporaryDirectory() as draft:
            try:
                lacking = publish.write_published(known.run, Path(draft), hub.PREFIX + repository)
            except OSError as error:
                raise ConfigError(
                    f"{known.run}: cannot be copied to {draft} ({error.filename}: {error.strerror})"
                ) from None
            where = hub.push(Path(draft), repository, known.private, publish.STALE)
    print(f"pushed to {where}" if known.folder is None else f"written to {where}")
    for thing in lacking:
        print(f"it lacks {thing}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "dist-train push",
        description="Share a network: its weights, its configuration without the paths of this machine, its report and its export where "
        "they are of the same step, and a model card. load_model and `dist-train predict` take it as hf://ORG/NAME.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder (its best checkpoint), or one of its checkpoints")
    parser.add_argument("repository", metavar="ORG/NAME", nargs="?", help="of the Hugging Face Hub; created if missing")
    parser.add_argument(
        "--private", action="store_true", help="create the repository private; one that is public already is refused"
    )
    parser.add_argument("--folder", metavar="FOLDER", help="write the files there instead of pushing them")
    return parser
