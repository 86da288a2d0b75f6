"""What one stage of one chunk took and where it ran: small, and all that travels back to the flow."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from tasks.place import Place, this_place


@dataclass(frozen=True)
class StageReport:
    """One stage of one chunk."""

    stage: str
    """`extract`, `upscale` or `encode`."""
    chunk: int
    started: float
    """Seconds since the epoch."""
    seconds: float
    """Wall time of the work itself."""
    was_reused: bool = False
    """The chunk file of an earlier attempt was found complete and undamaged."""
    engine: dict[str, Any] | None = None
    """What inference ran with (`EngineDescription`), for the report."""
    bytes: int = 0
    """Bytes of the file that the stage wrote."""
    kept: float = 0.0
    """Share of the picture that was not computed, because nothing within reach had changed."""
    fidelity: float | None = None
    """Of the middle frame of the chunk, in dB: how close its enlargement, shrunk back, is to it (`upscale` only)."""
    device_seconds: float = 0.0
    """Of upscaling, the seconds in which the device worked on this chunk: without loading the model."""
    where: Place = field(default_factory=this_place)
    """The worker."""

    @classmethod
    def reused(cls, stage: str, chunk: int) -> StageReport:
        return cls(stage, chunk, time.time(), 0.0, was_reused=True)
