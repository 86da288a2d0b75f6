"""`make ui`: a Prefect server, everything registered with it, and a worker on this machine, until Ctrl-C.

    python -m deployments.local_ui [--port 4200]

The server listens on 127.0.0.1 only. It uses the database of the command line, so what `superres` runs shows too;
`PREFECT_SERVER_DATABASE_CONNECTION_URL` names another one, such as a PostgreSQL.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Final

from infra.prefect_server.process import database_of, prepare_database
from tasks.errors import SuperResolutionError
from tasks.home import default_home

CHECKOUT: Final = Path(__file__).resolve().parent.parent
_SERVER_SECONDS: Final = 120.0


def main() -> int:
    """Start everything, wait, end everything.

    Returns:
        0 after Ctrl-C, 1 if a part could not start or ended by itself.
    """
    parser = argparse.ArgumentParser(prog="python -m deployments.local_ui")
    parser.add_argument("--port", type=int, default=4200)
    port = parser.parse_args().port
    address = f"http://127.0.0.1:{port}"
    if _is_taken(port):
        print(f"something listens on port {port} already; end it, or choose another with --port", file=sys.stderr)
        return 1
    home = default_home() / "prefect"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in os.environ:
        prepare_database(home, database := database_of(home))
        os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{database}"
    os.environ.update(
        PREFECT_HOME=str(home),  # Not a profile that names another server.
        PREFECT_API_URL=f"{address}/api",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
        SUPERRES_CHECKOUT=str(CHECKOUT),
        PYTHONPATH=str(CHECKOUT),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ends everything in order, as Ctrl-C does.
    running: list[subprocess.Popen[bytes]] = []
    log = home / "ui-server.log"
    try:
        with log.open("ab") as output:
            place = ("--host", "127.0.0.1", "--port", str(port))
            running.append(_start("infra.prefect_server", "start", *place, output=output))
        print("starting the server", flush=True)
        _wait_for(f"{address}/api/health", running[0], log)
        print("registering work pool, blocks and deployments", flush=True)
        from deployments.bootstrap import bootstrap  # Here: it loads Prefect, whose settings are made above.

        installed = bootstrap(("local",))
        running.append(_start("prefect", "worker", "start", "--pool", "local"))
        print(f"\nPrefect UI    {address}")
        print(f"deployments   {', '.join(installed.deployments)}")
        print(f"from a shell  PREFECT_API_URL={address}/api    (Ctrl-C ends it)\n", flush=True)
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
        print(f"a part of the installation ended by itself; see the output above, and {log}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    except (SuperResolutionError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        # The worker first: it ends its runs, which tell the server how they ended.
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _start(module: str, *arguments: str, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches this program first, which then ends the parts in order.
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=CHECKOUT, start_new_session=True, stdout=output, stderr=output)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _SERVER_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TimeoutError(f"the Prefect server did not answer at {url}; see {log}")


if __name__ == "__main__":
    sys.exit(main())
