"""Servers of weight files, and proxies, on this machine."""

from __future__ import annotations

import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

CONTENT = bytes(range(256)) * 3000


class Server(ThreadingHTTPServer):
    """Listens on a free port of this machine."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Serve until the block ends."""
        thread = threading.Thread(target=partial(self.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class FileServer(Server):
    """Serves one file; can break off in the middle, ignore ranges, or serve something else."""

    def __init__(self) -> None:
        super().__init__(FileHandler)
        self.content = CONTENT
        self.ranges = True
        self.break_off_after: list[int] = []
        self.requested: list[str | None] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"


class FileHandler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        content, start = self.server.content, 0
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        if wanted and self.server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = self.server.break_off_after.pop(0) if self.server.break_off_after else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *_: object) -> None:
        pass


class Proxy(Server):
    """Knows one made-up host, which nobody else can reach, and where it is really."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(ProxyHandler)
        self.host, self.port = host, port
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class ProxyHandler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        wanted = urlsplit(self.path)
        if wanted.hostname != self.server.host:
            self.send_error(502)
            return
        upstream = HTTPConnection("127.0.0.1", self.server.port)
        upstream.request("GET", wanted.path, headers={"Range": self.headers["Range"]} if self.headers["Range"] else {})
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name in ("Content-Length", "Content-Range"):
            if answer.headers[name]:
                self.send_header(name, answer.headers[name])
        self.end_headers()
        self.wfile.write(answer.read())

    def do_CONNECT(self) -> None:
        self.server.asked.append(f"CONNECT {self.path}")
        if self.path.partition(":")[0] != self.server.host:
            self.send_error(502)
            return
        with socket.create_connection(("127.0.0.1", self.server.port)) as upstream:
            self.send_response(200)
            self.end_headers()
            ways = {self.connection: upstream, upstream: self.connection}
            while True:
                for side in select.select(list(ways), [], [])[0]:
                    block = side.recv(1 << 16)
                    if not block:
                        return
                    ways[side].sendall(block)

    def log_message(self, *_: object) -> None:
        pass
