"""A picture of what a run does, while it does it: one detail enlarged by bicubic interpolation and by the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import Pause

from flows.artifacts import shown
from tasks.chunks import Chunk
from tasks.compare import compare
from tasks.media.pictures import data_uri
from tasks.plan import Plan

if TYPE_CHECKING:
    from prefect.futures import PrefectFuture

    from infra.pools.runner import PoolFuture

#: Share of the chunks after which a better picture is looked for: the first frames of a film may be black.
_LATER: Final = 0.75

#: Chunks from which the better one is taken, if there are so many.
_CANDIDATES: Final = 3


class Comparison:
    """The picture of one run: made by a short task when the first chunk is encoded, and once more later on.

    It is a Markdown artifact with the picture inside: an image artifact would spell out its address below it, which
    here is the picture itself. Nothing ever waits for it.

    Args:
        job: The job.
        path: Path of its plan.
        wanted: Whether pictures may be kept by the Prefect server.
    """

    def __init__(self, job: Plan, path: str, *, wanted: bool) -> None:
        self._job, self._path, self._wanted = job, path, wanted
        self._encoded: list[Chunk] = []
        self._first: PrefectFuture[str] | None = None
        self._later: PrefectFuture[str] | None = None
        self._shown: list[PrefectFuture[str]] = []

    def encoded(self, chunk: Chunk) -> None:
        """Hear of a chunk that this run has encoded."""
        if not self._wanted:
            return
        self._encoded.append(chunk)
        if self._first is None:
            self._first = self._draw([chunk])
        elif self._later is None and len(self._encoded) >= max(_CANDIDATES, _LATER * len(self._job.chunks)):
            step = (len(self._encoded) - 1) // (_CANDIDATES - 1)
            self._later = self._draw(sorted(self._encoded, key=lambda each: each.index)[::step][:_CANDIDATES])

    def look(self) -> None:
        """Show what has been drawn meanwhile."""
        for future in (self._first, self._later):
            if future is not None and future not in self._shown and cast("PoolFuture[str]", future).is_settled:
                self._shown.append(future)
                with shown("the comparison"):
                    self._show(future.result())

    def _draw(self, chunks: list[Chunk]) -> PrefectFuture[str] | None:
        label = ", ".join(f"{chunk.index + 1}/{len(self._job.chunks)}" for chunk in chunks)
        try:
            return compare.submit(self._path, [chunk.index for chunk in chunks], label, return_state=False)
        except Pause:  # What waits for a pause need not have a picture.
            return None

    def _show(self, path: str) -> None:
        if path:
            before, after = self._job.facts, self._job.target
            sizes = f"{before.width}x{before.height} to {after.width}x{after.height}"
            create_markdown_artifact(
                f"![a detail before and after]({data_uri(Path(path).read_bytes())})",
                key="comparison",
                description=f"Bicubic interpolation beside {self._job.card.name}, {sizes}",
            )
