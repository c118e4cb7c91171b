"""A real HTTP server of shards, for tests: counts requests, and answers wrongly where it is told to."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and counts requests.

    Gives `damaged[path]` many wrong answers for a path before the right one, and the status `refused[path]` instead of any;
    calls `before[path]` before it answers.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.damaged: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.before: dict[str, Callable[[], object]] = {}
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.counts[self.path] += 1
        server.before.get(self.path, lambda: None)()
        if self.path in server.refused:
            self.send_error(server.refused[self.path])
        elif server.counts[self.path] <= server.damaged.get(self.path, 0):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"half of a sh")
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()
