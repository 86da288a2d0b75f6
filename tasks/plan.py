"""The plan of a job: chunks of whole frames with exact times, the names of their files, and the job's folder.

A **job** is one request on one content. Its folder in scratch is named by a hash of everything the result depends on,
so the same command finds the same folder again and continues, and a changed setting starts another one. Each chunk file
is named by a key of its own: what went into it and the version of the code that wrote it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.numpy import load, save

from tasks.chunks import Chunk, lay_out
from tasks.destinations import LocalFile, StoredObject, destination_of
from tasks.errors import SourceError
from tasks.media import ffmpeg
from tasks.media.carried import Carried
from tasks.media.chunk_file import MAGIC
from tasks.media.decode import decodable_times
from tasks.media.encoders import ENCODE_VERSION, EncoderProfile, group_frames, profile_from_dict
from tasks.media.light import Light
from tasks.media.pixels import PictureFormat
from tasks.media.probe import Colour, SourceFacts, StreamFacts
from tasks.media.timestamps import Fields, FrameTable, refuse_cut_off, scan_packets
from tasks.models.calibration import Verdict
from tasks.models.cards import ModelCard, find_model
from tasks.request import CheckedRequest, UpscaleRequest
from tasks.store.settings import StoreSettings

#: Versions of what the extract and upscale stages write; part of every chunk key. Raise one when its output changes.
EXTRACT_VERSION: Final = 1
UPSCALE_VERSION: Final = 3
CALIBRATION_VERSION: Final = 2


@dataclass(frozen=True)
class Plan:
    """All that the tasks of one job share; `save_plan` puts it into the job's folder."""

    key: str
    """Names the folder: a hash of everything that the result depends on."""
    folder: Path
    request: UpscaleRequest
    facts: SourceFacts
    table: FrameTable
    chunks: tuple[Chunk, ...]
    target: PictureFormat
    model: str
    model_hash: str
    profile: EncoderProfile
    muxer: str
    carried: Carried
    damaged_frames: int
    """Frames that the source announces and `--salvage` leaves out."""
    store: StoreSettings = field(default_factory=StoreSettings)
    """How to reach S3, for results that go there."""
    notes: tuple[str, ...] = ()
    """What whoever asked should know about how the source is treated."""
    calibrated: Verdict | None = None
    """What was found about `int8`, if that was asked for."""

    @property
    def frames(self) -> int:
        return len(self.table)

    @property
    def sample_aspect_ratio(self) -> Fraction:
        """Width to height of one sample of the result."""
        return Fraction(1) if self.request.square_pixels else self.facts.sample_aspect_ratio

    @property
    def card(self) -> ModelCard:
        return find_model(self.model)

    @property
    def destination(self) -> LocalFile | StoredObject:
        return destination_of(self.request.destination, self.store)

    def extracted(self, chunk: Chunk) -> Path:
        """Chunk file of decoded frames."""
        return self._files[chunk.index][0]

    def upscaled(self, chunk: Chunk) -> Path:
        """Chunk file of upscaled frames."""
        return self._files[chunk.index][1]

    def encoded(self, chunk: Chunk) -> Path:
        """Encoded chunk."""
        return self._files[chunk.index][2]

    def unfinished(self, chunk: Chunk) -> Iterator[Path]:
        """Files that attempts at a chunk, running or lost with their worker, have not finished."""
        return self.folder.glob(f"*-{chunk.first:07d}-{chunk.last:07d}-*.partial-*")

    @property
    def precision(self) -> str:
        """In which the network is computed: not in `int8` before a calibration has shown that it may be."""
        return "fp32" if self.request.precision == "int8" and self.quantised is None else self.request.precision

    @property
    def quantised(self) -> Path | None:
        """The network in bytes, where it is used."""
        good = self.calibrated is not None and self.calibrated.is_good
        return self.folder / self.calibrated.file if good and self.calibrated else None

    @property
    def sample(self) -> Path:
        """Chunk file of the frames to calibrate on."""
        return self.folder / "sample.yuv"

    @property
    def verdict(self) -> Path:
        """What calibration found, as JSON."""
        return self.folder / f"calibration-{CALIBRATION_VERSION}.json"

    def known_verdict(self) -> Verdict | None:
        """What an earlier run of the job found."""
        if not self.verdict.exists():
            return None
        found = Verdict(**json.loads(self.verdict.read_text()))
        return found if (self.folder / found.file).exists() else None

    @property
    def publishing(self) -> Path:
        """Where the progress of an upload is noted."""
        return self.folder / "publish.progress"

    @property
    def result(self) -> Path:
        """The joined result before it is published."""
        return self.folder / f"result{Path(self.request.destination).suffix.lower()}"

    @cached_property
    def _files(self) -> tuple[tuple[Path, Path, Path], ...]:
        # Derived once: who watches a job asks for all of them every second.
        return tuple(self._files_of(chunk) for chunk in self.chunks)

    def _files_of(self, chunk: Chunk) -> tuple[Path, Path, Path]:
        times = self.table.pts[chunk.first : chunk.last + 1]
        extract: list[Any] = [EXTRACT_VERSION, MAGIC.decode(), self.key, xxhash.xxh3_64_hexdigest(times.tobytes())]
        quantised = self.quantised.name if self.quantised else None
        upscale = [*extract, UPSCALE_VERSION, self.model_hash, self.target.to_dict(), self.precision, quantised]
        upscale.append(self.request.tolerance)
        encode = [upscale, ENCODE_VERSION, ffmpeg.version(), asdict(self.profile), str(self.table.rate)]
        return (
            self._file("extract", chunk, ".yuv", extract),
            self._file("upscale", chunk, ".yuv", upscale),
            self._file("encode", chunk, ".mkv", encode),
        )

    def _file(self, stage: str, chunk: Chunk, suffix: str, key: list[Any]) -> Path:
        return self.folder / f"{stage}-{chunk.first:07d}-{chunk.last:07d}-{_digest(key)[:12]}{suffix}"


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def make_plan(checked: CheckedRequest, model_hash: str) -> Plan:
    """Read the source's timestamps and lay out the chunks. Reads the whole file once; decodes nothing without salvage.

    Args:
        checked: A request that passed its check.
        model_hash: SHA-256 of the weight file.

    Raises:
        FrameError: The source is cut off.
        UnsupportedSourceError: Packets lack timestamps.
    """
    facts, request = checked.facts, checked.request
    scan = scan_packets(facts)
    table, damaged = scan.table, 0
    if request.salvage:
        kept = decodable_times(facts, table)
        if not len(kept):
            raise SourceError(f"{facts.path}: not a single frame decodes", "Nothing can be salvaged")
        announced = max(len(table), facts.declared_frames if scan.cut_off_at is not None else 0)
        damaged = announced - len(kept)
        table = replace(table, pts=kept)
    else:
        refuse_cut_off(facts, scan)
    if checked.fields is not None:
        table = table.of_fields(checked.fields)
    identity = [
        scan.digest,
        facts.video_index,
        table.pts.tobytes().hex() if damaged else len(table),
        asdict(checked.fields) if checked.fields else None,
        checked.target.to_dict(),
        model_hash,
        asdict(checked.profile),
        checked.muxer,
        request.precision,
        request.tolerance,
        request.square_pixels,
    ]
    key = _digest(identity)[:16]
    chunks = lay_out(len(table), checked.chunk_limit(table.rate), group_frames(table.rate), request.chunk_seconds)
    return Plan(
        key=key,
        folder=checked.scratch / key,
        request=request,
        facts=facts,
        table=table,
        chunks=chunks,
        target=checked.target,
        model=checked.card.path or checked.card.name,
        model_hash=model_hash,
        profile=checked.profile,
        muxer=checked.muxer,
        carried=checked.carried,
        damaged_frames=damaged,
        store=checked.store,
        notes=checked.notes,
    )


