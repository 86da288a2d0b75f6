"""`make ui`: a Prefect server, the deployments and a worker on this machine, until Ctrl-C.

    python -m deployments.local_ui [--port 4200]

The server listens on 127.0.0.1 only and keeps its data where `superres` keeps it, so runs of the command line show too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parent.parent
WORK_POOL: Final = "local"
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
    os.environ.update(
        PREFECT_API_URL=f"{address}/api",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        SUPERRES_HOME_CHECKOUT=str(CHECKOUT),
        PYTHONPATH=str(CHECKOUT),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ends everything in order, as Ctrl-C does.
    running: list[subprocess.Popen[bytes]] = []
    try:
        running.append(_prefect("server", "start", "--host", "127.0.0.1", "--port", str(port)))
        _wait_for(f"{address}/api/health", running[0])
        for command in (
            ("work-pool", "create", WORK_POOL, "--type", "process", "--overwrite"),
            ("--no-prompt", "deploy", "--all"),
        ):
            if _prefect(*command).wait() != 0:
                print(f"prefect {' '.join(command)} failed", file=sys.stderr)
                return 1
        running.append(_prefect("worker", "start", "--pool", WORK_POOL))
        print(f"\nPrefect UI: {address}    (Ctrl-C ends it)\n", flush=True)
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
        print("a part of the installation ended by itself; see the output above", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


def _prefect(*arguments: str) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches this program first, which then ends the parts in order.
    command = [sys.executable, "-m", "prefect", *arguments]
    return subprocess.Popen(command, cwd=CHECKOUT, start_new_session=True)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _SERVER_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TimeoutError(f"the Prefect server did not answer at {url}")


if __name__ == "__main__":
    sys.exit(main())
