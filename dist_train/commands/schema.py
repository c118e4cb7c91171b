"""``dist-train schema``: the JSON schema of a configuration, for editors."""

from __future__ import annotations

import json

from dist_train.arguments import Parser
from dist_train.config_file import fields_page, json_schema


def run(arguments: list[str]) -> int:
    """Print the schema, or the page of all fields."""
    parser = Parser(
        "dist-train schema",
        description="Print the JSON schema of a configuration. With `dist-train schema > dist-train.schema.json` and the "
        "first line `# yaml-language-server: $schema=dist-train.schema.json` an editor completes and checks its fields.",
    )
    parser.add_argument("--markdown", action="store_true", help="print docs/configuration.md instead")
    known = parser.parse_args(arguments)
    print(fields_page() if known.markdown else json.dumps(json_schema(), indent=1) + "\n", end="")
    return 0
