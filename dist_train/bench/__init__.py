"""What ``dist-train bench`` measures on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def writable(text: str) -> Path:
    """The type of ``--json`` and ``--html``: a file that can be written, which is said before the measuring and not after it."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written, it is a folder or in none; give another file")
    return path
