"""A web server on the loopback address that serves files, plays the hub, and fails on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

HTML_PAGE = b"<!doctype html><title>Sign in</title><p>Please sign in to use this network."
_INVERTED = bytes(range(255, -1, -1))


class Fault(Enum):
    """One way in which an answer can go wrong."""

    STALL = auto()
    """The connection is accepted and nothing is ever sent."""
    STALL_HALFWAY = auto()
    """Half of the body comes, then nothing."""
    SHORT_BODY = auto()
    """Half of the announced body comes, then the connection is closed."""
    WRONG_BYTES = auto()
    """As many bytes as announced, but others."""
    HTML_PAGE = auto()
    """A sign-in page with status 200, as a captive portal sends it."""
    UNAVAILABLE = auto()
    """Status 503."""
    GATED = auto()
    """Status 403, as the hub answers who has not accepted the licence of a gated repository."""
    UNAUTHORIZED = auto()
    """Status 401, as the hub answers who is not logged in."""


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str


@dataclass(frozen=True)
class File:
    """What is served at one path; a view of a mapped file serves without loading it."""

    body: bytes | memoryview
    headers: dict[str, str] = field(default_factory=dict)
    redirect: str | None = None


class LoopbackServer:
    """Serves the added files until its `with` block ends.

    `requests` lists what was asked for, in order. Faults queued for a path by `fail` are played
    one per GET (or HEAD, if so queued); afterwards the file is served as it is.
    """

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._faults: defaultdict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.loopback = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    def __enter__(self) -> LoopbackServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The address of the server, without a slash at its end."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def add(
        self,
        path: str,
        body: bytes | memoryview,
        *,
        headers: dict[str, str] | None = None,
        redirect: str | None = None,
    ) -> str:
        """Serve `body` (or a redirect) at `path`; return the address."""
        self.files[path] = File(body, headers or {}, redirect)
        return self.url + path

    def fail(self, path: str, *faults: Fault, method: str = "GET") -> None:
        """Play `faults` in the next requests for `path`."""
        self._faults[method, path].extend(faults)

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Take the fault that is due."""
        queue = self._faults[method, path]
        return queue.popleft() if queue else None

    def seen(self, method: str = "GET") -> list[Request]:
        """The requests so far made with `method`."""
        return [request for request in self.requests if request.method == method]


class LoopbackHub:
    """Lays files out on a `LoopbackServer` as the Hugging Face hub does."""

    def __init__(self, server: LoopbackServer) -> None:
        self.server = server
        self._names: defaultdict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)

    def add(
        self,
        repo_id: str,
        filename: str,
        body: bytes | memoryview,
        *,
        repo_type: str = "model",
        revision: str = "main",
    ) -> str:
        """Serve `filename` of a repository; return the path on the server that faults go to.

        A `revision` of 40 hex digits is a commit; for a branch a commit is made up.
        """
        commit = revision if len(revision) == 40 else hashlib.sha1(repo_id.encode()).hexdigest()
        prefix = "/datasets" if repo_type == "dataset" else ""
        path = f"{prefix}/{repo_id}/resolve/{revision}/{filename}"
        headers = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Content-Disposition": f'inline; filename="{filename.rpartition("/")[2]}";',
        }
        for name in {revision, commit}:
            self.server.add(f"{prefix}/{repo_id}/resolve/{name}/{filename}", body, headers=headers)
            self._list(repo_id, f"{repo_type}s", name, commit, filename, len(body))
        return path

    def _list(
        self, repo_id: str, kind: str, revision: str, commit: str, filename: str, size: int
    ) -> None:
        """Keep the repository's description and its list of files up to date."""
        sizes = self._names[repo_id, kind, revision]
        sizes[filename] = size
        api = f"/api/{kind}/{repo_id}"
        info = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in sizes]}
        tree = [
            {"type": "file", "path": name, "size": count, "oid": hashlib.sha1(b"").hexdigest()}
            for name, count in sizes.items()
        ]
        as_json = {"Content-Type": "application/json"}
        for path, value in (
            (api, info),
            (f"{api}/revision/{revision}", info),
            (f"{api}/tree/{revision}", tree),
        ):
            self.server.add(path, json.dumps(value).encode(), headers=as_json)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, so that every answer ends its connection and none outlives the test."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client had enough
            super().handle()

    def _answer(self) -> None:
        server: LoopbackServer = self.server.loopback  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        server.requests.append(Request(self.command, path))
        fault = server.next_fault(self.command, path)
        file = server.files.get(path)
        if fault is Fault.STALL:
            server.closing.wait()
        elif fault is Fault.UNAVAILABLE:
            self._send(503, b"busy", {})
        elif fault is Fault.HTML_PAGE:
            self._send(200, HTML_PAGE, {"Content-Type": "text/html; charset=utf-8"})
        elif fault is Fault.GATED:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif fault is Fault.UNAUTHORIZED:
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif file is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif file.redirect:
            self._send(302, b"", {"Location": file.redirect})
        else:
            self._send_file(file, fault, server)

    def _send_file(self, file: File, fault: Fault | None, server: LoopbackServer) -> None:
        body, status, headers = file.body, 200, dict(file.headers)
        total = len(body)
        asked = self.headers.get("Range")
        if asked:
            start = int(asked[len("bytes=") :].split("-")[0])
            if start >= total:
                self._send(416, b"", {"Content-Range": f"bytes */{total}"})
                return
            status, body = 206, body[start:]
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        if fault is Fault.WRONG_BYTES:
            body = bytes(body).translate(_INVERTED)
        sent = len(body) // 2 if fault in (Fault.SHORT_BODY, Fault.STALL_HALFWAY) else len(body)
        self._send(status, body, headers, sent)
        if fault is Fault.STALL_HALFWAY:
            server.closing.wait()

    def _send(
        self,
        status: int,
        body: bytes | memoryview,
        headers: dict[str, str],
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.wfile.flush()
