"""A configuration in and out: one YAML file plus overrides ``--section.key value``; what is wrong is one line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dist_train.checks import check_kind
from dist_train.config import MIXTURE, NETWORKS, Config, PartConfig, Section
from dist_train.errors import ConfigError


def load_config(path: str | Path, *overrides: str) -> Config:
    """Read a YAML file and apply overrides such as ``"--optim.lr", "0.4"`` (or ``"--optim.lr=0.4"``).

    Override values are YAML, so ``--data.crop_ratio "[0.8, 1.2]"`` and ``--optim.max_grad_norm null`` work.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong type or out of range.
    """
    check_kind("path", path, str | Path, "give the path of a YAML file, see configs/")
    path = Path(path)
    tree = parse_yaml(read_text(path, "give the path of a YAML file, see configs/"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections; see configs/quickstart.yaml")
    return make_config(tree, *overrides)


def read_text(path: Path, remedy: str) -> str:
    """The text of a file; raises ConfigError, with what to do, where it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def make_config(tree: dict[str, Any], *overrides: str) -> Config:
    """Apply overrides to a tree of plain values and check it; raises ConfigError with one line for the first fault."""
    # Into the tree, before validation, so that checks that span fields see the final values.
    for pair in _override_pairs(overrides):
        for key, value in fields_of(*pair).items():
            _set(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every field written out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) of every field, sections opened: the text of ``--help``."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from describe_fields(kind, f"{prefix}{name}.")
        elif name == "model" and section is Config:
            yield from _describe_networks()
        else:
            default = "required" if field.is_required() else plain(field.get_default(call_default_factory=True))
            yield f"{prefix}{name}", default, (field.description or "") + _choices(field.annotation)


def _choices(kind: Any) -> str:
    """The words that a field can be, for its help."""
    kinds = [kind, *get_args(kind)]
    words = [str(word) for one in kinds if get_origin(one) is Literal for word in get_args(one)]
    return f" One of {', '.join(words)}." if len(words) > 1 else ""


def _describe_networks() -> Iterator[tuple[str, str, str]]:
    """The fields of all kinds of networks, each once, with the kinds that have it."""
    owners: dict[str, list[str]] = {}
    first: dict[str, tuple[str, str, str]] = {}
    for kind, section in NETWORKS.items():
        for key, default, text in describe_fields(section, "model."):
            owners.setdefault(key, []).append(kind)
            first.setdefault(key, (key, default, text))
    for key, default, text in first.values():
        note = "" if len(owners[key]) == len(NETWORKS) else f" ({', '.join(owners[key])})"
        yield key, default, text + note


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration, by which editors complete and check its YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def fields_page() -> str:
    """docs/configuration.md: every field with its default and meaning, a table per section."""
    sections: dict[str, list[str]] = {}
    for key, default, text in describe_fields():
        cells = (f"`{key}`", f"`{default}`", text.replace("|", "\\|"))
        sections.setdefault(key.rpartition(".")[0], []).append(f"| {' | '.join(cells)} |")
    parts = [
        "# Configuration",
        "Every field of a configuration, made by `dist-train schema --markdown` from the fields themselves. "
        "[training.md](training.md) says how they work together. `dist-train schema` prints the JSON schema, by which editors "
        "complete and check the files in [configs/](../configs).",
    ]
    for section, rows in sections.items():
        parts.append(f"## {section or 'The run'}")
        parts.append("\n".join(["| field | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def changed_fields(before: Config, after: Config) -> list[tuple[str, str, str]]:
    """The fields (key, before, after) in which two configurations differ; one that only one of them has is "unset" in the other."""
    old, new = flatten(before.model_dump(mode="json")), flatten(after.model_dump(mode="json"))
    # Both: networks differ in their fields, and model.options is free.
    return [
        (key, plain(old.get(key, "unset")), plain(new.get(key, "unset")))
        for key in new | old
        if (key in old, old.get(key)) != (key in new, new.get(key))
    ]


def flat_fields(config: Config) -> dict[str, str]:
    """Every field as text by its dotted key, as shown in tables and tracking."""
    return {key: plain(value) for key, value in flatten(config.model_dump(mode="json")).items()}


_DEEPEST = 50
"""How deep a file may be nested; a configuration of this project needs five levels."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the words and numbers of YAML 1.2 (`off` and 1:30 are words, 0100 is a hundred).

    It refuses what has no place in a configuration: a key that is given twice or is not a word, a node inside itself, and
    nesting without end.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open: list[str | None] = []
        """The anchors of the nodes that are being read, outermost first."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.NodeEvent = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves it out
        anchor = None
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                raise _fault(f"*{event.anchor} stands inside of &{event.anchor}", event.start_mark)
        else:
            anchor = event.anchor
        if len(self._open) == _DEEPEST:
            raise _fault(f"it is nested deeper than {_DEEPEST} levels", event.start_mark)
        self._open.append(anchor)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._open.pop()
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a key is a list or a mapping; write a word", key.start_mark)
            if key.value in seen:
                raise _fault(f"key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """An integer as YAML 1.2 writes it: a leading 0 has no meaning, octal is 0o17."""
        digits, base = node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10)
        try:
            return int(digits, base)
        except ValueError:  # Python's limit, 4300
            raise _fault(f"an integer has {len(digits)} digits", node.start_mark) from None


def _fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)


# YAML 1.2.2, section 10.3.2.  In this order: the pattern of a float fits an integer as well.
_NUMBER = list("-+.0123456789")
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("merge", "<<", ["<"]),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+", _NUMBER),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _NUMBER),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$", re.ASCII), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes words which are numbers in YAML 1.2 alone, such as 08 and 1e5, or they would be read as such."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
}


def parse_yaml(text: str, source: str) -> Any:
    """YAML with one meaning of every number and word (see _Loader); raises ConfigError with the line of a fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{source}:{where} is not valid YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())}"
        ) from None


def _override_pairs(tokens: Sequence[str]) -> Iterator[tuple[str, Any]]:
    tokens = list(tokens)
    for token in tokens:
        check_kind("an override", token, str, "give text, such as '--optim.lr', '0.05'")
    while tokens:
        token = tokens.pop(0)
        # Not argparse: it would have to know every field of every network in advance.
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError(f"'{token}' is not an override; write --section.key value, for instance --optim.lr 0.05")
        if not equals:
            if not tokens:
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = tokens.pop(0)
        yield key, parse_yaml(value, f"--{key}")


def fields_of(key: str, value: Any) -> dict[str, Any]:
    """A section that is given as a whole as its fields, so that those it leaves out are not set back to their defaults.

    The network stays one value: that of another kind has other fields.
    """
    kind = Config.model_fields[key].annotation if key in Config.model_fields else None
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
        return {f"{key}.{name}": one for name, one in value.items()}
    return {key: value}


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    # Sections that the file leaves out are created.
    for name in sections:
        # A section with nothing under it is null in YAML.
        if tree.get(name) is None:
            tree[name] = {}
        if not isinstance(tree[name], dict):
            raise ConfigError(_unknown(key))
        tree = tree[name]
    tree[leaf] = value


RENAMED = {
    "data.window": "data.shuffle_shards",
    "data.repeats": "data.repeated_augment",
    "data.readers": "data.io_threads",
    "data.threads": "data.decode_threads",
    "data.max_bad": "data.max_unreadable",
    "data.pad": "data.crop_padding",
    "data.scale": "data.crop_scale",
    "data.ratio": "data.crop_ratio",
    "data.erase": "data.random_erasing",
    "data.labeled_share": "data.labeled_fraction",
    "model.recompute": "model.activation_checkpointing",
    "model.heads_epochs": "model.first_epochs",
    "loss.mix": "loss.alpha",
    "loss.over_exits": "loss.reduction",
    "loss.form": "loss.distill_loss",
    "loss.scale": "loss.weight",
    "loss.anneal_above": "loss.anneal_threshold",
    "optim.clip": "optim.max_grad_norm",
    "optim.ema": "optim.ema_decay",
    "train.zero": "train.zero_stage",
}
"""Keys of earlier versions, and what they are called now."""


def _unknown(key: str, schema: type[Section] = Config) -> str:
    if schema is Config and key in RENAMED:
        return f"'{key}' is now called '{RENAMED[key]}'"
    keys = [name for name, _, _ in describe_fields(schema)]
    if schema is Config and key.startswith("model.") and key in keys:
        kinds = [kind for kind, section in NETWORKS.items() if key.removeprefix("model.") in section.model_fields]
        return f"{key} is a setting of {', '.join(kinds)} alone; leave it out, or set another model.name"
    known = keys + sorted({name.rpartition(".")[0] for name in keys} - {""})
    leaf = key.rpartition(".")[2]
    # The right field in the wrong section is the most frequent mistake.
    by_leaf = [name for name in keys if name.rpartition(".")[2] == leaf]
    near = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(keys)}"
    if schema is Config and not near:
        hint = "`dist-train train --help` lists all keys"
    return f"unknown key '{key}'; {hint}"


