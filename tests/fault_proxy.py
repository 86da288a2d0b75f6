"""A proxy that stands between a client and an AWS of this machine, writes down all calls and breaks some.

    with running_aws() as aws, running_proxy(aws.endpoint_url) as proxy:
        settings = replace(aws, endpoint_url=proxy.url)
        proxy.inject("UploadPart", reset_after, times=2)
        ...
        assert proxy.count("UploadPart") == 4

What breaks is a function of an `Exchange`, so a test can write its own: one that waits for another call, that answers
by itself, or that looks at the request. A call is known by its `operation`: `GetObject`, `UploadPart` and so on for
S3, and what `X-Amz-Target` or the form field `Action` says for services that name it themselves.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

#: Headers that concern one connection and are made anew for the other.
_OF_CONNECTION: Final = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True)
class Call:
    """A request as the client sent it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def operation(self) -> str:
        if target := self.headers.get("x-amz-target"):
            return target.rpartition(".")[2]
        if action := self.query.get("Action") or _form(self).get("Action"):
            return action
        return _s3_operation(self)


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


class Exchange:
    """One call on its way: a fault decides what the upstream sees of it and what the client gets."""

    def __init__(self, call: Call, upstream: str, handler: BaseHTTPRequestHandler) -> None:
        self.call = call
        self._upstream = urllib.parse.urlsplit(upstream)
        self._handler = handler

    def forward(self, body: bytes | None = None) -> Answer:
        """Make the call upstream, with another body if one is given; the client hears nothing yet."""
        sent = self.call.body if body is None else body
        connection = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=60)
        try:
            target = self._handler.path
            connection.putrequest(self.call.method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.call.headers.items():
                if name not in _OF_CONNECTION:
                    connection.putheader(name, value)
            connection.putheader("content-length", str(len(sent)))
            connection.endheaders(sent)
            response = connection.getresponse()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() != "connection"]
            return Answer(response.status, headers, response.read())
        finally:
            connection.close()

    def reply(self, answer: Answer, *, length: int | None = None) -> None:
        """Give the client an answer; `length` is the length that is claimed, the true one by default."""
        handler = self._handler
        handler.send_response_only(answer.status)
        told = {name.lower(): value for name, value in answer.headers if name.lower() not in _OF_CONNECTION}
        for name, value in told.items():
            handler.send_header(name, value)
        if self.call.method == "HEAD":  # Has the length of what it does not bring.
            length = int({name.lower(): value for name, value in answer.headers}.get("content-length", 0))
        handler.send_header("content-length", str(len(answer.body) if length is None else length))
        handler.end_headers()
        if self.call.method != "HEAD":
            handler.wfile.write(answer.body)
            handler.wfile.flush()

    def reset(self) -> None:
        """Break the connection: the client sees that its peer reset it."""
        self._handler.close_connection = True
        # To linger for no time means to send a reset instead of waiting for what is on its way.
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._handler.connection.close()


Fault = Callable[[Exchange], None]
Match = str | Callable[[Call], bool]


def passed_on(exchange: Exchange) -> None:
    """No fault."""
    exchange.reply(exchange.forward())


def refused(status: int, code: str, message: str = "told to fail") -> Fault:
    """The service answers with an error, in the form it has for JSON or XML; the upstream never hears of the call."""

    def fault(exchange: Exchange) -> None:
        if "x-amz-target" in exchange.call.headers:
            body = json.dumps({"__type": f"com.amazonaws#{code}", "message": message}).encode()
            exchange.reply(Answer(status, [("content-type", "application/x-amz-json-1.0")], body))
        else:
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            exchange.reply(Answer(status, [("content-type", "application/xml")], body))

    return fault


internal_error: Final = refused(500, "InternalError")
slow_down: Final = refused(503, "SlowDown")
throttled: Final = refused(400, "ThrottlingException")
too_many: Final = refused(429, "TooManyRequestsException")


def reset_before(exchange: Exchange) -> None:
    """The connection breaks before the upstream hears of the call."""
    exchange.reset()


def reset_after(exchange: Exchange) -> None:
    """The upstream did the work, and the answer is lost."""
    exchange.forward()
    exchange.reset()


