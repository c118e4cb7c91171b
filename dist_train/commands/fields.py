"""The parser of verbs that take a configuration and overrides of its fields."""

from __future__ import annotations

import argparse
import sys
import textwrap

from dist_train.arguments import Parser
from dist_train.config_file import describe_fields


def config_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser of ``dist-train VERB CONFIG [--section.key value ...]``, whose help lists all fields."""
    epilog = None
    if {"-h", "--help"} & set(sys.argv):
        epilog = "fields of CONFIG, each an override --section.key value:\n" + _field_help()
    parser = Parser(
        f"dist-train {verb}",
        usage=f"dist-train {verb} CONFIG [--section.key value ...]",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    return parser


def _field_help() -> str:
    lines = []
    for key, default, text in describe_fields():
        lines.append(f"  --{key}  ({default})")
        lines += textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
