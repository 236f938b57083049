"""A proxy before an S3 server that misbehaves as told: the faults that networks and stores have, on request.

    proxy.script("503", "truncate")   the next two object GETs fail so, then all pass
    proxy.always("403")               every one
    proxy.mix(seed, share)            a share of them, drawn from a seed, no range more than three times

`proxy.gets[path]` counts object GETs, passed or not; `proxy.stalled` is set when a "stall" has begun.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PASSING = ("truncate", "short", "delay", "stall", "drop", "reset", "503", "500")  # faults that another try may mend
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
REFUSALS = {
    "503": (503, ERROR.format("SlowDown", "Please reduce your request rate.")),
    "500": (500, ERROR.format("InternalError", "We encountered an internal error.")),
    "403": (403, ERROR.format("AccessDenied", "Access Denied")),
    "400": (400, ERROR.format("ExpiredToken", "The provided token has expired.")),
    "301": (301, ERROR.format("PermanentRedirect", "Use another endpoint.")),
}


class FaultProxy:
    """Listens on a free loopback port and forwards to `upstream` (http://host:port)."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.gets: Counter[str] = Counter()
        self.authorizations: list[str] = []
        self.stalled, self.stopping = threading.Event(), threading.Event()
        self._scripts: dict[str, deque[str]] = {}
        self._always: dict[str, str] = {}
        self._mix: tuple[random.Random, float, tuple[str, ...]] | None = None
        self._faulted: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.delay = 0.05  # seconds
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def script(self, *faults: str, kind: str = "get") -> None:
        self._scripts[kind] = deque(faults)

    def always(self, fault: str, kind: str = "get") -> None:
        self._always[kind] = fault

    def mix(self, seed: int, share: float, faults: tuple[str, ...] = PASSING) -> None:
        self._mix = (random.Random(seed), share, faults)

    def calm(self) -> None:
        self._scripts, self._always, self._mix = {}, {}, None

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def choose(self, kind: str, path: str, span: str) -> str:
        """The fault of this request."""
        with self._lock:
            if kind == "get":
                self.gets[path] += 1
            if self._scripts.get(kind):
                return self._scripts[kind].popleft()
            if kind in self._always:
                return self._always[kind]
            if kind == "get" and self._mix and self._faulted[path, span] < 3 and self._mix[0].random() < self._mix[1]:
                self._faulted[path, span] += 1
                return self._mix[0].choice(self._mix[2])
            return "pass"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: FaultProxy

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_any(self) -> None:
        proxy = self.server.proxy
        parts = urlsplit(self.path)
        bucket_only = parts.path.strip("/").count("/") == 0
        kind = "list" if self.command == "GET" and bucket_only else self.command.lower()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy.authorizations.append(self.headers.get("Authorization", ""))
        fault = proxy.choose(kind, parts.path, self.headers.get("Range", ""))
        if fault in ("drop", "reset"):
            self.hang_up(fault)
        elif fault in REFUSALS:
            status, text = REFUSALS[fault]
            self.answer(status, {"Content-Type": "application/xml"}, text.encode(), len(text))
        else:
            if fault == "delay":
                time.sleep(self.server.proxy.delay)
            self.forward(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def forward(self, body: bytes, fault: str) -> None:
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        skip = ("connection", "transfer-encoding", "content-length", "server", "date")
        headers = {k: v for k, v in response.headers.items() if k.lower() not in skip}
        length = int(response.headers.get("Content-Length") or 0) if self.command == "HEAD" else len(data)
        if fault == "flip":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if fault in ("truncate", "short", "stall"):
            data = data[: len(data) // 2]
        self.answer(response.status, headers, data, len(data) if fault == "short" else length)
        if fault == "stall":
            self.server.proxy.stalled.set()
            self.server.proxy.stopping.wait(60)
        if fault in ("truncate", "stall"):
            self.hang_up("drop")

    def answer(self, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def hang_up(self, how: str) -> None:
        self.close_connection = True
        if how == "reset":  # closing with linger 0 sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_) -> None:
        """Nobody reads it."""