def truncated_request(exchange: Exchange) -> None:
    """The upstream gets half of the body, and takes it for the whole."""
    exchange.reply(exchange.forward(exchange.call.body[: len(exchange.call.body) // 2]))


def truncated_response(exchange: Exchange) -> None:
    """The client gets half of the body that was announced, then the connection breaks."""
    answer = exchange.forward()
    exchange.reply(Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2]), length=len(answer.body))
    exchange.reset()


def shortened_response(exchange: Exchange) -> None:
    """The client gets half of the body, announced as the whole."""
    answer = exchange.forward()
    exchange.reply(Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2]))


def garbled_response(exchange: Exchange) -> None:
    """The client gets a body of the right length with its first byte changed."""
    answer = exchange.forward()
    body = bytes([answer.body[0] ^ 1]) + answer.body[1:] if answer.body else b""
    exchange.reply(Answer(answer.status, answer.headers, body))


def stalled(seconds: float) -> Fault:
    """Nothing happens for a while; then the call goes on, if the client still waits."""

    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)
        passed_on(exchange)

    return fault


def serialised() -> Fault:
    """Calls happen one after another, for services that decide races and an upstream that does not."""
    lock = threading.Lock()

    def fault(exchange: Exchange) -> None:
        with lock:
            answer = exchange.forward()
        exchange.reply(answer)

    return fault


class FaultProxy:
    """A running proxy.

    Attributes:
        url: Where clients reach it.
        calls: All calls so far, in the order they came, broken ones too.
    """

    def __init__(self, upstream: str) -> None:
        self.calls: list[Call] = []
        self._upstream = upstream
        self._faults: list[tuple[Match, Fault, int]] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, ValueError):  # The client gave up, or the connection was broken on purpose.
                    self.close_connection = True

            def finish(self) -> None:
                with suppress(OSError, ValueError):
                    super().finish()

            def _pass(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def inject(self, match: Match, fault: Fault, times: int = 1) -> None:
        """Let a fault happen to the next `times` calls that match, an operation's name or a predicate.

        Faults happen in the order they were injected, one to a call.
        """
        with self._lock:
            self._faults.append((match, fault, times))

    def clear(self) -> None:
        """Forget faults and calls."""
        with self._lock:
            self._faults.clear()
            self.calls.clear()

    def count(self, match: Match) -> int:
        """Calls so far that match."""
        with self._lock:
            return sum(_matches(match, call) for call in self.calls)

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(handler.path)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        call = Call(handler.command, urllib.parse.unquote(url.path), query, headers, body)
        self._take_fault(call)(Exchange(call, self._upstream, handler))

    def _take_fault(self, call: Call) -> Fault:
        with self._lock:
            self.calls.append(call)
            for index, (match, fault, times) in enumerate(self._faults):
                if _matches(match, call):
                    self._faults[index : index + 1] = [(match, fault, times - 1)] if times > 1 else []
                    return fault
        return passed_on

    @contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


@contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of the service at URL `upstream` while the block runs."""
    proxy = FaultProxy(upstream)
    with proxy.serving():
        yield proxy


def _matches(match: Match, call: Call) -> bool:
    return call.operation == match if isinstance(match, str) else match(call)


def _form(call: Call) -> dict[str, str]:
    if not call.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return {}
    return dict(urllib.parse.parse_qsl(call.body.decode()))


def _s3_operation(call: Call) -> str:
    """Name of an operation of S3, as far as this project uses them, with the bucket in the path."""
    has_key = bool(call.path.strip("/").partition("/")[2])
    if "uploadId" in call.query:
        by_method = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
        return by_method.get(call.method, "ListParts")
    if "uploads" in call.query:
        return "CreateMultipartUpload" if call.method == "POST" else "ListMultipartUploads"
    if has_key:
        return {"PUT": "PutObject", "DELETE": "DeleteObject", "HEAD": "HeadObject"}.get(call.method, "GetObject")
    return {"PUT": "CreateBucket", "DELETE": "DeleteBucket", "HEAD": "HeadBucket"}.get(call.method, "ListObjectsV2")
