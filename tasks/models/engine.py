"""The inference engine: frames as planes in, larger frames as planes out.

    engine = Engine(find_model("compact-x2"), source, source.resized(2 * source.width, 2 * source.height))
    larger = engine.upscale(frames)         # uint8 [n, source.frame_bytes] -> uint8 [n, target.frame_bytes]

Everything between the bytes happens on the device and in float: YUV to RGB, the network, a resize if the wanted size
is not the network's, RGB to YUV and rounding. What a frame becomes does not depend on the frames it is given with, on
how they are grouped into calls, or on what was processed before.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.errors import FrameError, ModelError, SettingsError
from tasks.media.changes import Box, Change, ChangeFinder, cut_out, paste
from tasks.media.colour import PlanesToRgb, RgbToPlanes, opacity
from tasks.media.pixels import PictureFormat
from tasks.models import swin
from tasks.models.backends import SIDE_BY_SIDE, Backend, choose_backend, make_backend
from tasks.models.backends.torch_network import all_finite
from tasks.models.backends.winograd_program import CELL
from tasks.models.cards import ModelCard, all_cards
from tasks.models.hardware import (
    PRECISIONS,
    choose_precision,
    device_name,
    find_device,
    free_memory,
    is_out_of_memory,
    keep_freed_memory,
)
from tasks.models.quantisation import Quantised
from tasks.models.state import load_state

#: Tiles overlap by this many input pixels if the network's receptive field is too large to be exact: all but `srvgg`.
LARGEST_OVERLAP: Final = 32

#: Out of memory with tiles of this many input pixels ends the run: the work around the network is what does not fit.
SMALLEST_TILE: Final = 32

#: Input pixels that keep a data-centre GPU busy; smaller frames are batched up to it.
_PIXELS_PER_BATCH: Final = 2 << 20
_LARGEST_BATCH: Final = 8

#: Frames, for each that a CPU computes at once, that may wait to be handed out if most of them are kept.
_KEPT_AHEAD: Final = 8

#: Passes a GPU has to do, besides the one whose results are awaited.
_PASSES_AHEAD: Final = 2


@dataclass(frozen=True)
class EngineDescription:
    """What an engine runs with, for reports."""

    model: str
    """Name of the model card."""
    device: str
    """Name of the GPU, or of the CPU."""
    backend: str
    """What runs the network, a word of `BACKENDS`."""
    precision: str
    """`fp32`, `fp16`, `bf16` or `int8`."""
    threads: int | None
    """CPU threads, `None` on a GPU."""
    tile: int | None
    """Edge of a tile in input pixels, `None` if frames are processed whole."""
    batch: int
    """Frames per pass of a GPU; frames side by side on a CPU."""


@dataclass
class Work:
    """Pixels of sources, counted while they are worked on."""

    given: int = 0
    """In all frames."""
    computed: int = 0
    """Of which the network was computed; the others were kept from the frame before."""

    def add(self, given: int, computed: int) -> None:
        """Count a frame."""
        self.given += given
        self.computed += computed

    @property
    def kept(self) -> float:
        """Share of the work that did not have to be done."""
        return max(0.0, 1 - self.computed / self.given) if self.given else 0.0


class Engine:
    """A network on a device, for frames of one size.

    Tiles overlap by the network's receptive field, so in fp32 on the CPU a tiled result of an `srvgg` network equals
    the untiled one bit for bit. For other networks the overlap is 32 pixels (rounded up to whole windows), which leaves
    differences near tile borders (with random weights one code value in one of 100,000 samples for `rrdb`, up to three
    in one of 50 for transformers); frames are therefore tiled only if memory demands it. When memory does not
    suffice, batch and tile are halved and the work is repeated.

    On a GPU, kernels of this project compute `srvgg` and `rrdb` networks in fp16, `srvgg` tiled or not bit for bit the
    same. For whatever torch computes there, cuDNN's choice of algorithms is by rule and not by timing, so that the same
    chunk gives the same bytes tomorrow; `autotune=True` gives that up for speed. Results arrive in pinned memory and
    are handed out there.

    On a CPU as many frames are computed side by side as there are threads, if memory allows: no thread ever waits for
    another one to end its part of a layer. `srvgg` and `rrdb` networks in fp32 are computed by convolutions of this
    project, with 2.25 times fewer multiplications than others; in other precisions by OpenVINO.

    One stream at a time feeds the device; others wait until it has taken the last frame of that one, and begin while
    the last results still come out.

    Attributes:
        work: What was given to it and what was computed, from its beginning.

    Args:
        card: The model; its weights must be on this machine.
        source: Frames given to `upscale`.
        target: Frames to return. Any size up to the network's scale along each axis.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        backend: `auto` (`winograd`, else `openvino` on a CPU and `cuda` on a GPU where they run the network, else
            `torch`), or one of `BACKENDS`.
        precision: `auto` (`fp16` on a GPU, `fp32` on the CPU), `fp32`, `fp16` on a GPU, `bf16` on a GPU or on a CPU
            that computes in it; `int8` on a CPU, for `srvgg` networks. A frame whose result is not finite is repeated
            in `bf16`, then in `fp32`.
        quantised: The network in bytes, for `int8`: see `calibration.calibrate`.
        threads: CPU threads, by default as many as torch takes.
        tile: Edge of a tile in input pixels, `None` to choose by free memory.
        batch: Frames per pass on a GPU, frames side by side on a CPU by other backends than torch; `None` to choose by
            frame size and free memory.
        reuse: Keep what the frame before gave where nothing within reach of the network has changed; the result is the
            same bit for bit. Parts of frames are kept on a CPU, by `srvgg` networks whose scale is a multiple of the
            one asked for; whole frames always.
        tolerance: Code values by which a sample may differ from the one it was last computed from and still count as
            unchanged. Above 0 the result is no longer the same, and depends on where chunks begin.
        autotune: Let cuDNN time its algorithms; results may then differ by one code value between processes.

    Raises:
        ModelError: The network enlarges less than asked, or its weights are missing or damaged.
        SettingsError: No such device or backend, or it cannot do what is asked.
        UnsupportedSourceError: The colour description is not supported.
    """

    def __init__(
        self,
        card: ModelCard,
        source: PictureFormat,
        target: PictureFormat,
        *,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        quantised: Quantised | None = None,
        threads: int | None = None,
        tile: int | None = None,
        batch: int | None = None,
        reuse: bool = True,
        tolerance: int = 0,
        autotune: bool = False,
    ) -> None:
        _check_size(card, source, target)
        least_values = {"threads": (threads, 1), "tile": (tile, SMALLEST_TILE), "batch": (batch, 1)}
        for name, (value, least) in {**least_values, "tolerance": (tolerance, 0)}.items():
            if value is not None and value < least:
                raise SettingsError(f"{name} is {value}", f"Give at least {least}")
        self.card = card
        self.source = source
        self.target = target
        self.device = find_device(device)
        self.precision = choose_precision(precision, self.device)
        self._backend = choose_backend(backend, self.device, card, self.precision)
        if self.precision == "bf16" and self.device.type == "cpu" and self._backend != "openvino":
            raise SettingsError(f"the backend {self._backend} computes in fp32 on a CPU", "Use openvino, or fp32")
        self._quantised = quantised
        if self.precision == "int8":
            _check_int8(card, self._backend, quantised)
        self._reuse = reuse
        self._tolerance = tolerance
        self._finder = ChangeFinder(source, self._reach, tolerance << (source.layout.bits - 8))
        self.work = Work()
        self._autotune = autotune
        self._lock = threading.Lock()
        self._threads: int | None = None
        self._batch = 1
        if self.device.type == "cpu":
            keep_freed_memory()
            self._threads = threads or torch.get_num_threads()
            if self._backend in SIDE_BY_SIDE:
                self._batch = min(batch or self._threads, self._threads)
        else:
            self._downloads = torch.cuda.Stream(self.device)
            pixels = source.width * source.height
            self._batch = batch or max(1, min(_LARGEST_BATCH, _PIXELS_PER_BATCH // pixels))
        self._to_rgb = PlanesToRgb(source, self.device)
        self._to_planes = RgbToPlanes(target, self.device)
        self._overlap = card.receptive_field if card.architecture == "srvgg" else LARGEST_OVERLAP
        self._overlap += -self._overlap % self._grid
        self._tile = tile
        self._tile_lock = threading.Lock()
        self._fit_into_memory(choose_batch=batch is None, choose_tile=tile is None)
        self._state = load_state(card)
        self._networks: dict[str, Backend] = {}
        with self._settings():
            self._network(self.precision)
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    @cached_property
    def _side_by_side(self) -> ThreadPoolExecutor:
        """Threads that each take a frame from planes to planes, and share the threads of this engine evenly."""
        assert self._threads is not None
        share, everywhere = self._threads // self._batch, torch.get_num_threads()
        pool, all_set = ThreadPoolExecutor(self._batch, "frame"), threading.Barrier(self._batch)

        def set_threads() -> None:
            torch.set_num_threads(share)
            all_set.wait()  # So that each thread does it once.

        list(pool.map(lambda _: set_threads(), range(self._batch)))
        torch.set_num_threads(everywhere)  # What threads to come will start with; those above have their own number.
        return pool

    @cached_property
    def _part_scale(self) -> int | None:
        """Scale of parts of frames that are computed by themselves; `None` if only whole frames are.

        Resizing gives a part what it gives the whole, bit for bit, if it is by a whole number: then a pixel's place
        among those it is made from is the same everywhere.
        """
        scale = self.target.width // self.source.width
        sizes = (scale * self.source.width, scale * self.source.height)
        possible = self.card.architecture == "srvgg" and sizes == (self.target.width, self.target.height)
        possible = possible and not self.target.layout.alpha  # Opacity is resized as a whole.
        return scale if possible and self.card.scale % scale == 0 and self.device.type == "cpu" else None

    @cached_property
    def _reach(self) -> int:
        """How far a changed sample of the source can be from a sample of the result that it changes, in pixels."""
        cell = 1 << max(self.source.layout.shift_x, self.source.layout.shift_y, 1)
        from_chroma = (
            2 * cell + 1
        )  # Two chroma samples on, from the near end of the own one to the far end of the other.
        scale = self._part_scale or self.card.scale
        shrinking = math.ceil(2 / scale) + 1 if scale < self.card.scale else 0  # A cubic, two pixels of the result.
        to_chroma = math.ceil(5 / scale) + 1
        reach = self.card.receptive_field + from_chroma + shrinking + to_chroma
        return reach + -reach % cell

    @property
    def _grid(self) -> int:
        """Tiles begin at multiples of so many pixels: as the network demands, and `winograd` to be exact."""
        return math.lcm(CELL, self.card.size_multiple)

    @property
    def tile(self) -> int | None:
        """Edge of a tile in input pixels, `None` while frames are processed whole."""
        return self._tile

    @property
    def batch(self) -> int:
        """Frames that `upscale` takes at a time best."""
        return self._batch

    @property
    def feed(self) -> int:
        """Frames that a batch given to `stream` should have."""
        return 1 if self.device.type == "cpu" else 4 * self._batch

    @property
    def flop_per_frame(self) -> int:
        """Floating point operations the network needs for one frame, overlap of tiles not counted."""
        return self.card.flop_per_input_pixel * self.source.width * self.source.height

    @property
    def description(self) -> EngineDescription:
        """What this engine runs with now."""
        return EngineDescription(
            model=self.card.name,
            device=device_name(self.device),
            backend=self._backend,
            precision=self.precision,
            threads=self._threads,
            tile=self._tile,
            batch=self._batch,
        )

    def warm_up(self) -> float:
        """Run one batch of grey frames, so that libraries load and buffers exist before the first real frame.

        Returns:
            Seconds it took.
        """
        started = time.perf_counter()
        grey = np.full((self._batch, self.source.frame_bytes), 128, np.uint8)
        with self._lock:
            if self.device.type == "cpu":
                list(self._side_by_side.map(self._upscale_on_cpu, grey, range(self._batch)))
            else:
                group = _Pass(list(grey), list(range(self._batch)))
                self._start(group)
                self._results(group)
        return time.perf_counter() - started

    def upscale(self, frames: np.ndarray, first_frame: int = 0) -> np.ndarray:
        """Enlarge frames.

        Args:
            frames: uint8 `[n, source.frame_bytes]`, planes one after another.
            first_frame: Index of the first of them in the source, for error messages.

        Returns:
            uint8 `[n, target.frame_bytes]`.

        Raises:
            FrameError: A frame does not fit into memory even in the smallest tiles, or its result is not finite.
            ValueError: `frames` has another shape or type.
        """
        result = np.empty((len(frames), self.target.frame_bytes), np.uint8)
        done = 0
        for part in self.stream([frames], first_frame):
            result[done : done + len(part)] = part
            done += len(part)
        return result

    def stream(
        self, batches: Iterable[np.ndarray], first_frame: int = 0, work: Work | None = None
    ) -> Iterator[np.ndarray]:
        """Enlarge frames as they come, so that the device has the next ones while the caller sees to the last ones.

        Args:
            batches: uint8 `[n, source.frame_bytes]` each, any n; not changed by the caller afterwards.
            first_frame: Index of the first frame in the source, for error messages.
            work: Counts what this stream is given and what of it is computed.

        Yields:
            uint8 `[n, target.frame_bytes]`, in order, in other portions than they came in. Read-only by convention: an
            array may be yielded again for a frame that is repeated.

        Raises:
            FrameError: A frame does not fit into memory even in the smallest tiles, or its result is not finite.
            ValueError: A batch has another shape or type.
        """
        stream = self._stream_on_cpu if self.device.type == "cpu" else self._stream_on_gpu
        with ExitStack() as turn:
            turn.enter_context(self._lock)
            if self._tolerance:
                self._last = None  # What was computed before must not show.
            yield from stream(self._checked(batches), first_frame, work or Work(), turn.close)

    def _checked(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frames in batches:
            if frames.dtype != np.uint8 or frames.ndim != 2 or frames.shape[1] != self.source.frame_bytes:
                raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (n, {self.source.frame_bytes})")
            if len(frames):
                yield frames

    def upscale_rgb(self, frames: np.ndarray) -> np.ndarray:
        """Enlarge RGB images of any size by the network's scale.

        Args:
            frames: uint8 `[n, h, w, 3]`.

        Returns:
            uint8 `[n, h * scale, w * scale, 3]`.

        Raises:
            FrameError: An image does not fit into memory even in the smallest tiles, or its result is not finite.
            ValueError: `frames` has another shape or type.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (n, h, w, 3)")
        n, h, w, _ = frames.shape
        result = np.empty((n, h * self.card.scale, w * self.card.scale, 3), np.uint8)

        def convert(rgb: Tensor, precision: str) -> tuple[Tensor, Tensor]:
            image, finite = self._enlarge(rgb.permute(0, 3, 1, 2).float() / 255, precision)
            return (image.permute(0, 2, 3, 1) * 255).round_().to(torch.uint8), finite

        with self._lock, self._settings():
            for i in range(n):
                image = torch.from_numpy(frames[i : i + 1].copy()).to(self.device)
                result[i] = self._until_finite(image, convert, i)[0].cpu().numpy()
        return result

    def _stream_on_cpu(
        self, batches: Iterator[np.ndarray], first_frame: int, work: Work, end_turn: Callable[[], None]
    ) -> Iterator[np.ndarray]:
        """One frame at a time, or as many as are computed side by side."""
        pending: deque[list[tuple[Change | None, Future[np.ndarray]]]] = deque()
        known, result = self._last or (None, None)

        def collect() -> np.ndarray:
            nonlocal result
            result = self._put_together(pending.popleft(), result)
            return result[None]

        try:
            for index, frame in enumerate(chain.from_iterable(batches), first_frame):
                changes = self._changes(frame, known, work)
                known = self._now_known(known, frame, changes)
                pending.append(
                    [
                        (change, self._side_by_side.submit(self._upscale_on_cpu, frame, index, change))
                        for change in (changes if changes is not None else [None])
                    ]
                )
                # One more to compute than can be computed: nobody waits for the caller, also if some are only kept.
                while sum(map(bool, pending)) > self._batch or len(pending) > _KEPT_AHEAD * self._batch:
                    yield collect()
            end_turn()  # The frames of the next stream queue up behind those that are still being computed.
            while pending:
                yield collect()
            if known is not None and result is not None:
                self._last = known.copy(), result
        finally:
            for _, future in chain.from_iterable(pending):
                future.cancel()

    def _changes(self, frame: np.ndarray, known: np.ndarray | None, work: Work) -> Sequence[Change] | None:
        """What of a frame has to be computed, `None` for all of it."""
        changes = None
        if known is not None and self._reuse:
            changes = self._finder.changes(frame, known)
            if changes and self._part_scale is None:
                changes = None
        pixels = self.source.width * self.source.height
        computed = pixels if changes is None else sum(change.needed.area for change in changes)
        for counted in (self.work, work):
            counted.add(pixels, computed)
        return changes

    def _now_known(self, known: np.ndarray | None, frame: np.ndarray, changes: Sequence[Change] | None) -> np.ndarray:
        """The frame that the results so far stand for."""
        if known is None or changes is None or not self._tolerance:
            return frame
        # What differs a little stays as it was, or small changes could add up unseen.
        known = known.copy()
        for change in changes:
            paste(known, self.source, change.changed, frame, self.source, change.changed)
        return known

    def _put_together(
        self, parts: Sequence[tuple[Change | None, Future[np.ndarray]]], before: np.ndarray | None
    ) -> np.ndarray:
        """The result for a frame, from what was computed of it and the result for the frame before."""
        if any(change is None for change, _ in parts):
            return parts[0][1].result()
        assert before is not None
        if not parts:
            return before
        result, scale = before.copy(), self._part_scale
        for change, future in parts:
            assert change is not None and scale is not None
            columns, rows = change.needed.size
            inside = change.affected.within(change.needed).scaled(scale)
            part_picture = self.target.resized(scale * columns, scale * rows)
            paste(result, self.target, change.affected.scaled(scale), future.result(), part_picture, inside)
        return result

    def _upscale_on_cpu(self, frame: np.ndarray, index: int, change: Change | None = None) -> np.ndarray:
        """A whole frame, or what a change needs of it."""
        picture = self.source
        if change is not None:
            frame, picture = cut_out(frame, picture, change.needed), picture.resized(*change.needed.size)
        with torch.inference_mode():
            planes = torch.from_numpy(frame[None].copy())  # Of its own: the caller's may be read-only.
            # Results of bf16 and int8 are finite wherever fp32's are, so no part is computed in another precision
            # than the rest of its frame.
            return self._until_finite(planes, partial(self._convert, picture=picture), index)[0].numpy()

    def _stream_on_gpu(
        self, batches: Iterator[np.ndarray], first_frame: int, work: Work, end_turn: Callable[[], None]
    ) -> Iterator[np.ndarray]:
        """A pass of frames at a time; while the device computes one, others are on their way to it and from it."""
        pending: deque[_Pass] = deque()
        known, before = self._last or (None, None)

        def collect() -> Iterator[np.ndarray]:
            nonlocal before
            done = pending.popleft()
            results = self._results(done)
            if done.origin == list(range(len(results))):
                yield results
            else:
                for place in done.origin:
                    result = results[place] if place >= 0 else before
                    assert result is not None
                    yield result[None]
            before = results[-1] if len(results) else before

        for frames in batches:
            for group in self._passes(frames, first_frame, known, work):
                known = group.frames[-1] if group.frames else known
                self._start(group)
                pending.append(group)
                if len(pending) > _PASSES_AHEAD:
                    yield from collect()
            first_frame += len(frames)
        end_turn()  # Before the caller sees to the last results, however long that takes.
        while pending:
            yield from collect()
        if self._reuse and known is not None and before is not None:
            self._last = known.copy(), before.copy()

    def _passes(self, frames: np.ndarray, first_frame: int, known: np.ndarray | None, work: Work) -> list[_Pass]:
        """Frames in groups that are computed at once, without those that repeat the one before."""
        groups = [_Pass()]
        for index, frame in enumerate(frames, first_frame):
            if self._changes(frame, known, work) is None:
                if len(groups[-1].frames) == self._batch:
                    groups.append(_Pass())
                groups[-1].frames.append(frame)
                groups[-1].indices.append(index)
                known = frame
            groups[-1].origin.append(len(groups[-1].frames) - 1)
        return groups

    def _start(self, group: _Pass) -> None:
        """Send frames to the device and its results back, without waiting for them.

        Raises:
            FrameError: A frame does not fit into memory even in the smallest tiles.
        """
        count = len(group.frames)
        if not count:
            return
        given = torch.empty((count, self.source.frame_bytes), dtype=torch.uint8, pin_memory=True)
        for row, frame in zip(given.numpy(), group.frames, strict=True):
            row[:] = frame
        # torch keeps pinned memory for whoever asks next, and knows when copies from and to it have ended; so results
        # are handed out where they arrive.
        group.output = torch.empty((count, self.target.frame_bytes), dtype=torch.uint8, pin_memory=True)
        group.finite = torch.empty(count, dtype=torch.bool, pin_memory=True)
        done = 0
        while done < count:
            place = slice(done, min(count, done + self._batch))
            try:
                with self._settings():
                    self._compute(given[place], group.output[place], group.finite[place])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                torch.cuda.synchronize(self.device)  # Until then other passes hold memory.
                if self._batch > 1:
                    self._batch //= 2
                    torch.cuda.empty_cache()
                else:
                    self._halve_tile(group.indices[done], error)
            else:
                done = place.stop
        group.done.record(self._downloads)

    def _compute(self, frames: Tensor, results: Tensor, all_finite: Tensor) -> None:
        """Start to compute frames in pinned memory; results go to pinned memory beside what is computed next."""
        count = len(frames)
        given = frames.to(self.device, non_blocking=True)
        if self._backend == "torch" and count < self._batch:
            # Its algorithms differ by the shape of a batch, and with them results by a hair.
            given = torch.cat((given, given[-1:].expand(self._batch - count, -1)))
        output, finite = self._convert(given, self.precision)
        self._downloads.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._downloads):
            results.copy_(output[:count], non_blocking=True)
            all_finite.copy_(finite[:count], non_blocking=True)
        for tensor in (output, finite):
            tensor.record_stream(self._downloads)

    def _results(self, group: _Pass) -> np.ndarray:
        """What a pass gave, as soon as it is there."""
        if not group.frames:
            return np.empty((0, self.target.frame_bytes), np.uint8)
        assert group.output is not None and group.finite is not None
        group.done.synchronize()
        for i in (~group.finite).nonzero().flatten().tolist():
            with self._settings():
                frame = torch.from_numpy(group.frames[i][None].copy()).to(self.device)
                group.output[i] = self._in_other_precisions(frame, self._convert, group.indices[i]).cpu()
        return group.output.numpy()

    def _convert(self, frames: Tensor, precision: str, picture: PictureFormat | None = None) -> tuple[Tensor, Tensor]:
        """uint8 `[n, source.frame_bytes]` to uint8 `[n, target.frame_bytes]` and bool `[n]`: whether all is finite.

        With a `picture`, frames are parts of the source in that format, and results parts of the target.
        """
        source, target, scale = picture or self.source, self.target, self.card.scale
        if source != self.source:
            assert self._part_scale is not None
            target = target.resized(self._part_scale * source.width, self._part_scale * source.height)
        rgb = self._to_rgb(frames, source).clamp_(0, 1)
        is_enlarged = (target.width, target.height) == (scale * source.width, scale * source.height)
        if self.card.architecture == "srvgg" and is_enlarged and self._to_planes.takes_phases(scale):
            luma, chroma, finite = self._codes(rgb, precision)
            planes = self._to_planes.put_together(luma, chroma, scale, target)
        else:
            image, finite = self._enlarge(rgb, precision)
            if not is_enlarged:
                wanted = (target.height, target.width)
                image = F.interpolate(image, wanted, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
            planes = self._to_planes(image, target)
        if target.layout.alpha:
            _resize_opacity(frames, source, planes, target)
        return planes, finite

    def _codes(self, rgb: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 RGB in 0..1 through the network and on to code values: see `Backend.codes`."""
        network, scale = self._network(precision), self.card.scale
        x, (down, across) = rgb.to(network.dtype), self._to_planes.edge_gains(scale, *rgb.shape[2:])

        def run(rows: slice, columns: slice) -> tuple[Tensor, ...]:
            return network.codes(x[:, :, rows, columns], (down[:, :, rows], across[:, :, :, columns]))

        kernels = self._to_planes.kernels(scale)
        overlap = self._overlap + max(kernels.rows.shape[2], kernels.columns.shape[3]) // 2
        overlap += -overlap % self._grid
        luma, chroma, finite = self._tiled(run, x.shape[2:], 1, overlap)
        return luma, chroma, finite

    def _enlarge(self, rgb: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        """Float32 RGB in 0..1 through the network.

        Returns:
            Float32 `[n, 3, H, W]` in 0..1, and bool `[n]`: whether all of it was finite.
        """
        h, w = rgb.shape[2:]
        is_srvgg, scale = self.card.architecture == "srvgg", self.card.scale
        network = self._network(precision)
        x = _pad_to_multiple(rgb, self.card.size_multiple).to(network.dtype)

        def run(rows: slice, columns: slice) -> tuple[Tensor, ...]:
            output = network.run(x[:, :, rows, columns])
            return output, all_finite(output)

        output, finite = self._tiled(run, x.shape[2:], 1 if is_srvgg else scale, self._overlap)
        image = F.pixel_shuffle(output, scale) if is_srvgg else output[:, :, : h * scale, : w * scale]
        return image.float().clamp_(0, 1), finite

    def _tiled(
        self, run: Callable[[slice, slice], tuple[Tensor, ...]], size: Sequence[int], scale: int, overlap: int
    ) -> tuple[Tensor, ...]:
        """What `run` gives for a whole image, in tiles if it is larger than one.

        Args:
            run: Of rows and columns, pictures `[n, channels, rows * scale, columns * scale]` that it may overwrite in
                the next call, and at last whether they are finite, `[n]`.
            size: Rows and columns of the image.
            scale: Of the pictures.
            overlap: Pixels around a tile that its pictures depend on.
        """
        h, w = size
        tile = self._tile  # Another thread may find that memory does not suffice.
        if tile is None or (h <= tile and w <= tile):
            return run(slice(0, h), slice(0, w))
        whole: list[Tensor] = []
        finite: Tensor | None = None
        step = tile + -tile % self._grid
        for top in range(0, h, step):
            for left in range(0, w, step):
                kept = Box(top, left, min(h, top + step), min(w, left + step))
                needed = kept.grown(overlap, w, h)
                *parts, is_finite = run(slice(needed.top, needed.bottom), slice(needed.left, needed.right))
                finite = is_finite if finite is None else finite & is_finite
                if not whole:
                    shapes = [(*part.shape[:2], h * scale, w * scale) for part in parts]
                    # In memory as networks give it, channels side by side.
                    whole = [
                        torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
                        for shape, part in zip(shapes, parts, strict=True)
                    ]
                place, inside = kept.scaled(scale), kept.within(needed).scaled(scale)
                for picture, part in zip(whole, parts, strict=True):
                    picture[:, :, place.top : place.bottom, place.left : place.right] = part[
                        :, :, inside.top : inside.bottom, inside.left : inside.right
                    ]
        assert finite is not None
        return *whole, finite

    def _until_finite(
        self, frames: Tensor, convert: Callable[[Tensor, str], tuple[Tensor, Tensor]], first_frame: int
    ) -> Tensor:
        """`convert` with a precision in which every result is finite, each frame on its own from the first retry on."""
        result, finite = self._within_memory(partial(convert, frames, self.precision), first_frame)
        if bool(finite.all()):
            return result
        for i in (~finite).nonzero().flatten().tolist():
            result[i] = self._in_other_precisions(frames[i : i + 1], convert, first_frame + i)
        return result

    def _in_other_precisions(
        self, frame: Tensor, convert: Callable[[Tensor, str], tuple[Tensor, Tensor]], index: int
    ) -> Tensor:
        for precision in _fallbacks(self.precision):
            result, finite = self._within_memory(partial(convert, frame, precision), index)
            if bool(finite.all()):
                return result[0]
        raise FrameError(
            f"The network {self.card.name} gave values that are not finite for frame {index}",
            "Use another model",
            frame=index,
        )

    def _within_memory(self, work: Callable[[], Any], index: int) -> Any:
        """`work`, with smaller and smaller tiles until memory suffices.

        Raises:
            FrameError: It does not with the smallest.
        """
        while True:
            tile = self._tile
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                with self._tile_lock:
                    if self._tile == tile:  # Else another thread has made it smaller meanwhile.
                        self._halve_tile(index, error)

    def _halve_tile(self, index: int, cause: BaseException) -> None:
        longest = max(self.source.width, self.source.height)
        smaller = (self._tile or longest) // 2
        smaller -= smaller % self.card.size_multiple
        if smaller < SMALLEST_TILE:
            raise FrameError(
                f"Frame {index} ({self.source.width}x{self.source.height}) does not fit into the memory of"
                f" {device_name(self.device)}, even in tiles of {self._tile} pixels",
                "Free memory, use a device with more of it, or ask for a smaller size",
                frame=index,
            ) from cause
        self._tile = smaller
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _network(self, precision: str) -> Backend:
        """The network in `precision` on the device, built when first needed."""
        if precision not in self._networks:
            # Kernels of this project are for fp16; what overflows there is repeated by torch.
            name = "torch" if self._backend == "cuda" and precision != "fp16" else self._backend
            self._networks[precision] = make_backend(
                name,
                self.card,
                self._state,
                self.device,
                PRECISIONS[precision],
                threads=self._threads or 1,
                streams=self._batch,
                to_planes=self._to_planes,
                quantised=self._quantised if precision == "int8" else None,
            )
        return self._networks[precision]

    def _fit_into_memory(self, choose_batch: bool, choose_tile: bool) -> None:
        """Halve batch, then tile, until the estimate is within what is free."""
        free = free_memory(self.device)
        around = 4 * (6 * self.source.width * self.source.height + 9 * self.target.width * self.target.height)
        around += 4 * 6 * self.card.scale**2 * self.source.width * self.source.height
        per_pixel = _network_bytes_per_pixel(self.card, self._backend, self.device, PRECISIONS[self.precision])
        pixels = self.source.width * self.source.height
        while choose_batch and self._batch > 1 and self._batch * (around + per_pixel * pixels) > free:
            self._batch //= 2
        while choose_tile and self._batch * (around + per_pixel * min(pixels, self._tile_pixels())) > free:
            smaller = (self._tile or max(self.source.width, self.source.height)) // 2
            if smaller < 2 * SMALLEST_TILE:
                break
            self._tile = smaller - smaller % self.card.size_multiple

    def _tile_pixels(self) -> int:
        edge = self._tile + 2 * self._overlap if self._tile else math.inf
        return int(min(edge, self.source.width) * min(edge, self.source.height))

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Inference mode, threads and cuDNN as this engine needs them."""
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            if self.device.type == "cpu":
                yield
                return
            # TF32 keeps 10 bits of a float's mantissa; what is called fp32 here is fp32.
            with (
                torch.cuda.device(self.device),
                torch.backends.cudnn.flags(
                    enabled=True, benchmark=self._autotune, deterministic=not self._autotune, allow_tf32=False
                ),
            ):
                yield


@dataclass
class _Pass:
    """Frames that a GPU computes at once, and what becomes of them."""

    frames: list[np.ndarray] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    """Of the frames, in the source."""
    origin: list[int] = field(default_factory=list)
    """For each frame to return the one of `frames` whose result it has; -1 for the last one before this pass."""
    output: Tensor | None = None
    """uint8 `[n, target.frame_bytes]`, pinned."""
    finite: Tensor | None = None
    """bool `[n]`, pinned: whether all of each result is."""
    done: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    """When both have arrived."""


def _check_size(card: ModelCard, source: PictureFormat, target: PictureFormat) -> None:
    asked = max(target.width / source.width, target.height / source.height)
    if asked > card.scale + 1e-9:
        fitting = [other.name for other in all_cards().values() if other.scale >= asked]
        remedy = f"Use a model of a larger scale: {', '.join(fitting)}" if fitting else "Ask for a smaller size"
        raise ModelError(f"{card.name} enlarges {card.scale} times, {asked:.4g} times is asked for", remedy)


def _check_int8(card: ModelCard, backend: str, quantised: Quantised | None) -> None:
    if card.architecture != "srvgg":
        # The residuals of dense networks outgrow 256 steps.
        raise SettingsError(f"{card.name} cannot be computed in int8, only compact networks can", "Use fp32")
    if backend != "openvino":
        raise SettingsError(f"the backend {backend} does not compute in int8", "Use openvino")
    if quantised is None or len(quantised.bounds) != card.num_conv + 1:
        raise SettingsError("int8 needs the network in bytes", "Calibrate it on frames of the video")


def _resize_opacity(frames: Tensor, source: PictureFormat, planes: Tensor, target: PictureFormat) -> None:
    """Fill the plane of opacity of results: by interpolation, for networks know pictures. What has none is opaque."""
    peak, place = (1 << target.layout.bits) - 1, opacity(planes, target)
    if not source.layout.alpha:
        place.fill_(peak)
        return
    share = opacity(frames, source).float() / ((1 << source.layout.bits) - 1)
    share = F.interpolate(share, (target.height, target.width), mode="bicubic", align_corners=False).clamp_(0, 1)
    place.copy_(share.mul_(peak).add_(0.5).to(place.dtype))


def _fallbacks(precision: str) -> tuple[str, ...]:
    return {"fp16": ("bf16", "fp32"), "bf16": ("fp32",), "int8": ("fp32",), "fp32": ()}[precision]


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Mirror rows and columns at the bottom and the right, as the official pre-processing does.

    What is smaller than its padding is mirrored again and again; a single row or column is repeated.
    """
    for axis in (2, 3):
        while missing := -x.shape[axis] % multiple:
            count = min(missing, x.shape[axis] - 1)
            x = torch.cat((x, x.narrow(axis, x.shape[axis] - 1 - count, count).flip(axis) if count else x), axis)
    return x


def _network_bytes_per_pixel(card: ModelCard, backend: str, device: torch.device, dtype: torch.dtype) -> int:
    """Most memory a network holds at a time, per input pixel.

    `srvgg`: three activations of `num_feat` channels (`winograd` one, torch on a CPU mere strips) and the last layer.
    `rrdb`: three activations at the output's resolution, and below it a dense block with the copies its concatenations
    make. For the others see `swin.values_per_pixel`. `cuda` keeps two activations of `srvgg`, for `rrdb` three buffers
    of a dense block and two activations at the output's resolution; there `winograd` keeps four buffers and the result.
    """
    if card.architecture == "srvgg":
        if backend == "winograd":
            activations = card.num_feat + 16  # And the picture in whole vectors.
        else:
            activations = 0 if backend == "torch" and device.type == "cpu" else 3 * card.num_feat
        values = activations + 2 * 3 * card.scale**2
    elif card.window_size:
        values = swin.values_per_pixel(card)
    elif backend == "cuda":
        dense = 3 * (card.num_feat + 4 * card.num_grow) + 2 * card.num_feat
        values = (dense + 16 * (2 * card.num_feat + 8)) // card.size_multiple**2
    elif backend == "winograd":
        values = (4 * (card.num_feat + 4 * card.num_grow) + 2 * 16 * 3) // card.size_multiple**2
    else:
        block = 4 * card.num_feat + 14 * card.num_grow
        values = (3 * 16 * card.num_feat + block) // card.size_multiple**2
    return values * dtype.itemsize