def save_plan(plan: Plan) -> Path:
    """Write the plan into the job's folder, which must exist.

    Returns:
        Path of the plan. Its name holds a hash of its content: a worker that keeps plans in memory can never use an
        old one for a job that was planned anew.
    """
    record = {
        "key": plan.key,
        "request": plan.request.to_dict(),
        "facts": plan.facts.to_dict(),
        "rate": str(plan.table.rate),
        "constant": plan.table.constant,
        "fields": asdict(plan.table.fields) if plan.table.fields else None,
        "notes": plan.notes,
        "chunks": [[chunk.first, chunk.last] for chunk in plan.chunks],
        "target": plan.target.to_dict(),
        "model": plan.model,
        "model_hash": plan.model_hash,
        "profile": asdict(plan.profile),
        "muxer": plan.muxer,
        "carried": asdict(plan.carried),
        "damaged_frames": plan.damaged_frames,
        "store": asdict(plan.store),
        "calibrated": asdict(plan.calibrated) if plan.calibrated else None,
    }
    path = plan.folder / f"plan-{_digest([record, plan.table.pts.tobytes().hex()])[:12]}.json"
    partial = path.with_suffix(".partial")
    times = {"pts": plan.table.pts, "keyframes": plan.table.keyframes}
    # Not as numpy does: it parses a header by `ast`, which threads of Python 3.11 may not do at once (gh-106905).
    partial.write_bytes(save({name: np.ascontiguousarray(array) for name, array in times.items()}))
    os.replace(partial, path.with_suffix(".safetensors"))
    partial.write_text(json.dumps(record, indent=1))
    os.replace(partial, path)
    return path


