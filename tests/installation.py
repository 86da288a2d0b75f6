"""An installation as an operator has it: `make ui` on an empty machine, for tests and for the pictures of the docs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests.ports import free_port
from tests.waiting import eventually

CHECKOUT: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Installation:
    """A server, a worker and all that is registered.

    Attributes:
        address: Of the UI.
        home: What outlives its runs.
        scratch: Where chunk files live.
        log: What was printed.
    """

    address: str
    home: Path
    scratch: Path
    log: Path

    @property
    def api(self) -> str:
        return f"{self.address}/api"

    def ask(self, path: str, **body: Any) -> Any:
        """Ask the API for a list, as the UI does."""
        return httpx.post(f"{self.api}{path}", json=body, timeout=30).raise_for_status().json()

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """The runs of a flow, those that are scheduled among them."""
        found: list[dict[str, Any]] = self.ask("/flow_runs/filter", flows={"name": {"any_": [flow]}})
        return found

    def state(self, run: str) -> str:
        """The type of a flow run's state."""
        found: str = httpx.get(f"{self.api}/flow_runs/{run}", timeout=30).raise_for_status().json()["state_type"]
        return found

    def deployment(self, flow: str) -> str:
        """The id of a flow's deployment."""
        found: str = httpx.get(f"{self.api}/deployments/name/{flow}/local", timeout=30).raise_for_status().json()["id"]
        return found


@contextmanager
def running_installation(folder: Path, **environment: str) -> Iterator[Installation]:
    """Run `make ui` with a home of its own while the block runs.

    Args:
        folder: An empty folder for everything.
        environment: More variables, such as shorter intervals.
    """
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SUPERRES_"))}
    place = Installation(f"http://127.0.0.1:{port}", folder / "home", folder / "scratch", folder / "ui.log")
    variables = {"SUPERRES_HOME": str(place.home), "SUPERRES_SCRATCH": str(place.scratch)}
    with place.log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.local_ui", "--port", str(port)],
            cwd=CHECKOUT,
            env={**kept, "PYTHONPATH": str(CHECKOUT), **variables, **environment},
            stdout=output,
            stderr=output,
        )

    def is_up() -> bool:
        assert process.poll() is None, place.log.read_text()
        return f"Prefect UI    {place.address}" in place.log.read_text()

    try:
        eventually(is_up, 300)
        yield place
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)
