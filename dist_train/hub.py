"""Folders on the Hugging Face Hub: what is fetched from a repository, and what is pushed to one."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.errors import ConfigError, HubError

PREFIX = "hf://"
# As a Path it has lost a slash.
_ADDRESS = re.compile(r"hf:/{1,2}([^@]*)(?:@(.+))?")
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?", re.ASCII)


class Address(NamedTuple):
    """A repository, ``ORG/NAME``, and its branch, tag or commit (None: main)."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return PREFIX + self.repository + (f"@{self.revision}" if self.revision else "")


def is_address(path: str | Path) -> bool:
    """Whether a path is the address of a repository, ``hf://ORG/NAME`` or ``hf://ORG/NAME@REVISION``."""
    return str(path).startswith("hf:/")


def parse_address(path: str | Path) -> Address:
    """The repository of an address; raises ConfigError where it is malformed."""
    match = _ADDRESS.fullmatch(str(path))
    if match is None:
        raise ConfigError(f"{path}: is no repository; give hf://ORG/NAME or hf://ORG/NAME@REVISION")
    return Address(check_name(match[1]), match[2])


def check_name(repository: str) -> str:
    """The same name; raises ConfigError where it is not ``ORG/NAME`` as the Hub allows it."""
    if not _NAME.fullmatch(repository) or ".." in repository or "--" in repository or len(repository) > 96:
        raise ConfigError(
            f"{repository!r} is no name of a repository; give ORG/NAME of letters, digits, '-', '_' and '.', such as "
            "my-team/flowers"
        )
    return repository


def fetch(address: Address, files: Sequence[str]) -> Path:
    """The local folder of a repository in the Hub's cache, with those of these files that it has, all of one commit.

    Only files of these names are taken, so that a repository cannot put anything else on this machine.

    Raises:
        ConfigError: huggingface_hub is not installed.
        HubError: there is no such repository or revision, it may not be read, or the Hub cannot be reached.
    """
    hub = _library()
    try:
        folder = hub.snapshot_download(
            address.repository,
            revision=address.revision,
            allow_patterns=list(files),
            library_name="dist_train",
            **_endpoint(),
        )
    except Exception as error:  # its own, httpx's, and the system's
        raise HubError(f"{address}: {_reason(error)}") from None
    return Path(folder)


def check_ready() -> None:
    """Raise, before any work, where nothing could be pushed: ConfigError without huggingface_hub, HubError without a token."""
    if not _library().get_token():
        raise HubError(
            "nobody is logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN to a token that may write"
        )


def push(folder: Path, repository: str, private: bool, stale: Sequence[str]) -> str:
    """Upload a folder as one commit, and create the repository where it is missing; the address of its page.

    Args:
        folder: of the files; folders in it are taken as well.
        repository: ``ORG/NAME``.
        private: whether a repository that is created is private, and one that is there must be.
        stale: patterns of files that are removed there unless the folder has them.

    Raises:
        HubError: the account may not write there, the repository is public although ``private``, or the Hub cannot be reached.
    """
    client = _library().HfApi(library_name="dist_train", **_endpoint())
    try:
        # To create a repository that exists changes nothing about it: a public one would stay public.
        public = private and client.repo_exists(repository) and not client.model_info(repository).private
    except Exception as error:  # its own, httpx's, and the system's
        raise HubError(f"{repository}: {_reason(error)}") from None
    if public:
        raise HubError(
            f"{repository}: exists and is public, so --private cannot hold; make it private on its page first, or give another name"
        )
    try:
        # None is the default of the account or organization, which may be private; False would mean public.
        page = client.create_repo(repository, private=private or None, exist_ok=True)
        client.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Push a network trained by dist_train",
            delete_patterns=list(stale),
        )
    except Exception as error:  # its own, httpx's, and the system's
        raise HubError(f"{repository}: {_reason(error)}") from None
    return str(page)


def _library() -> Any:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            "repositories of the Hugging Face Hub need huggingface_hub, which cannot be found; "
            "install it with pip install 'dist-train[hub]'"
        )
    import huggingface_hub
    import huggingface_hub.utils

    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def _endpoint() -> dict[str, str]:
    """The server as the environment has it now: the library asks when it is imported, which another one may have done."""
    endpoint = os.environ.get("HF_ENDPOINT")
    return {"endpoint": endpoint} if endpoint else {}


def _reason(error: Exception) -> str:
    """Why the Hub gave or took nothing, in words of ours: the library's are many lines."""
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision; give a branch, a tag or a commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or the account here may not use it; check the name, or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the account here may not do that (HTTP {status}); log in with a token that may write: `hf auth login`"
    if status == 429 or (status is not None and status >= 500):
        return f"the Hub answers HTTP {status}; try again later"
    if status is not None:
        said = next(iter(str(error).strip().splitlines()), "")
        return f"the Hub refuses it (HTTP {status}: {said[:200]})"
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EACCES,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EDQUOT,
    ):
        return f"its copy cannot be written ({error.strerror}: {error.filename}); free space, or set HF_HOME to a folder of yours"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub cannot be reached, and the repository is not in the cache; check the network"
    text = " ".join(str(error).split())
    return f"the Hub cannot be reached ({text[:200] or type(error).__name__}); check the network, and HF_ENDPOINT where it is set"
