"""A hub that is not there: the few endpoints of huggingface.co that a push needs, for the real client to talk to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Remembers what was asked of it.

    Attributes:
        role: of the user's token.
        full: whether commits are refused.
        created: name of each repository that was asked for, and whether it was to be private.
        files: names of what was committed.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Endpoints)
        self.role = "write"
        self.full = False
        self.created: list[tuple[str, bool]] = []
        self.files: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Endpoints(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2" and self.headers["Authorization"] == f"Bearer {TOKEN}":
            orgs = [{"name": "readers", "roleInOrg": "read"}, {"name": "makers", "roleInOrg": "write"}]
            token = {"accessToken": {"role": self.server.role}}
            return self._answer({"name": "somebody", "orgs": orgs, "auth": token})
        return self._answer({"error": f"no {self.path} here"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("private") or asked.get("visibility") == "private"  # as older and newer clients say it
            self.server.created.append((asked["name"], bool(private)))
            return self._answer({"url": f"{self.server.address}/somebody/tiny"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        if self.path.endswith("/commit/main") and not self.server.full:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.files |= {line["value"]["path"] for line in lines if line["key"] == "file"}
            return self._answer(
                {"commitUrl": f"{self.server.address}/somebody/tiny/commit/1", "commitOid": "1", "hookOutput": ""}
            )
        return self._answer({"error": "the storage is full"}, 403)

    def _answer(self, document: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process's client talks to, with somebody logged in."""
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
