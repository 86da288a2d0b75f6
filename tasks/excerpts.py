"""Excerpts of clips on which models are compared, and what makes a clip unfit for it.

An excerpt is some seconds from the middle of a clip. To `restore` it, its frames are shrunk, coded as a streaming
service would, enlarged and compared with what they were; whole pixels of the smaller picture need sides that the scale
divides, so up to `2 * scale - 1` columns and rows are left out on the right and at the bottom. Without a reference the
frames themselves are enlarged. Nothing here decodes more than one frame, and neither Prefect nor torch is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np

from tasks.errors import SettingsError, SuperResolutionError, UnsupportedSourceError
from tasks.media.pixels import PictureFormat
from tasks.media.probe import LARGEST_SIDE, SourceFacts, probe, refuse_unsupported
from tasks.media.timestamps import FrameTable, refuse_cut_off, scan_packets
from tasks.media.vmaf import SMALLEST_SIDE
from tasks.store.address import uri_of

Mode = Literal["restore", "no-reference"]

S = TypeVar("S")
T = TypeVar("T")

#: Key frames kept of the table before an excerpt: as many as decoding looks at to find where to start.
_KEYFRAMES_BEFORE: Final = 3


@dataclass(frozen=True)
class Excerpt:
    """Some seconds of a clip, as they are evaluated."""

    index: int
    """Of the clip among those of the evaluation."""
    clip: str
    """Path or URI of the clip."""
    label: str
    """What it is called in tables."""
    facts: SourceFacts
    table: FrameTable
    """Times of the frames of the excerpt alone, and the key frames that decoding them may start at."""
    first: int
    """Number of its first frame in the clip."""
    mode: Mode
    scale: int
    crf: int
    """Rate factor at which the shrunk frames are coded with H.264; 0 for not at all."""

    @property
    def frames(self) -> int:
        return len(self.table)

    @property
    def given(self) -> PictureFormat:
        """What is enlarged."""
        if self.mode == "no-reference":
            return self.facts.picture
        return self.target.resized(self.target.width // self.scale, self.target.height // self.scale)

    @property
    def target(self) -> PictureFormat:
        """Of results; to `restore` also of the reference."""
        picture, scale = self.facts.picture, self.scale
        if self.mode == "no-reference":
            return picture.resized(picture.width * scale, picture.height * scale)
        # Half the chroma of 4:2:0 needs even sides of the smaller picture too.
        return picture.resized(*(side - side % (2 * scale) for side in (picture.width, picture.height)))

    @property
    def bytes(self) -> int:
        """Of its frames in scratch, without results."""
        reference = self.target.frame_bytes if self.mode == "restore" else 0
        return self.frames * (self.given.frame_bytes + reference)

    @property
    def result_bytes(self) -> int:
        """Of one result in scratch."""
        return self.frames * self.target.frame_bytes

    def given_path(self, folder: Path) -> Path:
        """Chunk file of what is enlarged."""
        return folder / f"evaluate-{self.index:04d}-given.yuv"

    def reference_path(self, folder: Path) -> Path:
        """Chunk file of what results are compared with; only to `restore`."""
        return folder / f"evaluate-{self.index:04d}-reference.yuv"

    def result_path(self, folder: Path, contender: int) -> Path:
        """Chunk file of the result of a contender."""
        return folder / f"evaluate-{self.index:04d}-result-{contender:04d}.yuv"


def check_named(clips: Sequence[str], models: Sequence[str]) -> None:
    """Refuse lists that make no evaluation.

    Raises:
        SettingsError: Nothing is named, or a clip twice.
    """
    for what, named in (("clip", clips), ("model", models)):
        if not named:
            raise SettingsError(f"no {what} is named", f"Name at least one {what}")
    uris = [uri_of(clip) for clip in clips]
    if twice := sorted({uri for uri in uris if uris.count(uri) > 1}):
        raise SettingsError(f"clips are named twice: {', '.join(twice)}", "Name each clip once")


def _refuse_unmeasurable(facts: SourceFacts) -> None:
    """Refuse what can be upscaled, but not compared with an original by the measures there are.

    Raises:
        UnsupportedSourceError: Pixels are not 8-bit 4:2:0, the size is odd, or pictures are interlaced.
    """
    traits = []
    if facts.picture.pix_fmt != "yuv420p":
        traits.append(f"pixel format {facts.pix_fmt}")
    if facts.width % 2 or facts.height % 2:
        traits.append(f"an odd picture size ({facts.width}x{facts.height})")
    if facts.field_order not in ("progressive", "unknown"):
        traits.append(f"interlaced pictures (field order {facts.field_order})")
    if traits:
        raise UnsupportedSourceError(
            f"{facts.path} has {', '.join(traits)}, which models are not compared on",
            "Name clips of 8-bit 4:2:0 with even sides and progressive pictures",
        )


def find_excerpt(clip: str, path: Path, mode: Mode, scale: int, seconds: float, crf: int) -> Excerpt:
    """The excerpt of a clip. Reads the whole file once, decodes one frame.

    Args:
        clip: Path or URI of the clip.
        path: Where it can be read.
        mode: Whether its frames are shrunk first.
        scale: How many times the frames are enlarged.
        seconds: Length; of a shorter clip all frames are taken.
        crf: See `Excerpt.crf`.

    Raises:
        SourceError: The clip is missing, not a video, or damaged.
        FrameError: It is cut off.
        UnsupportedSourceError: It has a trait that cannot be processed faithfully, or a picture too small or too large.
    """
    facts = probe(path)
    refuse_unsupported(facts)
    _refuse_unmeasurable(facts)
    scan = scan_packets(facts)
    refuse_cut_off(facts, scan)
    table = scan.table
    frames = min(len(table), max(1, round(seconds * table.rate)))
    first = (len(table) - frames) // 2
    excerpt = Excerpt(0, clip, Path(clip).name, facts, _cut_out(table, first, frames), first, mode, scale, crf)
    small, large = min(excerpt.target.width, excerpt.target.height), max(excerpt.target.width, excerpt.target.height)
    if small < SMALLEST_SIDE:
        raise UnsupportedSourceError(
            f"{clip} has pictures of {facts.width}x{facts.height}, which leaves nothing to measure at scale {scale}",
            f"Name clips with at least {SMALLEST_SIDE + 2 * scale - 1} rows and columns",
        )
    if large > LARGEST_SIDE:
        raise UnsupportedSourceError(
            f"{clip} would become {excerpt.target.width}x{excerpt.target.height}",
            f"Sides of at most {LARGEST_SIDE} are possible",
        )
    return excerpt


def numbered(excerpts: Iterable[Excerpt]) -> list[Excerpt]:
    """Excerpts with an index each, called by the names of their clips, or by all of their paths where names repeat."""
    excerpts = list(excerpts)
    names = Counter(excerpt.label for excerpt in excerpts)
    return [
        replace(excerpt, index=index, label=excerpt.label if names[excerpt.label] == 1 else excerpt.clip)
        for index, excerpt in enumerate(excerpts)
    ]


def find_all(find: Callable[[S], T], names: Iterable[S], refusals: list[SuperResolutionError]) -> list[T]:
    """What `find` gives for each name; where it refuses one, its error joins the `refusals`."""
    found = []
    for name in names:
        try:
            found.append(find(name))
        except SuperResolutionError as refusal:
            refusals.append(refusal)
    return found


def refuse(refusals: Sequence[SuperResolutionError]) -> None:
    """Raise one error that says all there is to refuse, if there is anything.

    Raises:
        SuperResolutionError: Of the class that all of them have in common.
    """
    if not refusals:
        return
    if len(refusals) == 1:
        raise refusals[0]
    common = next(kind for kind in type(refusals[0]).__mro__ if all(isinstance(refusal, kind) for refusal in refusals))
    kind: type[SuperResolutionError] = SettingsError if common is SuperResolutionError else common
    said = "; ".join(f"{refusal.problem} ({refusal.remedy})" for refusal in refusals)
    raise kind(f"{len(refusals)} things are wrong: {said}", "Correct them, or leave out what cannot be used")


def _cut_out(table: FrameTable, first: int, frames: int) -> FrameTable:
    pts = table.pts[first : first + frames]
    before = int(np.searchsorted(table.keyframes, pts[0], side="right"))
    behind = int(np.searchsorted(table.keyframes, pts[-1], side="right"))
    return replace(table, pts=pts, keyframes=table.keyframes[max(0, before - _KEYFRAMES_BEFORE) : behind])