@lru_cache(maxsize=4)
def load_plan(path: Path) -> Plan:
    """Read a plan; cached, because every task of a chunk asks for it."""
    record = json.loads(path.read_text())
    times = load(path.with_suffix(".safetensors").read_bytes())
    facts = _facts_from_dict(record["facts"])
    fields = Fields(**record["fields"]) if record["fields"] else None
    return Plan(
        key=record["key"],
        folder=path.parent,
        request=UpscaleRequest(**record["request"]),
        facts=facts,
        table=FrameTable(
            times["pts"],
            times["keyframes"],
            facts.time_base / 2 if fields and fields.doubled else facts.time_base,
            Fraction(record["rate"]),
            record["constant"],
            fields,
        ),
        chunks=tuple(Chunk(index, first, last) for index, (first, last) in enumerate(record["chunks"])),
        target=PictureFormat.from_dict(record["target"]),
        model=record["model"],
        model_hash=record["model_hash"],
        profile=profile_from_dict(record["profile"]),
        muxer=record["muxer"],
        carried=Carried.from_dict(record["carried"]),
        damaged_frames=record["damaged_frames"],
        store=StoreSettings.from_dict(record["store"]),
        notes=tuple(record["notes"]),
        calibrated=Verdict(**record["calibrated"]) if record["calibrated"] else None,
    )


def _facts_from_dict(data: dict[str, Any]) -> SourceFacts:
    rate = data["frame_rate"]
    return SourceFacts(
        **{
            **data,
            "streams": tuple(StreamFacts(**stream) for stream in data["streams"]),
            "colour": Colour(**data["colour"]),
            "colour_assumed": tuple(data["colour_assumed"]),
            "frame_rate": Fraction(rate) if rate else None,
            "time_base": Fraction(data["time_base"]),
            "sample_aspect_ratio": Fraction(data["sample_aspect_ratio"]),
            "display_matrix": tuple(data["display_matrix"]),
            "light": Light(*(tuple(data["light"][name]) for name in ("mastering", "content"))),
        }
    )


@task(name="plan", task_run_name="plan", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def plan(checked: CheckedRequest, model_hash: str) -> Plan:
    """`make_plan` as a task run, in the flow's own process: chunks cannot be submitted before it is done."""
    return make_plan(checked, model_hash)
