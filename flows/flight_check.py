"""A clip of five seconds through both pools, after a look at everything that a job needs: does the installation work?

Purpose: a schedule, and by hand after every change of the installation.
Cache policy: none; the clip is made and upscaled anew each time.
Blocks: pools, media store and job ledger, as the options name them.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger
from pydantic import Field

from blocks.pools import load_pools
from flows.doctor import Check, examine
from flows.parameters import Form, LedgerName, ModelName, PoolsName, Scratch, StoreName, UpscaleOptions
from flows.stopping import RunStopped, stopped_by
from flows.upscale_video import upscale_video
from infra.pools import PooledCluster
from tasks.errors import FlightCheckError, SuperResolutionError
from tasks.media.sample import FRAMES, write_sample
from tasks.request import DEFAULT_MODEL, scratch_folder

#: Seconds of video per chunk: two chunks, so that stages run side by side.
_CHUNK_SECONDS: Final = 2.5


class FlightCheckOptions(Form):
    """What is checked."""

    pools: PoolsName = "local"
    model: ModelName = Field(DEFAULT_MODEL, title="Model", description="That upscales the clip.")
    readable: list[str] = Field([], title="Readable", description="s3:// URIs of videos that must be readable.")
    writable: list[str] = Field([], title="Writable", description="s3:// prefixes that results must go to.")
    minutes: float = Field(
        30.0,
        gt=0,
        title="Minutes",
        description="After which the check fails: jobs may have to wait for nodes, but not for ever.",
    )
    scratch: Scratch = ""
    store: StoreName = ""
    ledger: LedgerName = ""


@flow(name="flight-check", flow_run_name="{options.pools}", validate_parameters=True)
def flight_check(options: FlightCheckOptions = FlightCheckOptions()) -> dict[str, Any]:  # noqa: B008
    """Check that the installation upscales.

    Args:
        options: What is checked.

    Returns:
        What was looked at, and what the clip took.

    Raises:
        FlightCheckError: Something is broken; the message names each broken part and its remedy.
    """
    checks = examine(options.readable, options.writable, options.pools, options.scratch, options.store, options.ledger)
    if all(check.good for check in checks):
        checks.append(_upscaled(options))
    create_table_artifact(
        [asdict(check) for check in checks], key="flight-check", description=f"Can {options.pools} upscale?"
    )
    broken = [check for check in checks if not check.good]
    if broken:
        said = "; ".join(f"{check.name}: {check.said}" for check in broken)
        remedies = "; ".join(dict.fromkeys(check.remedy for check in broken if check.remedy))
        raise FlightCheckError(said, remedies or None)
    for check in checks:
        get_run_logger().info("%s: %s", check.name, check.said)
    return {"status": "good", "checks": [asdict(check) for check in checks]}


def _upscaled(options: FlightCheckOptions) -> Check:
    """The clip, through both pools; verified as any result is."""
    began = time.monotonic()

    def check(good: bool, said: str, remedy: str = "") -> Check:
        return Check("clip", good, said, remedy, round(time.monotonic() - began, 2))

    try:
        pools = load_pools(options.pools)
        scratch = scratch_folder(options.scratch or pools.scratch_directory or None)
        with _folder_in(scratch) as folder, pools.open(warm=False) as cluster:
            clip = folder / "clip.mp4"
            write_sample(clip)
            upscale = UpscaleOptions(
                model=options.model,
                chunk_seconds=_CHUNK_SECONDS,
                pools=options.pools,
                scratch=str(folder),
                store=options.store,
                ledger=options.ledger,
                owner="flight-check",
            )
            with _at_most(60 * options.minutes, lambda: _held_up(cluster)) as held_up:
                try:
                    result = upscale_video(str(clip), str(folder / "result.mp4"), upscale)
                except RunStopped:
                    waits = [f"not upscaled after {options.minutes:g} minutes", *held_up]
                    return check(False, "; ".join(waits), "Look at its queue and the logs of its workers")
    except SuperResolutionError as error:
        return check(False, f"{error.kind}: {error.problem}", error.remedy or "")
    except OSError as error:
        return check(False, f"scratch: {error}", "Look at the file system of scratch")
    assert result["frames_out"] == FRAMES
    return check(True, f"{FRAMES} frames upscaled and verified in {result['seconds']:.1f} s")


@contextmanager
def _folder_in(scratch: Path) -> Iterator[Path]:
    """A folder that all workers see and that is gone afterwards."""
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="flight-check-", dir=scratch))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _at_most(seconds: float, look: Callable[[], str]) -> Iterator[list[str]]:
    """End the runs of the block when that time is over; gives what was to be seen at that moment, before they ended."""
    stop = threading.Event()
    seen: list[str] = []

    def end() -> None:
        try:
            seen.append(look())
        finally:
            stop.set()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        with stopped_by(stop):
            yield seen
    finally:
        timer.cancel()


def _held_up(cluster: PooledCluster) -> str:
    """Which pool has no worker that works, for people."""
    pools = cluster.snapshot()["pools"]
    # A pool that nothing is asked of needs no workers, unless nothing was asked of any yet.
    asked = {name: facts for name, facts in pools.items() if facts["waiting"] or facts["workers"]} or pools
    missing = [
        f"{name} ({', '.join(worker['state'] for worker in facts['workers']) or 'nothing'})"
        for name, facts in asked.items()
        if not any(each["state"] == "ready" for each in facts["workers"])
    ]
    return f"no worker is up in pool {', '.join(missing)}" if missing else "its workers are up, and slow"
