"""A server on this machine that speaks what huggingface_hub needs of the Hugging Face Hub: create, commit, list, fetch."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secretsecretsecretsecretsecretsecre"


class FakeHub(ThreadingHTTPServer):
    """``repositories``: content of the files by repository and path; ``requests``: method and path of all that came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.requests = []
        self.private = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository):
        """The id of the state of a repository."""
        files = self.repositories[repository]
        return hashlib.sha1(repr(sorted((path, blob(data)) for path, data in files.items())).encode()).hexdigest()


def blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=None, headers=()):
        body = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, status=404):
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def handle_request(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/repos/create":
            if not allowed:
                return self.answer(401)
            given = json.loads(data)
            name = f"{given['organization']}/{given['name']}"
            if name in hub.repositories:
                return self.answer(409, {"url": f"{hub.url}/{name}"})
            hub.repositories[name] = {}
            if given.get("private") or given.get("visibility") == "private":
                hub.private.add(name)
            return self.answer(200, {"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if (match := re.fullmatch("/api/models/([^/]+/[^/]+)", path)) and match[1] in hub.repositories:
            return self.answer(200, {"id": match[1], "private": match[1] in hub.private, "siblings": []})
        if match:
            return self.refuse("RepoNotFound")
        match = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|preupload|commit|resolve)/([^/]+)/?(.*)", path
        )
        if match is None:
            return self.answer(501)
        name, verb, revision, file = match.groups()
        if name not in hub.repositories or (name in hub.private and not allowed):
            return self.refuse("RepoNotFound")
        files, commit = hub.repositories[name], hub.commit(name)
        if revision not in ("main", commit):
            return self.refuse("RevisionNotFound")
        if verb == "revision":
            return self.answer(200, {"id": name, "sha": commit, "siblings": [{"rfilename": one} for one in files]})
        if verb == "tree":
            rows = [
                {"type": "file", "path": one, "size": len(content), "oid": blob(content)}
                for one, content in files.items()
            ]
            return self.answer(200, rows)
        if verb == "resolve":
            if file not in files:
                return self.refuse("EntryNotFound")
            return self.answer(200, files[file], {"ETag": f'"{blob(files[file])}"', "X-Repo-Commit": commit})
        if not allowed:
            return self.answer(403)
        if verb == "preupload":
            wanted = json.loads(data)["files"]
            return self.answer(
                200,
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in wanted]},
            )
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        oid = hub.commit(name)
        return self.answer(
            200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": "", "success": True}
        )

    do_GET = do_HEAD = do_POST = handle_request


@contextlib.contextmanager
def running():
    """A hub that answers until the end of the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
