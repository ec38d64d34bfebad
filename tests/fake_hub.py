"""A model hub for tests: a real HTTP server that speaks as much of Hugging Face's API, and of ModelScope's, as their
own clients want for looking at a repo and fetching its files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = hashlib.sha1(b"a commit").hexdigest()
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Hub:
    """repos: of each its files; gated: repos that want a token. What was asked is written down, and of each file how
    many bytes went out. stalls: names of files whose next answer stops after three quarters, until `go_on` is set."""

    repos: Mapping[str, Mapping[str, bytes]]
    gated: frozenset[str] = frozenset()
    url: str = ""
    asked: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    stalls: set[str] = field(default_factory=set)
    go_on: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            def setup(self) -> None:
                super().setup()
                self.hub = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Tests look at `Hub.asked`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        self.hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(f"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", path):
            self._model(found)
        elif found := re.fullmatch(f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", path):
            self._tree(found)
        elif found := re.fullmatch(f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", path):
            self._file(found, found["name"])
        elif found := re.fullmatch(f"/api/v1/models/{REPO}/repo(?P<list>/files)?", path):
            self._of_modelscope(found, query.get("FilePath", [""])[0])
        else:
            self._answer(404, b"{}")

    def _files(self, found: re.Match[str], revisions: tuple[str, ...]) -> Mapping[str, bytes] | None:
        """Of the repo that was asked for; what is not there, or not allowed, is answered here."""
        files = self.hub.repos.get(found["repo"])
        if files is None:
            self._answer(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif found["repo"] in self.hub.gated and not self.headers.get("Authorization"):
            self._answer(401, b'{"error":"Access is restricted"}', {"X-Error-Code": "GatedRepo"})
        elif found.groupdict().get("revision") not in (None, COMMIT, *revisions):
            self._answer(404, b'{"error":"Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            return files
        return None

    def _model(self, found: re.Match[str]) -> None:
        if (files := self._files(found, ("main", "v1"))) is not None:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self._json({"id": found["repo"], "modelId": found["repo"], "sha": COMMIT, "siblings": siblings})

    def _tree(self, found: re.Match[str]) -> None:
        if (files := self._files(found, ("main", "v1"))) is not None:
            names = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)} for name, data in files.items()
            ]
            self._json(names)

    def _file(self, found: re.Match[str], name: str) -> None:
        if (files := self._files(found, ("main", "v1"))) is None:
            return
        if name not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        self._data(name, files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(files[name])}"'})

    def _of_modelscope(self, found: re.Match[str], name: str) -> None:
        """The list of a repo's files, or one of them."""
        if (files := self._files(found, ())) is None:
            return
        if found["list"]:
            entries = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": _digest(data)}
                for name, data in files.items()
            ]
            self._json({"Code": 200, "Success": True, "Data": {"Files": entries}})
        else:
            self._data(name, files[name], {"X-Linked-ETag": _digest(files[name])})

    def _data(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        begin = 0
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(found[1]), int(found[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data = data[begin : end + 1]
        first = len(data)
        if self.command == "GET":
            first = len(data) * 3 // 4 if name in self.hub.stalls else len(data)
            self.hub.stalls.discard(name)
            self.hub.sent[name] = self.hub.sent.get(name, 0) + first
        self._answer(206 if found else 200, data, {"Accept-Ranges": "bytes", **headers}, first)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}, first: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:first])
            if first is not None and first < len(body):
                self.hub.go_on.wait(30)
                self.close_connection = True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
