"""The Markdown of the project: commands run or parse, Python runs, links exist, configuration keys are known.

An HTML comment before a fenced block says what happens to it:

    <!-- test: run -->     the block is executed, in a folder with configs/, data/digits and PHOTOS (class folders)
    <!-- test: parse -->   its commands are checked against the parsers of the command line; also the default
    <!-- test: wheel -->   tests/test_wheel.py executes it, where only the wheel is installed
    <!-- test: refused --> likewise: each command is followed by the line with which it is refused (…: anything)

Blocks without a language, or with bash, sh or console, hold commands; programs of others are passed over.  In a console
they are the lines that begin with `$ `, the others are what is printed.  Training
commands that are executed get the overrides in TINY.  The blocks of a document run in order, in one process and namespace.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_train import arguments, cli
from dist_train.commands import bench
from dist_train.config import Config
from dist_train.config_file import describe_fields, flatten, load_config, make_config, parse_yaml
from dist_train.errors import ConfigError, UserError
from launch import grid
from tests.common import LIMIT
from tests.test_architecture import LAYERS, OWNERS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(path.name for path in sorted(ROOT.glob("*.md"))),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
EXPECTED = {"docs/data.md", "docs/evaluation.md"}
"""Documents that others link to, and that may be written later."""
COMMANDS = ("", "bash", "sh", "console", "shell")
TINY = [
    "--train.epochs",
    "1",
    "--train.max_steps",
    "2",
    "--train.global_batch",
    "4",
    "--train.micro_batch",
    "2",
    "--train.precision",
    "fp32",
    "--tracking.uri",
    "off",
]
KEYS = {key for key, _, _ in describe_fields()}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
FILE_ENDINGS = {"safetensors", "md", "py", "yaml", "json", "jsonl", "html", "png", "csv"}


# ------------------------------------------------------------------------------------------------ reading Markdown


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what the comment before it asks for, and its lines."""

    language: str
    test: str
    text: str
    line: int

    @property
    def commands(self):
        """The command lines of the block as words, comments and continuations resolved."""
        if self.language not in COMMANDS:
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line for line in lines if line.startswith("$ ")]
        texts = [part for line in lines for part in line.removeprefix("$ ").split("&&")]
        return [words for text in texts if (words := split(text))]


def split(text):
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # output of a program, or a picture
        return []


def read(document):
    return (ROOT / document).read_text()


def blocks(document):
    found, test, fence, lines, start = [], "parse", None, [], 0
    for number, line in enumerate(read(document).splitlines(), start=1):
        if fence is not None:
            if line.strip() == "```":
                found.append(Block(fence, test, "\n".join(lines) + "\n", start))
                fence, test = None, "parse"
            else:
                lines.append(line)
        elif match := re.match(r"\s*```(\S*)", line):
            fence, lines, start = match[1], [], number
        elif match := re.match(r"\s*<!-- test: (.+?) -->", line):
            test = match[1]
        elif line.strip():
            test = "parse"
    assert fence is None, f"{document}: the block of line {start} has no end"
    return found


def prose(document):
    """The text outside of fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", read(document), flags=re.DOTALL | re.MULTILINE)


def inline_code(document):
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(document))]


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


# ------------------------------------------------------------------------------------------------- running blocks


def steps(document):
    """What the blocks marked `run` do, one after the other: command lines, and Python."""
    for block in blocks(document):
        if block.test == "run" and block.language == "python":
            yield ["python", block.text]
        elif block.test == "run":
            yield from block.commands


def run_steps(steps):
    """Run them in this process, which has been started for it; what launches processes is started as such."""
    space = {"__name__": "docs"}
    # One core: two threads that wait for each other by spinning take minutes where other tests share the cores.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    for step in steps:
        print("$", shlex.join(step) if step[0] != "python" or step[1] == "-m" else f"python:\n{step[1]}", flush=True)
        if step[:2] == ["python", "-m"]:
            program, *words = step[2:]
        elif step[0] == "python":
            exec(compile(step[1], "block", "exec"), space)
            continue
        else:
            program, *words = step
        if words[:2] == ["launch", "local"]:
            program, words = "launch.local", words[2:]
        trains = program == "launch.local" or words[:1] in (["train"], ["plan"])
        words += TINY if trains and "--help" not in words else []
        sys.argv = [program, *words]
        if program in ("dist-train", "dist_train", "shards"):
            main = cli.run if program != "shards" else importlib.import_module("shards.__main__").main
            try:
                code = main(words)
            except SystemExit as end:  # --help
                code = end.code
        elif program == "cp":
            code = shutil.copy(*words) is None
        elif program == "launch.local":
            os.sched_setaffinity(0, cores)
            code = subprocess.run([sys.executable, "-m", program, *words]).returncode
            os.sched_setaffinity(0, {max(cores)})
        else:
            raise AssertionError(f"{program}: how to run it is not written here; mark the block with parse")
        assert not code, f"{shlex.join(step)}: exit code {code}"


@pytest.fixture
def place(digits, tmp_path):
    """A folder in which the commands of the documents run."""
    import numpy as np
    from PIL import Image

    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "PHOTOS" / name
        folder.mkdir(parents=True)
        for number in range(24):
            pixels = generator.integers(0, 128, (40, 36, 3)) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(steps(name))])
def test_blocks_run(document, place):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, str(Path(__file__)), json.dumps(list(steps(document)))],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0, result.stdout


if __name__ == "__main__":
    run_steps(json.loads(sys.argv[1]))
