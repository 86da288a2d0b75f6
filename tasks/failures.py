"""Where something went wrong: noted on the error itself, on the worker, so that it is known wherever the error ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tasks.chunks import Chunk
from tasks.place import Place, this_place


@dataclass(frozen=True)
class Scene:
    """The stage, the frames and the process in which an error was raised."""

    stage: str
    first_frame: int | None = None
    last_frame: int | None = None
    where: Place = field(default_factory=this_place)


@contextmanager
def at(stage: str, chunk: Chunk | None = None) -> Iterator[None]:
    """Note on any error of the block that it happened at this stage of this chunk, here."""
    try:
        yield
    except Exception as error:
        frames = (chunk.first, chunk.last) if chunk else (None, None)
        error.scene = Scene(stage, *frames)  # type: ignore[attr-defined]
        raise


def scene_of(error: BaseException) -> Scene | None:
    """Where an error happened, as far as anybody noted it on the error or on what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(scene := getattr(seen, "scene", None), Scene):
            return scene
        seen = seen.__cause__
    return None
