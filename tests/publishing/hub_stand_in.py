"""The part of the Hugging Face hub's HTTP API that making a repository and uploading a folder to it calls."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What it was asked, and what it holds now."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    made: dict[str, Any] | None = None
    messages: list[str] = field(default_factory=list)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub on this machine, for as long as the context lasts."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _allowed(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self._answer({"error": "Invalid credentials"}, 401)
            return False

        def do_GET(self) -> None:
            if not self._allowed():
                return
            path = urlsplit(self.path).path
            if "/tree/" in path:
                entries = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in state.files]
                self._answer(entries)
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in state.files]
                self._answer({"id": "me/tiny", "sha": "0" * 40, "private": True, "tags": [], "siblings": siblings})
            else:
                self._answer({"error": f"unknown: {path}"}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self._allowed():
                return
            path = urlsplit(self.path).path
            if path == "/api/repos/create":
                state.made = json.loads(body)
                self._answer({"url": f"{state.address}/me/tiny"})
            elif "/preupload/" in path:
                wanted = [file["path"] for file in json.loads(body)["files"]]
                answers = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in wanted]
                self._answer({"files": answers})
            elif "/commit/" in path:
                for line in body.splitlines():
                    self._apply(json.loads(line))
                self._answer({"commitUrl": f"{state.address}/me/tiny/commit/1", "commitOid": "1" * 40, "success": True})
            elif path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            else:
                self._answer({"error": f"unknown: {path}"}, 404)

        def _apply(self, operation: dict[str, Any]) -> None:
            value = operation["value"]
            if operation["key"] == "header":
                state.messages.append(value["summary"])
            elif operation["key"] == "file":
                state.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del state.files[value["path"]]

        def log_message(self, *args: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
