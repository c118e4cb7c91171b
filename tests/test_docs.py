"""The Markdown of the project: commands parse, links exist, configuration keys are known."""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
import shlex

import pytest

from dist_train import arguments, cli
from dist_train.commands import bench
from dist_train.config import Config
from dist_train.config_file import describe_fields, flatten, load_config, make_config, parse_yaml
from dist_train.errors import ConfigError, UserError
from launch import grid
from tests.common import ROOT
from tests.documents import DOCUMENTS, blocks, inline_code, prose, read, split
from tests.test_architecture import LAYERS, OWNERS

EXPECTED = {"docs/data.md", "docs/evaluation.md"}
"""Documents that others link to, and that may be written later."""
KEYS = {key for key, _, _ in describe_fields()}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
FILE_ENDINGS = {"safetensors", "md", "py", "yaml", "json", "jsonl", "html", "png", "csv"}


# ----------------------------------------------------------------------------------------------- checking commands


class Parsed(Exception):
    """What a parser of the command line found, before the command does anything."""

    def __init__(self, known, rest):
        super().__init__()
        self.known, self.rest = known, rest


@pytest.fixture
def parse(monkeypatch):
    """`parse(words)` gives the words to the parser of their program, and checks configuration and overrides."""

    def parse_known_args(self, given=None, namespace=None):
        raise Parsed(*argparse.ArgumentParser.parse_known_args(self, given, namespace))

    def parse_args(self, given=None, namespace=None):
        known, rest = argparse.ArgumentParser.parse_known_args(self, given, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed(known, [])

    def parsed(function, words):
        with monkeypatch.context() as patch:
            patch.setattr(arguments.Parser, "parse_known_args", parse_known_args)
            patch.setattr(arguments.Parser, "parse_args", parse_args)
            try:
                function(words)
            except Parsed as result:
                return result
            except SystemExit:  # --help; what is wrong is a ConfigError
                pass
        return None

    return functools.partial(check_command, parsed)


def normalized(words):
    """The program of this project that a command line starts, directly or through a launcher, and its arguments."""
    program, *rest = words
    if program in ("torchrun", "deepspeed", "sbatch"):
        start = next((i for i, word in enumerate(rest) if word in ("dist_train", "launch/slurm.py")), None)
        program, rest = ("", rest) if start is None else (rest[start], rest[start + 1 :])
    elif program.rpartition("/")[2] in ("python", "python3") and rest[:1] == ["-m"]:
        program, rest = rest[1], rest[2:]
    program = {"dist_train": "dist-train", "launch/slurm.py": "launch.slurm"}.get(program, program)
    if program == "dist-train" and rest[:1] == ["shards"]:
        program, rest = "shards", rest[1:]
    elif program == "dist-train" and rest[:1] == ["launch"] and len(rest) > 1:
        program, rest = f"launch.{rest[1]}", rest[2:]
    return program, rest


def check_command(parsed, words):
    """Raise UserError, or fail, where a command of this project is not one; others are passed over."""
    program, rest = normalized(words)
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert all(re.search(rf"^{target}:", read("Makefile"), re.MULTILINE) for target in targets), words
    elif program == "dist-train" and rest and rest[0] not in ("-h", "--help"):
        check_verb(parsed, *rest)
    elif program == "shards":
        with contextlib.suppress(SystemExit):  # --help
            importlib.import_module("shards.__main__")._parser().parse_args(rest)
    elif program in ("launch.local", "launch.nodes"):
        module = importlib.import_module(program)
        # Their main catches what its parser raises, to print it.
        caught = []
        check_result(parsed(lambda rest: caught.append(main_errors(module, rest)), rest))
        if caught and caught[0]:
            raise ConfigError(caught[0])
    elif program == "launch.slurm":
        module = importlib.import_module(program)
        known, overrides = module._parser().parse_known_args(rest)
        for word in known.sweep or []:
            key, _, values = word.partition("=")
            overrides += [f"--{key}={values.split(',')[0]}"]
        check_result(Parsed(known, [*module._as_overrides(known), *overrides]))


def check_verb(parsed, verb, *words):
    """One verb of dist-train."""
    assert verb in cli.VERBS, f"{verb} is no verb of dist-train"
    if verb == "bench" and words:
        assert words[0] in bench.BENCHES, f"{words[0]} is no benchmark"
        parsed(importlib.import_module(f"dist_train.bench.{words[0]}").run, list(words[1:]))
    else:
        check_result(parsed(importlib.import_module(f"dist_train.commands.{cli.VERBS[verb]}").run, list(words)))


def main_errors(module, words):
    """What a launcher's main prints before it returns 2."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        module.main(words)
    return said.getvalue()


def check_result(result):
    """The configuration and the overrides that a parser found."""
    if result is None:
        return
    known = vars(result.known)
    config = known.get("config")
    if config and (ROOT / config).is_file():
        load_config(ROOT / config, *result.rest)
    elif result.rest:
        make_config({"data": {"shards": "data"}}, *result.rest)
    if known.get("study"):
        grid.cells(grid.load_study(ROOT / known["study"]))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_ones_that_the_command_line_takes(document, parse):
    made = {words[-1] for block in blocks(document) for words in block.commands if words[0] == "cp"}
    for block in blocks(document):
        for words in block.commands if block.test != "refused" else ():
            try:
                parse(words)
            except UserError as error:
                pytest.fail(f"{document} line {block.line}: {shlex.join(words)}: {error}")
            missing = [
                word
                for word in words
                if word.startswith(("configs/", "tests/", "launch/"))
                and word not in made
                and not (ROOT / word).exists()
            ]
            assert not missing, f"{document} line {block.line}: there is no {missing[0]}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_sentences_are_ones_that_the_command_line_takes(document, parse):
    for text in inline_code(document):
        if re.match(r"(dist-train|python -m (shards|launch|dist_train))\b", text) and not re.search(
            r"\.\.\.|…|\|", text
        ):
            try:
                parse(split(text))
            except UserError as error:
                # A sentence may name a command without all that it needs.
                if "required" not in str(error):
                    pytest.fail(f"{document}: `{text}`: {error}")


def test_a_wrong_command_is_found(parse):
    for text in (
        "dist-train plan CONFIG --optim.lrr 1",
        "dist-train eval RUN --bugets 1",
        "python -m shards make folder A B --perclass 3",
        "python -m launch.local CONFIG --optim.lr=fast",
        "python -m launch.slurm CONFIG --sweep loss.teacher=last",
        "dist-train study configs/study_digits.yaml --sbatch",
        "dist-train bench order --no-such-flag",
        "python -m launch.nodes CONFIG",
        "sbatch --nodes 2 launch/slurm.py CONFIG --train.zero 1",
    ):
        with pytest.raises(UserError):
            parse(split(text))


# -------------------------------------------------------------------------------------- links, keys, YAML, Python


def anchors(text):
    """The anchors that GitHub gives to the headings of a text."""
    headings = re.findall(
        r"^#+\s+(.+?)\s*$", re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_exist(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        if not path.exists() and os.path.relpath(path, ROOT) in EXPECTED:
            continue
        assert path.exists(), f"{document}: {target} does not exist"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{document}: {target}: there is no such heading"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    for code in inline_code(document):
        if re.fullmatch(r"(?!runs/)[\w/]+/\w+\.(py|yaml|md)", code):
            assert any((ROOT / place / code).exists() for place in ("", "dist_train")), f"{document}: `{code}`"


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])  # which has the old keys
def test_configuration_keys_exist(document):
    text = read(document)
    section = "|".join(sorted(SECTIONS))
    named = set(re.findall(rf"--((?:{section})\.\w+)", text))
    for code in inline_code(document):
        named |= set(re.findall(rf"(?<![\w./])((?:{section})\.[a-z_]\w*)(?![\w.(/]\w)", code))
    named = {key for key in named if key.rpartition(".")[2] not in FILE_ENDINGS}
    assert named - KEYS == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_yaml_is_a_configuration_or_a_study(document):
    for block in blocks(document):
        if block.language not in ("yaml", "yml"):
            continue
        tree = parse_yaml(block.text, f"{document} line {block.line}")
        if "axes" in tree:
            study = grid.StudyConfig.model_validate(tree)
            fields = [
                *study.set,
                *(key for axis in study.axes.values() for variant in axis.values() for key in variant),
            ]
            assert set(fields) - KEYS == set(), f"{document} line {block.line}"
        elif set(tree) <= set(Config.model_fields):
            given = {key: value for key, value in flatten(tree).items() if not key.startswith("model.options.")}
            assert set(given) - KEYS == set(), f"{document} line {block.line}"
            make_config({"data": {"shards": "data"}} | tree)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_compiles_and_its_imports_exist(document):
    for block in blocks(document):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.partition(".")[0] in ("dist_train", "launch", "shards"):
                home = importlib.import_module(module)
                for alias in node.names:
                    assert hasattr(home, alias.name) or importlib.util.find_spec(f"{module}.{alias.name}"), alias.name


def test_the_picture_of_the_layers_is_the_one_that_is_checked():
    drawn, layer = {}, ""
    for line in read("docs/architecture.md").splitlines():
        if match := re.match(r"\| (\d*) *\| `(?:dist_train/)?(\w+)(?:\.py|/)` \|", line):
            layer = match[1] or layer
            drawn[match[2]] = int(layer)
    packages = {name.rpartition(".")[2]: number for number, names in enumerate(LAYERS, start=1) for name in names}
    packages["__init__"] = packages.pop("dist_train")
    assert drawn == packages
    for library, owners in OWNERS.items():
        for owner in owners:
            assert owner.removeprefix("dist_train/") in read("docs/architecture.md") or "plots" in owner, library
