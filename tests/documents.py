"""The Markdown of the project, as the tests read it.

An HTML comment before a fenced block says what happens to it:

    <!-- test: run -->     tests/test_docs_run.py executes the block, in a folder with configs/, data/digits and PHOTOS (class folders)
    <!-- test: parse -->   its commands are checked against the parsers of the command line; also the default
    <!-- test: wheel -->   tests/test_wheel.py executes it, where only the wheel is installed
    <!-- test: refused --> likewise: each command is followed by the line with which it is refused (…: anything)

Blocks without a language, or with bash, sh or console, hold commands; programs of others are passed over.  In a console
they are the lines that begin with `$ `, the others are what is printed.
"""

import re
import shlex
from dataclasses import dataclass

from tests.common import ROOT

DOCUMENTS = [
    *(path.name for path in sorted(ROOT.glob("*.md"))),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
COMMANDS = ("", "bash", "sh", "console", "shell")


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
