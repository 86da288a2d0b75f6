"""Peak memory of a whole job, by length of the video: it must not grow.

    python tests/benchmarks/memory.py [--seconds 10 120] [--size 320x180] [--json]

All jobs run on pools that are already warm. Measured is the resident memory of this process and all its children
(workers, server, ffmpeg), added up twenty times a second; memory that processes share counts once for each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ffmpeg as ffmpeg_python
import psutil

from tasks.media import ffmpeg

#: Seconds of the job that fills caches and loads the model before anything is measured.
_WARM_UP_SECONDS = 8


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """Watches the resident memory of this process and all its children while the block runs.

    Attributes:
        bytes: The most seen so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(0.05):
            self.bytes = max(self.bytes, sum(map(_resident, (this, *this.children(recursive=True)))))


def _resident(process: psutil.Process) -> int:
    """Bytes of a process; none for one that was just forked and still lives in the memory of its parent.

    A child that starts ffmpeg shares every page with its parent until it runs ffmpeg: counted, a worker would show
    twice. Such a child still has the command line of its parent.
    """
    try:
        parent = process.parent()
        if parent is not None and parent.cmdline() == process.cmdline():
            return 0
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def write_slides(path: Path, seconds: int, size: str = "320x180") -> Path:
    """Write a lossless clip whose picture changes once a second: every frame is handled, few cost inference."""
    slides = ffmpeg_python.input(f"testsrc2=s={size}:r=1:d={seconds + 1}", format="lavfi").filter("fps", "24000/1001")
    output = ffmpeg_python.output(
        slides, ffmpeg.file_argument(path), pix_fmt="yuv420p", **{"frames:v": 24 * seconds, "c:v": "ffv1"}
    )
    ffmpeg.run(output.get_args())
    return path


def measure(lengths: list[int], size: str) -> list[dict[str, Any]]:
    """Peak memory of one job per length, in seconds."""
    from flows.parameters import UpscaleOptions
    from flows.upscale_video import upscale_video
    from infra.pools import local_pools, open_pools
    from infra.prefect_server import ensure_api

    rows = []
    with tempfile.TemporaryDirectory() as folder, ensure_api(), open_pools(local_pools()):
        options = UpscaleOptions(scratch=str(Path(folder) / "scratch"))
        for number, seconds in enumerate((_WARM_UP_SECONDS, *lengths)):
            clip = write_slides(Path(folder) / f"{number}.mkv", seconds, size)
            with PeakMemory() as memory:
                result = upscale_video(str(clip), str(Path(folder) / f"{number}.mp4"), options)
            if number:
                rows.append({"seconds": seconds, "frames": result["frames_out"], "peak_bytes": memory.bytes})
    return rows


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 120], help="lengths to compare")
    parser.add_argument("--size", default="320x180", help="size of the picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = measure(arguments.seconds, arguments.size)
    if arguments.json:
        print(json.dumps({"size": arguments.size, "jobs": rows}))
        return
    for row in rows:
        print(f"{row['seconds']:5d} s  {row['frames']:6d} frames  peak {row['peak_bytes'] / 1e6:6.0f} MB")
    growth = rows[-1]["peak_bytes"] - rows[0]["peak_bytes"]
    print(f"the longest took {growth / 1e6:+.0f} MB more than the shortest")


if __name__ == "__main__":
    main()
