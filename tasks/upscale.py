"""Upscale: run the model over one chunk file, the only stage that belongs on a GPU.

Reading and checking the next frames, inference, and checking and writing the last ones overlap through two bounded
queues, so the device waits for neither and memory stays at a few batches. The model is loaded once per worker process
and shared by all its chunks. The next chunk is opened and its first frames are read while the last one computes; it
goes on with the device at once when the last frame of that one is through.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks import device
from tasks.chunk_report import StageReport
from tasks.chunks import Chunk
from tasks.errors import FrameError, ModelError
from tasks.failures import at
from tasks.media.chunk_file import ChunkReader, ChunkWriter, is_valid
from tasks.media.fidelity import fidelity
from tasks.media.pixels import PictureFormat
from tasks.models.cards import find_model
from tasks.models.weights import content_hash
from tasks.plan import Plan, load_plan

if TYPE_CHECKING:  # Flows and workers that extract and encode know this task too, and can do without torch.
    from tasks.models.engine import Engine, Work

#: Batches that may wait for the disk before inference waits for it.
_WRITES_PENDING = 2


@task(name="upscale", task_run_name="upscale {label}", tags={"pool:gpu"}, cache_policy=NO_CACHE)
def upscale(plan: str, index: int, label: str) -> StageReport:
    """Make the upscaled chunk file of chunk `index` of the plan at path `plan`."""
    loaded = load_plan(Path(plan))
    with at("upscale", chunk := loaded.chunks[index]):
        return upscale_chunk(loaded, chunk)


def upscale_chunk(plan: Plan, chunk: Chunk) -> StageReport:
    """Upscale the frames of a chunk and remove its extracted file.

    Returns:
        A report whose time begins when the device is free for this chunk, and ends with its last result.

    Raises:
        ChunkFileError: The extracted file is missing or damaged.
        FrameError: The model gave another number of frames.
    """
    from tasks.models.engine import Work

    started = time.time()
    path = plan.upscaled(chunk)
    if plan.encoded(chunk).exists() or is_valid(path, plan.target, chunk.frames):
        plan.extracted(chunk).unlink(missing_ok=True)
        return StageReport.reused("upscale", chunk.index)
    reader = ChunkReader(plan.extracted(chunk))
    with shared_engine.use(EngineKey.of(plan)) as engine:
        work, look = Work(), _Look(reader, plan.target)
        with ChunkWriter(path, plan.target) as writer:
            began, ended = run_engine(engine, reader, writer, chunk.first, work, look)
            if len(writer) != chunk.frames:
                frame = chunk.first + len(writer)
                raise FrameError(
                    f"frame {frame} was not upscaled ({len(writer)} of {chunk.frames} frames)", frame=frame
                )
        description = asdict(engine.description)
    plan.extracted(chunk).unlink(missing_ok=True)
    started = shared_engine.own_begin(started, began, ended)
    return StageReport(
        "upscale",
        chunk.index,
        started,
        ended - started,
        engine=description,
        bytes=path.stat().st_size,
        kept=work.kept,
        fidelity=look.fidelity,
        device_seconds=ended - max(started, began),
    )


def run_engine(
    engine: Engine,
    reader: ChunkReader,
    writer: ChunkWriter,
    first_frame: int,
    work: Work | None = None,
    look: _Look | None = None,
) -> tuple[float, float]:
    """Pass all frames of `reader` through `engine` into `writer`, with reading and writing in threads of their own.

    What is looked at is looked at where results are written, so the device does not wait for that either.

    Returns:
        When the device began, and when its last result came out.
    """
    written: deque[Future[None]] = deque()

    def write(frames: NDArray[np.uint8]) -> None:
        position = len(writer)
        writer.write(frames)
        if look is not None:
            look.at(position, frames)

    with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:
        feed = _Feed(reader, engine.feed, reading)
        for frames in engine.stream(feed, first_frame, work):
            feed.came_out(len(frames))
            written.append(writing.submit(write, frames))
            if len(written) > _WRITES_PENDING:
                written.popleft().result()
        for pending in written:
            pending.result()
    return feed.began, feed.ended


class _Look:
    """A look at one frame of a chunk, the middle one: how faithful its enlargement is.

    Args:
        reader: Of the extracted chunk.
        target: Format of the results.

    Attributes:
        fidelity: See `tasks.media.fidelity`; `None` before that frame has come out.
    """

    def __init__(self, reader: ChunkReader, target: PictureFormat) -> None:
        self.fidelity: float | None = None
        self._reader, self._target, self._frame = reader, target, len(reader) // 2

    def at(self, position: int, frames: NDArray[np.uint8]) -> None:
        """See results, `uint8[n, target.frame_bytes]`, the first of them at `position` of the chunk."""
        if position <= self._frame < position + len(frames):
            (source,) = next(self._reader.batches(1, self._frame, self._frame + 1))
            upscaled = frames[self._frame - position]
            self.fidelity = round(fidelity(source, self._reader.picture, upscaled, self._target), 2)


class _Feed:
    """The frames of a chunk, read a batch ahead from the start on, and what the pool is told about their progress.

    Attributes:
        began: When the device asked for the first of them.
        ended: When the last result came out.
    """

    def __init__(self, reader: ChunkReader, size: int, reading: ThreadPoolExecutor) -> None:
        self.began = self.ended = 0.0
        self._all, self._given, self._done = len(reader), 0, 0
        self._batches = reader.batches(size)
        self._reading = reading
        self._is_leaving = False
        self._ahead = self._read()

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        self.began = time.time()
        device.tell("taken")
        while (frames := self._ahead.result()) is not None:
            self._ahead = self._read()
            self._given += len(frames)
            if self._given == self._all:
                self._leave()
            yield frames

    def came_out(self, frames: int) -> None:
        """Count results."""
        self.ended = time.time()
        self._done += frames
        expected = (self._all - self._done) * (self.ended - self.began) / self._done
        # Not in the first half: what a few frames took tells little, and the next chunk would be bound to this worker.
        if 2 * self._done >= self._all and expected < device.LEAVING_SECONDS:
            self._leave()

    def _read(self) -> Future[NDArray[np.uint8] | None]:
        return self._reading.submit(next, self._batches, None)

    def _leave(self) -> None:
        if not self._is_leaving:
            self._is_leaving = True
            device.tell("leaving")


class EngineKey(NamedTuple):
    """What makes one engine another one."""

    model: str
    model_hash: str
    source: PictureFormat
    target: PictureFormat
    precision: str
    quantised: Path | None
    tolerance: int

    @classmethod
    def of(cls, plan: Plan) -> EngineKey:
        """That of a job."""
        return cls(
            plan.model,
            plan.model_hash,
            plan.facts.picture,
            plan.target,
            plan.precision,
            plan.quantised,
            plan.request.tolerance,
        )

    def build(self) -> Engine:
        """The engine.

        Raises:
            ModelError: The weights on this node are not those the job was planned with.
        """
        from tasks.models.engine import Engine
        from tasks.models.quantisation import Quantised

        card = find_model(self.model)
        if content_hash(card) != self.model_hash:
            raise ModelError(
                f"the weights of {self.model} on this node differ from those of the plan",
                "Use one model folder for all nodes",
            )
        quantised = Quantised.load(self.quantised) if self.quantised else None
        return Engine(
            card, self.source, self.target, precision=self.precision, quantised=quantised, tolerance=self.tolerance
        )


class SharedEngine:
    """The one engine of this worker process; another model, picture size or precision replaces it.

    Whoever asks for another one waits until nobody uses this one: two would not fit into a device's memory.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._key: EngineKey | None = None
        self._users = 0
        self._left = 0.0
        self._queue = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def use(self, key: EngineKey) -> Iterator[Engine]:
        """The engine of this key for the time of a block.

        Raises:
            ModelError: The weights on this node are not those the job was planned with.
        """
        with self._queue, self._changed:  # Who comes later waits behind who waits, or that one might wait for ever.
            if key != self._key:
                self._changed.wait_for(lambda: not self._users)
                self._engine = self._key = None  # Its memory is needed.
                self._engine = key.build()
                self._key = key
            engine = self._engine
            assert engine is not None
            self._users += 1
        try:
            yield engine
        finally:
            del engine
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def own_begin(self, started: float, began: float, ended: float) -> float:
        """When the time of a chunk begins that belongs to it alone.

        Args:
            started: When its task began.
            began: When the device did.
            ended: When the last result came out.
        """
        with self._changed:
            before, self._left = self._left, ended
        return started if before <= started else max(before, began)


#: That of this process.
shared_engine: Final = SharedEngine()