def explain(error: ValidationError, schema: type[Section] = Config) -> str:
    """The first fault of a configuration in one line."""
    # A key that is spelt wrong comes before the one that is missing because of it.
    first = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    if place[:3] == ["data", "train", MIXTURE] and len(place) > 3:
        part = f"data.train, part {int(place[3]) + 1}"
        if len(place) == 4:
            return f"{part} is {_SHORT.repr(first['input'])}; write {{shards: FOLDER, split: train}}"
        return f"{part}: {_explain(first, place[4:], PartConfig)}"
    return _explain(first, place, schema)


def _explain(first: ErrorDetails, place: list[str], schema: type[Section]) -> str:
    """A fault at a place of a section, in one line."""
    # pydantic names the union here, and not the key that chooses its branch.
    if first["type"] == "network_name":
        name = first["input"].get("name") if isinstance(first["input"], dict) else first["input"]
        return f"model.name is {name!r}; {first['msg']}"
    if place[:1] == ["model"] and len(place) > 1 and place[1] in NETWORKS:
        del place[1]  # the kind of network, which is no part of the key
    # pydantic appends the names of a union's branches to the place; a key of the schema ends before them.
    known = {name for name, _, _ in describe_fields(schema)}
    key = next(
        (".".join(place[:end]) for end in range(len(place), 0, -1) if ".".join(place[:end]) in known), ".".join(place)
    )
    if first["type"] == "extra_forbidden":
        return _unknown(".".join(place), schema)
    if first["type"] == "missing" and key == ".".join(place):
        return f"'{key}' is missing; it has no default"
    if first["type"] == "missing":  # a part of a value, such as the third of three numbers
        return f"{key} is incomplete; its part {'.'.join(place).removeprefix(key).strip('.')} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message  # what spans sections belongs to none
    return f"{key} is {_SHORT.repr(first['input'])}; {message[0].lower()}{message[1:]}"


_SHORT = reprlib.Repr()
"""Values as one line of a message can hold them."""
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


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
    # Six digits: 0.1 must read the same whether it came from YAML, from JSON or from MLflow.
    return f"{value:.6g}" if isinstance(value, float) else str(value)
