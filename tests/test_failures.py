"""Where an error happened travels with it, from the worker to the record."""

from __future__ import annotations

import pickle

import pytest

from tasks.chunks import Chunk
from tasks.errors import ChunkFileError, FrameError, LibraryError, PoolError, SuperResolutionError
from tasks.failures import Scene, at, scene_of
from tasks.place import this_place
from tasks.track import describe

CHUNK = Chunk(3, 48, 71)


def _raised(error: Exception) -> Exception:
    with pytest.raises(type(error)) as caught, at("upscale", CHUNK):
        raise error
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        FrameError("frame 50 is not finite", "Try fp32", frame=50),
        ChunkFileError("damaged"),
        LibraryError("2 failed", []),
        ValueError("anything"),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_it_survives_the_journey_from_the_worker(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(_raised(error)))
    assert scene_of(arrived) == Scene("upscale", 48, 71, this_place())
    assert (type(arrived), str(arrived)) == (type(error), str(error))


def test_it_is_found_through_causes() -> None:
    named = PoolError("chunk 3 failed")
    named.__cause__ = _raised(OSError(28, "No space left on device"))
    assert scene_of(named) == Scene("upscale", 48, 71, this_place())
    assert scene_of(PoolError("no worker")) is None


def test_a_record_says_phase_kind_frames_and_place() -> None:
    said = describe(_raised(FrameError("frame 50 is not finite", frame=50)), "extracting")
    assert (said.phase, said.kind, said.first_frame, said.last_frame) == ("upscale", "frame", 50, 50)
    assert (said.message, said.node) == ("frame 50 is not finite.", this_place().node)
    said = describe(_raised(ValueError()), "extracting")
    assert (said.phase, said.kind, said.first_frame, said.last_frame) == ("upscale", "internal", 48, 71)
    assert said.message == "ValueError"
    said = describe(SuperResolutionError("no room", "Free some"), "staging")
    assert (said.phase, said.kind, said.first_frame) == ("staging", "error", None)
