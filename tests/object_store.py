"""A server of files by ranges, over HTTP and as an S3-compatible store (path style), that drops and stalls requests on demand."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class ObjectStore(ThreadingHTTPServer):
    """Serves the files below a folder.

    Attributes:
        requests: the method and path of every request.
        faults: whether each tenth request is dropped (before or within the answer), and each twentieth stalls.
        down: whether all requests are dropped.
        failing: how many of the next requests are dropped.
        ranges: whether ranges are honoured.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.ranges, self.down = folder, False, True, False
        self.requests: list[tuple[str, str]] = []
        self.failing = 0
        self.forbidden: set[str] = set()
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what the tests make."""


class _Handler(BaseHTTPRequestHandler):
    server: ObjectStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, path))
            number = len(self.server.requests)
            failing, self.server.failing = self.server.failing, max(0, self.server.failing - 1)
        fault = number % 20 if self.server.faults else 0
        if fault == 7 or self.server.down or failing:
            self.close_connection = True
            return
        if fault == 13:
            self.server.closing.wait(60)
            self.close_connection = True
            return
        file = self.server.folder / path.lstrip("/")
        if path in self.server.forbidden or not file.is_file():
            self._answer(403 if path in self.server.forbidden else 404, b"", 0)
            return
        self._whole(file) if "Range" not in self.headers or not self.server.ranges else self._part(file, fault)

    def _whole(self, file: Path) -> None:
        self._answer(200, file.read_bytes(), 0, {"ETag": _tag(file)})

    def _part(self, file: Path, fault: int) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"])
        assert found is not None
        size = file.stat().st_size
        start, end = int(found[1]), min(int(found[2] or size), size - 1)
        if start >= size:
            self._answer(416, b"", 0)
            return
        with open(file, "rb") as content:
            content.seek(start)
            body = content.read(end + 1 - start)
        self._answer(206, body, fault, {"Content-Range": f"bytes {start}-{end}/{size}", "ETag": _tag(file)})

    def _answer(self, status: int, body: bytes, fault: int, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Length": str(len(body)),
            "Accept-Ranges": "bytes",
            "Last-Modified": formatdate(0, usegmt=True),
        }
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == 17:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(0.01)
            self.close_connection = True
            return
        self.wfile.write(body)


def _tag(file: Path) -> str:
    found = file.stat()
    return f'"{hashlib.md5(f"{file} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()}"'


@contextmanager
def serving(folder: Path) -> Iterator[ObjectStore]:
    """A running server of the files below `folder`."""
    server = ObjectStore(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
