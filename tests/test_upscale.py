"""Upscaling in one process: chunks that follow one another without a pause, and the engine they share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import device
from tasks.chunk_report import StageReport
from tasks.errors import ChunkFileError, ModelError
from tasks.extract import extract_chunk
from tasks.media.chunk_file import ChunkReader
from tasks.models.cards import find_model
from tasks.models.weights import content_hash
from tasks.plan import Plan, make_plan
from tasks.request import UpscaleRequest, check_request
from tasks.upscale import EngineKey, SharedEngine, _Feed, shared_engine, upscale_chunk
from tests.flows.jobs import make_film
from tests.waiting import eventually


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("film") / "film.mp4", 96, "64x48", sound=())


def job(film: Path, folder: Path, **settings: Any) -> Plan:
    """A plan of four chunks whose frames are extracted."""
    folder.mkdir()
    request = UpscaleRequest(
        str(film), str(folder / "out.mp4"), scale=2, chunk_seconds=1.0, scratch=str(folder), **settings
    )
    checked = check_request(request)
    plan = make_plan(checked, content_hash(find_model(checked.card.name)))
    plan.folder.mkdir(parents=True)
    assert len(plan.chunks) == 4
    for chunk in plan.chunks:
        extract_chunk(plan, chunk)
    return plan


@pytest.fixture
def plan(film: Path, tmp_path: Path) -> Plan:
    return job(film, tmp_path / "scratch")


class Sayings:
    """What tasks say about the device, in order."""

    def __init__(self) -> None:
        self.words: list[tuple[int, str]] = []
        self.changed = threading.Condition()

    def of(self, index: int) -> Callable[[device.Word], None]:
        def listen(word: device.Word) -> None:
            with self.changed:
                self.words.append((index, word))
                self.changed.notify_all()

        return listen

    def wait_for(self, index: int, word: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: (index, word) in self.words, 60)


def run_as_pool(plan: Plan, sayings: Sayings) -> list[StageReport]:
    """Upscale all chunks, each as soon as the one before says that it is leaving."""

    def run(index: int) -> StageReport:
        with device.listening(sayings.of(index)):
            return upscale_chunk(plan, plan.chunks[index])

    with ThreadPoolExecutor(2) as pool:
        futures = []
        for index in range(len(plan.chunks)):
            futures.append(pool.submit(run, index))
            sayings.wait_for(index, "leaving")
        return [future.result() for future in futures]


def test_chunks_that_follow_one_another_equal_those_by_themselves(film: Path, plan: Plan, tmp_path: Path) -> None:
    sayings = Sayings()
    reports = run_as_pool(plan, sayings)
    assert sayings.words == [(index, word) for index in range(4) for word in ("taken", "leaving")]
    for before, after in pairwise(reports):
        assert before.started + before.seconds <= after.started + 1e-6
    alone = job(film, tmp_path / "alone")
    for chunk in alone.chunks:
        upscale_chunk(alone, chunk)
        assert alone.upscaled(chunk).read_bytes() == plan.upscaled(chunk).read_bytes()


def test_a_chunk_reads_its_first_frames_before_the_device_is_free(plan: Plan) -> None:
    with shared_engine.use(EngineKey.of(plan)) as engine:
        frames = next(ChunkReader(plan.extracted(plan.chunks[0])).batches(24))
        stream = engine.stream([frame[None] for frame in frames])
        next(stream)
        second, third = plan.chunks[1:3]
        with ThreadPoolExecutor(1) as pool:
            report = pool.submit(upscale_chunk, plan, second)
            eventually_reads(plan.extracted(second))
            assert not plan.upscaled(second).exists()
            stream.close()
            assert report.result(60).chunk == 1
    plan.extracted(third).write_bytes(b"damaged")
    with pytest.raises(ChunkFileError):
        upscale_chunk(plan, third)


def eventually_reads(path: Path) -> None:
    """Wait until this process has opened a file and read from it."""

    def reads() -> bool:
        for entry in Path("/proc/self/fd").iterdir():
            try:
                if entry.readlink() == path:
                    text = Path(f"/proc/self/fdinfo/{entry.name}").read_text()
                    return int(text.split("pos:")[1].split()[0]) > 0
            except OSError:
                continue
        return False

    eventually(reads)


@pytest.mark.parametrize(("seconds", "given"), [(1e9, 12), (0.0, 24)])
def test_a_chunk_says_that_it_leaves_when_little_is_left_but_not_in_its_first_half(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, seconds: float, given: int
) -> None:
    monkeypatch.setattr(device, "LEAVING_SECONDS", seconds)
    sayings = Sayings()
    with ThreadPoolExecutor(1) as reading, device.listening(sayings.of(0)):
        feed = _Feed(ChunkReader(plan.extracted(plan.chunks[0])), 1, reading)
        for number, _ in enumerate(feed, 1):
            assert ((0, "leaving") in sayings.words) == (number > given or number == 24)
            feed.came_out(1)
    assert sayings.words == [(0, "taken"), (0, "leaving")]


def test_a_chunk_that_fails_leaves_the_next_one_alone(plan: Plan) -> None:
    path = plan.extracted(plan.chunks[0])
    content = bytearray(path.read_bytes())
    content[20 * plan.facts.picture.frame_bytes] ^= 255
    path.write_bytes(content)
    with ThreadPoolExecutor(2) as pool:
        failing, following = (pool.submit(upscale_chunk, plan, plan.chunks[index]) for index in (0, 1))
        with pytest.raises(ChunkFileError, match="frame 20"):
            failing.result(60)
        assert following.result(60).chunk == 1


@pytest.fixture
def keys(film: Path, tmp_path: Path) -> Iterator[tuple[EngineKey, EngineKey]]:
    one = EngineKey.of(job(film, tmp_path / "one"))
    yield one, one._replace(tolerance=3)


def test_threads_share_one_engine(keys: tuple[EngineKey, EngineKey]) -> None:
    shared, together = SharedEngine(), threading.Barrier(4)

    def use() -> int:
        together.wait()
        with shared.use(keys[0]) as engine:
            together.wait()
            return id(engine)

    with ThreadPoolExecutor(4) as pool:
        assert len({future.result(60) for future in [pool.submit(use) for _ in range(4)]}) == 1


def test_another_engine_waits_until_nobody_uses_this_one(keys: tuple[EngineKey, EngineKey]) -> None:
    shared, got = SharedEngine(), threading.Event()

    def use() -> int:
        with shared.use(keys[1]) as engine:
            got.set()
            return engine._tolerance

    with ThreadPoolExecutor(1) as pool:
        with shared.use(keys[0]) as engine:
            other = pool.submit(use)
            assert not got.wait(0.3)
            assert engine._tolerance == 0
        assert other.result(60) == 3


def test_an_engine_that_cannot_be_made_does_not_stop_others(keys: tuple[EngineKey, EngineKey]) -> None:
    shared = SharedEngine()
    with pytest.raises(ModelError, match="differ"), shared.use(keys[0]._replace(model_hash="0" * 64)):
        pass
    with shared.use(keys[0]) as engine, shared.use(keys[0]) as same:
        assert engine is same


def test_each_chunk_says_how_faithful_its_middle_frame_is(plan: Plan) -> None:
    for chunk in plan.chunks:
        source = next(ChunkReader(plan.extracted(chunk)).batches(chunk.frames))[chunk.frames // 2]
        report = upscale_chunk(plan, chunk)
        result = next(ChunkReader(plan.upscaled(chunk)).batches(chunk.frames))[chunk.frames // 2]
        before = source[: 64 * 48].reshape(48, 64).astype(float)
        after = result[: 128 * 96].reshape(48, 2, 64, 2).astype(float).mean((1, 3))
        assert report.fidelity == pytest.approx(10 * np.log10(255**2 / ((after - before) ** 2).mean()), abs=0.01)
        assert 20 < report.fidelity < 60
        assert upscale_chunk(plan, chunk).fidelity is None  # Nothing was done.
