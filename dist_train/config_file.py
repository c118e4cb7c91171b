"""A configuration in and out: one YAML file plus overrides ``--section.key value``; what is wrong is one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dist_train.config import Config, Section
from dist_train.errors import ConfigError


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file and apply overrides such as ``"--optim.lr", "0.4"`` (or ``"--optim.lr=0.4"``).

    Override values are YAML, so ``--data.ratio "[0.8, 1.2]"`` and ``--optim.clip null`` work.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong type or out of range.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file, see configs/"
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections; see configs/quickstart.yaml")
    return make_config(tree, *overrides)


def make_config(tree: dict[str, Any], *overrides: str) -> Config:
    """Apply overrides to a tree of plain values and check it; raises ConfigError with one line for the first fault."""
    for key, value in _override_pairs(overrides):
        _set(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every field written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) of every field, sections opened: the text of ``--help``."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from describe_fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else plain(field.get_default(call_default_factory=True))
            yield f"{prefix}{name}", default, field.description or ""


def changed_fields(before: Config, after: Config) -> list[tuple[str, str, str]]:
    """The fields (key, before, after) in which two configurations differ."""
    old, new = flatten(before.model_dump(mode="json")), flatten(after.model_dump(mode="json"))
    return [(key, plain(old.get(key)), plain(new.get(key))) for key in new if old.get(key) != new.get(key)]


def flat_fields(config: Config) -> dict[str, str]:
    """Every field as text by its dotted key, as shown in tables and tracking."""
    return {key: plain(value) for key, value in flatten(config.model_dump(mode="json")).items()}


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers (1e-4) and booleans (`off` is a word), which refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """YAML with one meaning of every number and word (see _Loader); raises ConfigError with the line of a fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}:{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _override_pairs(tokens: Sequence[str]) -> Iterator[tuple[str, Any]]:
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError(f"'{token}' is not an override; write --section.key value, for instance --optim.lr 0.05")
        if not equals:
            if not tokens:
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = tokens.pop(0)
        yield key, parse_yaml(value, f"--{key}")


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(_unknown(key))
        tree = node
    tree[leaf] = value


def _unknown(key: str, schema: type[Section] = Config) -> str:
    keys = [name for name, _, _ in describe_fields(schema)]
    known = keys + sorted({name.rpartition(".")[0] for name in keys} - {""})
    leaf = key.rpartition(".")[2]
    by_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
    near = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(keys)}"
    if schema is Config and not near:
        hint = "`dist-train train --help` lists all keys"
    return f"unknown key '{key}'; {hint}"


def explain(error: ValidationError, schema: type[Section] = Config) -> str:
    """The first fault of a configuration in one line."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    # pydantic appends the names of a union's branches to the place; a key of the schema ends before them.
    known = {name for name, _, _ in describe_fields(schema)}
    key = next(
        (".".join(place[:end]) for end in range(len(place), 0, -1) if ".".join(place[:end]) in known), ".".join(place)
    )
    if first["type"] == "extra_forbidden":
        return _unknown(".".join(place), schema)
    if first["type"] == "missing":
        return f"'{key}' is missing; it has no default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} is {first['input']!r}; {message[0].lower()}{message[1:]}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def plain(value: Any) -> str:
    """A field's value as short text, the same in tables, tracking and the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(plain(item) for item in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
