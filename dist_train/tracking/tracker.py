"""The thread on rank 0 that mirrors a run to MLflow, so that no training step waits for a server."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from dist_train.config import Config
from dist_train.tracking.mirror import Mirror, SyncState, is_same_file
from dist_train.tracking.mlflow import PARENT, is_watching, load, reason, tracking_uri, watch_machine, without_password

log = logging.getLogger("dist_train")

SEND_SECONDS = 2.0
LAST_TRIES = 5
"""How often the end of a run is sent before it is given up: SQLite refuses at once where two runs write, and is free soon."""


class Tracker:
    """The thread that mirrors a run; an unreachable server is reported once and retried."""

    def __init__(self, config: Config, tags: dict[str, str]) -> None:
        self.folder = config.folder
        self.uri = tracking_uri(config)
        self._state = SyncState(config.folder)
        self._tags = tags
        self._ending: dict[str, Any] = {}
        """How the run ended, for the state."""
        self._begun = False
        self._open = False
        self._machine: Any = None
        self._warned = False
        self._imported = threading.Event()
        self._stop = threading.Event()
        # A daemon: where a server hangs, the process ends without it.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if self.uri is None:
            return
        self._mirror = Mirror(config, config.folder, self.uri, self._state)
        try:
            self._begin()
        except OSError as error:  # the thread tries it again
            self._warn(f"tracking.json cannot be written: {error.strerror}")
        self._thread.start()

    def _begin(self) -> None:
        before = self._state.read()
        if before.get("uri") not in (None, self.uri) or not self._state.belongs_to(self.folder):
            self._state.forget_run()
            before = {}
        path = self.folder / "metrics.jsonl"
        found = path.stat() if path.exists() else None
        same_file = is_same_file(found, before) if found else before.get("inode") is None
        self._state.update(
            uri=self.uri,
            folder=str(self.folder.resolve()),
            # A resume that drops lines writes another file, in which an offset means nothing.  All is sent again, but for
            # what MLflow has.
            offset=before.get("offset", 0) if same_file else 0,
            inode=found.st_ino if found else None,
            repeated=before.get("repeated" if same_file else "newest", 0),
            tags=self._tags,
            complete=False,
            started=before.get("started") or int(time.time() * 1000),
            parent=os.environ.get(PARENT),
            **{"status": "RUNNING", **self._ending},
        )
        self._begun = True

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once there is one."""
        return self._state.read().get("run_id")

    def close(self, status: str, timeout: float = 30.0) -> None:
        """Send what is left, set MLflow's status (FINISHED, FAILED, or RUNNING for a run that will be resumed), and end."""
        if not self._thread.is_alive():
            return
        self._ending = {"status": status, "ended": int(time.time() * 1000)}
        with contextlib.suppress(OSError):
            self._state.update(**self._ending)
        # MLflow's import takes long where all cores are at work: that is no server that hangs, and has a wait of its own.
        self._imported.wait(timeout)
        self._stop.set()
        # A server that hangs must not hold up the end of the run for longer than this.
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(f"no answer in {timeout:.0f} s")
        if not self._state.read().get("complete"):
            log.warning(
                "MLflow does not have the whole run; once it can be reached, run: dist-train sync %s", self.folder
            )

    def _work(self) -> None:
        with contextlib.suppress(Exception):  # the first try says what is wrong
            load()
        self._imported.set()
        while not self._stop.wait(SEND_SECONDS):
            self._try(self._send)
        for number in range(LAST_TRIES):
            if number:
                time.sleep(1.0)
            if self._try(self._finish):
                return

    def _try(self, send: Callable[[], None]) -> bool:
        try:
            if not self._begun:
                self._begin()
            if not self._open:
                self._mirror.open()
                self._open = True
                self._leave_machine()  # where the server has lost the run, it is another one from here on
            send()
        except Exception as error:  # whatever MLflow raises: the mirror must never end the run
            # Opened again at the next try: the server may have been restarted, and may have lost the run.
            self._open = False
            self._warn(reason(error))
        return self._open

    def _send(self) -> None:
        self._mirror.send()
        # MLflow's thread ends at its first request that fails.
        if self._machine is None or not is_watching(self._machine):
            self._leave_machine()
            assert self.uri is not None
            assert self.run_id is not None
            # What MLflow cannot measure here must not keep the run's own metrics from it.
            with contextlib.suppress(Exception):
                self._machine = watch_machine(self.uri, self.run_id)

    def _finish(self) -> None:
        self._state.update(**self._ending)  # once more: where the disk was full, it is not there yet
        self._mirror.send()
        self._leave_machine()
        self._mirror.finish()

    def _leave_machine(self) -> None:
        if self._machine is not None:
            self._machine.finish()
        self._machine = None

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning(
                "MLflow at %s cannot be used (%s); metrics.jsonl has everything, and training continues",
                without_password(str(self.uri)),
                reason,
            )
        self._warned = True
