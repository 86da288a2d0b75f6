"""Services that metrics are sent to, as they are on bad days."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tasks.aws import AwsSettings


@dataclass
class Service:
    """A web server that answers every call of CloudWatch alike."""

    aws: AwsSettings
    refusal: str
    """Error code that it answers with; empty where it takes everything."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """What it was sent."""


@contextmanager
def answering(refusal: str = "") -> Iterator[Service]:
    """A service that refuses every call with an error code, or takes it if there is none, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            service.calls.append(json.loads(gzip.decompress(body) if "Content-Encoding" in self.headers else body))
            answer = json.dumps({"__type": f"com.amazonaws.cloudwatch#{service.refusal}"} if service.refusal else {})
            self.send_response(400 if service.refusal else 200)
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service = Service(AwsSettings("eu-central-1", f"http://127.0.0.1:{server.server_port}"), refusal)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield service
        finally:
            server.shutdown()


@contextmanager
def silent() -> Iterator[AwsSettings]:
    """A service that lets everybody in and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield AwsSettings("eu-central-1", f"http://127.0.0.1:{listener.getsockname()[1]}")


def closed() -> AwsSettings:
    """A service that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return AwsSettings("eu-central-1", f"http://127.0.0.1:{port}")
