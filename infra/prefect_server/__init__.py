"""The Prefect API of runs on one machine: the configured one, or a private server that lives as long as the run.

    with ensure_api():
        upscale_video("film.mkv")

Where `PREFECT_API_URL` (environment, profile or `prefect.toml`) names a server, that one is used. Otherwise a private
server starts on a free port of 127.0.0.1, with a password of its own, no user interface and only the services that
record task runs. Its history stays in `$SUPERRES_HOME/prefect` (default `~/.local/share/media-super-resolution`). It
ends with the `with` block, and by itself when this process is killed.

This module imports Prefect only when it waits for the server, so that a program can start the server first, load
everything else meanwhile, and wait last:

    api = ensure_api().start()
    import torch
    with api:
        ...
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final

from tasks.errors import SuperResolutionError
from tasks.home import default_home

logger = logging.getLogger(__name__)

#: Seconds a private server may take to start. Its first start on a slow, busy machine has been seen to take 45.
START_TIMEOUT: Final = 180.0

#: Seconds a configured server may take to answer.
ANSWER_TIMEOUT: Final = 15.0

#: Seconds a private server gets to write down what it has received.
STOP_TIMEOUT: Final = 5.0


class ApiError(SuperResolutionError):
    """The Prefect API does not answer or could not be started."""

    kind = "api"
    exit_code = 12


class Api(AbstractContextManager["Api"]):
    """A Prefect API: configured or private. Made by `ensure_api()`.

    Attributes:
        url: Its address, known once started; ends with `/api`.
        private: Whether it is a private server that ends with this object.
    """

    def __init__(self, *, home: Path, ui: bool, timeout: float, host: str) -> None:
        self.url: str | None = None
        self.private = False
        self._home = home
        self._host = host
        self._ui = ui
        self._timeout = timeout
        self._password = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: int | None = None
        self._settings = ExitStack()
        self._entered = False

    def start(self) -> Api:
        """Start a private server where none is configured; return at once."""
        if self.url is None:
            self.url = configured_url()
            if self.url is None:
                self._launch()
        return self

    def wait(self) -> str:
        """Wait until the API answers.

        Returns:
            Its address.

        Raises:
            ApiError: It does not answer, or the private server ended instead of starting.
        """
        self.start()
        assert self.url is not None
        if self._process is None:
            _check_answers(self.url)
        elif self._ready is not None:
            self._await_ready(self._process, self._ready)
            os.close(self._ready)
            self._ready = None
        return self.url

    def stop(self) -> None:
        """End the private server; nothing happens to a configured one. Safe to call twice."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if self._ready is not None:
            os.close(self._ready)
            self._ready = None
            process.kill()  # Nothing was ever told to it.
        assert process.stdin is not None
        process.stdin.close()  # What the server takes as the end of its user.
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.url = None

    def __enter__(self) -> Api:
        self.start()
        try:
            self.wait()
            if self.private and "prefect.events.worker" in sys.modules:
                _send_rest()  # Of this process to another server: what sends events and logs remembers where to.
            self._use()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.private:
            _send_rest()
        self._settings.close()
        self.stop()

    def _launch(self) -> None:
        self.private = True
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._password = f"superres:{secrets.token_urlsafe(24)}"
        # Bound here, so that the address is known at once and nobody else can take the port meanwhile.
        listener = socket.socket()
        listener.bind((self._host, 0))
        listener.listen(128)
        self.url = f"http://{self._host}:{listener.getsockname()[1]}/api"
        self._ready, ready = os.pipe()
        settings = {
            "home": str(self._home),
            "listener": listener.fileno(),
            "ready": ready,
            "ui": self._ui,
            "password": self._password,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("process.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=(self._home / "server.log").open("ab"),
                pass_fds=(listener.fileno(), ready),
                env=environment,
                # Outside of the terminal's foreground group: Ctrl-C is for the run, which then ends the server.
                start_new_session=True,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(settings).encode() + b"\n")
            self._process.stdin.flush()
        finally:
            listener.close()
            os.close(ready)

    def _await_ready(self, process: subprocess.Popen[bytes], ready: int) -> None:
        readable, _, _ = select.select([ready], [], [], self._timeout)
        if readable and os.read(ready, 1):
            return
        log = self._home / "server.log"
        self.stop()
        took = "ended while starting" if readable else f"did not start within {self._timeout:.0f} s"
        raise ApiError(f"the private Prefect server {took}", f"Look at {log}, or set PREFECT_API_URL")

    def _use(self) -> None:
        """Make this process, and with the settings of each task also the workers, talk to the private server."""
        if not self.private:
            return
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL, temporary_settings

        assert self.url is not None
        self._settings.enter_context(
            temporary_settings(
                updates={PREFECT_API_URL: self.url, PREFECT_API_AUTH_STRING: self._password},
                restore_defaults={PREFECT_API_KEY},
            )
        )
        for name, value in (("PREFECT_API_URL", self.url), ("PREFECT_API_AUTH_STRING", self._password)):
            previous = os.environ.get(name)
            os.environ[name] = value  # For processes that this one starts.
            self._settings.callback(_restore, name, previous)


def ensure_api(
    *, home: Path | str | None = None, ui: bool = False, timeout: float = START_TIMEOUT, host: str = "127.0.0.1"
) -> Api:
    """The Prefect API to use in a `with` block.

    Args:
        home: Folder of the private server's database and log; `$SUPERRES_HOME/prefect` by default.
        ui: Serve Prefect's user interface on the private server too.
        timeout: Seconds the private server may take to start.
        host: Address the private server listens on; workers on other machines need more than this one. Its password
            travels unencrypted, so for more than a private network configure a server of your own.
    """
    return Api(home=Path(home) if home else default_home() / "prefect", ui=ui, timeout=timeout, host=host)


def configured_url() -> str | None:
    """The API address that Prefect's settings name, read without importing Prefect (which takes seconds).

    The order is Prefect's: environment, `prefect.toml` and `pyproject.toml` here, the active profile.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    for file, path in (("prefect.toml", ("api",)), ("pyproject.toml", ("tool", "prefect", "api"))):
        table: Any = _toml(Path(file))
        for key in path:
            table = table.get(key, {})
        if url := table.get("url"):
            return str(url)
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    profiles = _toml(Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml"))
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    url = profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")
    return str(url) if url else None


def _send_rest() -> None:
    """Send the last events and log lines of this process: once the server is gone they could only complain."""
    from prefect.events.worker import EventsWorker

    def send() -> None:
        EventsWorker.drain_all(timeout=STOP_TIMEOUT, at_exit=False)  # All queued services, logs included, share a list.

    # In a thread of its own: beside a running event loop, as in a notebook, it would return something to await instead.
    thread = threading.Thread(target=send, name="send-rest")
    thread.start()
    thread.join()


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return {}


def _check_answers(url: str) -> None:
    deadline = time.monotonic() + ANSWER_TIMEOUT
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # It answers; whether it lets us in is between Prefect's client and it.
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ApiError(
                    f"the Prefect API at {url} does not answer ({error})",
                    "Start it, correct PREFECT_API_URL, or unset it to use a private server",
                ) from error
        time.sleep(0.5)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
