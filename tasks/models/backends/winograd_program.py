"""Convolutions compiled by LLVM for this processor: 3x3 ones with 2.25 times fewer multiplications, and small ones.

    convolve = compiled(Convolution(inputs=64, outputs=64, source_channels=64, ending="prelu"))

3x3 by Winograd's F(2x2, 3x3), of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015
(arXiv:1509.09308), section 4.1: two by two pixels of the result, a cell, take 16 multiplications for each pair of
channels instead of 36. `d` being the four by four pixels around a cell and `g` the kernel,

    cell = A^T ((G g G^T) * (B^T d B)) A

The product is of numbers at the same place of two 4x4 matrices, so over all channels and a row of cells it is 16 matrix
products, which is where the time goes. Larger cells would take fewer still, but only with those of two by two does a
pixel of the result depend, rounding included, on the nine around it alone: tiles that begin on the grid of cells give
what the whole picture gives, bit for bit. So do processors with other vectors: all add up in the same order.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Ending = Literal["prelu", "plus", "enlarged", "picture"]

#: Edge of a cell in pixels.
CELL: Final = 2

#: Places in a matrix of four by four.
_PLACES: Final = 16

#: Cells of a row whose matrices are at hand at a time are as many as fit into so many floats, an eighth of a megabyte.
_BLOCK_FLOATS: Final = 1 << 15

#: Between matrices of two places: one cache line, so that the same cell's do not all compete for one set of the cache.
_APART: Final = 16

#: Steps of the matrix products in a turn of their loop.
_UNROLLED: Final = 4


@dataclass(frozen=True)
class Convolution:
    """What a convolution does, for all pictures and weights. Channels of a pixel are side by side in memory."""

    inputs: int
    """Channels read."""
    outputs: int
    """Channels written; whole vectors."""
    source_channels: int
    """Channels that a pixel of the source has; those read are the first of them, rounded up to whole vectors."""
    target_channels: int
    """Channels that a pixel of the target has."""
    ending: Ending
    """`prelu`: negative values times the slope of their channel. `plus`: plus as many channels of a picture like the
    source. `enlarged`: plus the image of three channels, each of which is repeated for an equal number of channels.
    `picture`: that, and clamped to 0..1."""
    repeated: int = 1
    """For how many channels each of the image's is repeated."""

    @property
    def is_last(self) -> bool:
        """Whether the image is added."""
        return self.ending in ("enlarged", "picture")

    @property
    def block(self) -> int:
        """Cells at a time."""
        cells = _BLOCK_FLOATS // (_PLACES * max(whole_vectors(self.inputs), self.outputs))
        group = _grouping(self.outputs)[1]
        return max(1, cells // group) * group

    @property
    def scratch_floats(self) -> int:
        """Length of the scratch memory."""
        return _PLACES * (self.block * (whole_vectors(self.inputs) + self.outputs) + 2 * _APART)


@dataclass(frozen=True)
class Filter:
    """What a convolution does that has few multiplications, for all pictures and weights."""

    inputs: int
    """Channels read."""
    outputs: int
    """Channels written."""
    source_channels: int
    """Channels that a pixel of the source has."""
    taps: tuple[int, int]
    """Rows and columns of its kernels; odd."""
    peak: int | None = None
    """Write code values from 0 to this one, cut off to integers after all is added up: bytes, or two each if it is more
    than 255. `None` to write floats, in whole vectors."""
    has_gains: bool = False
    """Multiply sums by a factor for their row and one for their column, each by channel."""


Run = Callable[..., None]
"""A compiled `Convolution` or `Filter`. Arguments, pictures by the address of their first pixel, distances between rows
in elements:

source, source_row: Where it reads; there are pixels on all sides as far as kernels reach.
target, target_row: Where it writes; for a `Convolution` it may be one row and one column before what it reads.
rows, columns: How many, of cells or pixels. What cells have beyond an odd picture is written, too.
weights: See `transformed` and `by_tap`.
bias: `[outputs]` in whole vectors.

Then for a `Convolution`:

extra, extra_row: Slopes `[outputs]` for `prelu`, and a distance that does not matter; the picture for `plus`; else the
    image, as many channels as a vector has, those from the fourth on zero.
scratch: `scratch_floats`, once filled with zeros.
watched: A vector that becomes NaN if any of an `enlarged` result or a `picture` is not finite before it is clamped.

And for a `Filter`:

row_gains, column_gains: `[row or column, outputs]` in whole vectors.
"""


def is_available() -> bool:
    """Whether there is LLVM, and a processor that it is worth compiling for."""
    return importlib.util.find_spec("llvmlite") is not None and vector_floats() > 0


def transformed(weight: Tensor, outputs: int) -> NDArray[np.float32]:
    """`G g G^T` for all pairs of channels, by place: float32 `[16, inputs, outputs]`, aligned.

    Args:
        weight: `[channels, inputs, 3, 3]`.
        outputs: At least as many; those beyond are zero.
    """
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    matrices = torch.einsum("ax,oixy,by->abio", g, weight.double(), g).flatten(0, 1)
    result = aligned(_PLACES * weight.shape[1] * outputs).reshape(_PLACES, weight.shape[1], outputs)
    result[..., : len(weight)] = matrices.float().numpy()
    return result


def aligned(floats: int) -> NDArray[np.float32]:
    """Zeros that begin with a cache line: vectors that straddle two take twice as long to read."""
    line = 64
    raw = np.zeros(4 * floats + line, np.uint8)
    start = -raw.ctypes.data % line
    return raw[start : start + 4 * floats].view(np.float32)


def padded(values: Tensor) -> NDArray[np.float32]:
    """`[..., channels]` in whole vectors, aligned; those beyond are zero."""
    shape = (*values.shape[:-1], whole_vectors(values.shape[-1]))
    result = aligned(math.prod(shape)).reshape(shape)
    result[..., : values.shape[-1]] = values.float().numpy()
    return result


def by_tap(kernel: Tensor) -> NDArray[np.float32]:
    """A kernel as a `Filter` reads it.

    Args:
        kernel: `[outputs, inputs, rows, columns]`.

    Returns:
        `[rows, columns, inputs, outputs]` in whole vectors, aligned.
    """
    outputs, inputs, *taps = kernel.shape
    result = aligned(math.prod(taps) * inputs * whole_vectors(outputs)).reshape(*taps, inputs, -1)
    result[..., :outputs] = kernel.permute(2, 3, 1, 0).numpy()
    return result


def compiled(work: Convolution | Filter) -> Run:
    """Machine code for this processor. Calls let other threads of Python run."""
    with _COMPILING:  # Threads come to each layer at the same time.
        return _compiled(work).run


_COMPILING: Final = threading.Lock()


@dataclass(frozen=True)
class _Program:
    run: Run
    owner: Any
    """Of the machine code."""


@cache  # Without a limit: what is running must not be given up.
def _compiled(work: Convolution | Filter) -> _Program:
    import llvmlite.binding as llvm
    from llvmlite import ir

    machine = _machine()
    module = ir.Module()
    module.triple = machine.triple
    lanes = vector_floats()
    writer = (
        _ConvolutionWriter(module, lanes, work) if isinstance(work, Convolution) else _FilterWriter(module, lanes, work)
    )
    kinds = writer.write()
    code = llvm.parse_assembly(str(module))
    code.verify()
    # The loops are written as they are to run.
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_unrolling = tuning.loop_vectorization = tuning.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(code, passes)
    owner = llvm.create_mcjit_compiler(code, machine)
    owner.finalize_object()
    return _Program(ctypes.CFUNCTYPE(None, *kinds)(owner.get_function_address(_NAME)), owner)


_NAME: Final = "convolve"


@cache
def vector_floats() -> int:
    """Floats in a vector of this processor; 0 if it cannot multiply and add in one go."""
    import llvmlite.binding as llvm

    has = {name for name, there in llvm.get_host_cpu_features().items() if there}
    if {"avx512f", "avx512vl"} <= has:
        return 16
    return 8 if {"avx2", "fma"} <= has else 0


def _machine() -> Any:
    """What LLVM compiles for; programs own theirs."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    features["prefer-256-bit"] = False
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )


def whole_vectors(channels: int) -> int:
    """So many channels or more that they fill vectors."""
    return channels + -channels % vector_floats()


def _grouping(outputs: int) -> tuple[int, int]:
    """Vectors of channels, and cells, whose sums are in registers at a time: most of them hold sums."""
    lanes = vector_floats()
    registers, widest = (32, 4) if lanes == 16 else (16, 2)
    vectors = min(widest, outputs // lanes)
    return vectors, (registers - 2 - vectors) // vectors


def _steps(inputs: int) -> int:
    """Channels in a turn of a loop over them."""
    return _UNROLLED if inputs % _UNROLLED == 0 else 1


class _Writer:
    """Writes a function in LLVM's language.

    Variables are memory, which LLVM's first pass makes registers of.
    """

    def __init__(self, module: Any, lanes: int) -> None:
        from llvmlite import ir

        self._ir, self._module, self._lanes = ir, module, lanes
        self._float, self._size, self._address = ir.FloatType(), ir.IntType(64), ir.PointerType()
        self._vector = ir.VectorType(self._float, lanes)
        self._b: Any = None

    def _begin(self, arguments: str) -> list[Any]:
        """A function; of its arguments those that are `x` are addresses and the others sizes."""
        ir = self._ir
        kinds = [self._address if kind == "x" else self._size for kind in arguments]
        function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), kinds), _NAME)
        self._b = ir.IRBuilder(function.append_basic_block())
        return list(function.args)

    @contextmanager
    def _loop(self, stop: Any, step: int = 1, start: Any = None) -> Iterator[Any]:
        b = self._b
        counter = self._variable(self._size(0) if start is None else start)
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.load(counter, typ=self._size)
        b.cbranch(b.icmp_signed("<", i, stop), body, after)
        b.position_at_end(body)
        yield i
        b.store(b.add(i, self._size(step)), counter)
        b.branch(head)
        b.position_at_end(after)

    def _variable(self, value: Any) -> Any:
        with self._b.goto_entry_block():
            variable = self._b.alloca(value.type)
        self._b.store(value, variable)
        return variable

    def _value(self, variable: Any) -> Any:
        return self._b.load(variable, typ=self._vector)

    def _constant(self, number: float) -> Any:
        """A vector of it."""
        return self._ir.Constant(self._vector, [number] * self._lanes)

    def _call(self, name: str, *vectors: Any) -> Any:
        """A function of LLVM's of vectors and numbers of the same kind."""
        ir = self._ir
        full = f"llvm.{name}.v{self._lanes}f32"
        kind = ir.FunctionType(self._vector, [self._vector] * len(vectors))
        return self._b.call(self._module.globals.get(full) or ir.Function(self._module, kind, full), vectors)

    def _add_product(self, total: Any, a: Any, b: Any) -> None:
        self._b.store(self._call("fma", a, b, self._value(total)), total)

    def _clamped(self, value: Any, most: float) -> Any:
        return self._call("minnum", self._call("maxnum", value, self._constant(0.0)), self._constant(most))

    def _times(self, value: Any, *factors: Any) -> Any:
        for factor in factors:
            value = self._b.mul(value, self._size(factor) if isinstance(factor, int) else factor)
        return value

    def _at(self, start: Any, distance: Any, kind: Any = None) -> Any:
        distance = self._size(distance) if isinstance(distance, int) else distance
        return self._b.gep(start, [distance], source_etype=kind or self._float)

    def _load(self, start: Any, distance: Any) -> Any:
        return self._b.load(self._at(start, distance), typ=self._vector, align=4)

    def _store(self, value: Any, start: Any, distance: Any) -> None:
        self._b.store(value, self._at(start, distance), align=4)

    def _everywhere(self, start: Any, distance: Any) -> Any:
        """A vector of one number."""
        ir, b = self._ir, self._b
        number = b.load(self._at(start, distance), typ=self._float)
        vector = b.insert_element(ir.Constant(self._vector, ir.Undefined), number, ir.IntType(32)(0))
        return self._shuffled(vector, [0] * self._lanes)

    def _shuffled(self, vector: Any, places: Sequence[int]) -> Any:
        """A vector of what is at those places of another."""
        ir = self._ir
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places))
        return self._b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


class _ConvolutionWriter(_Writer):
    def __init__(self, module: Any, lanes: int, work: Convolution) -> None:
        super().__init__(module, lanes)
        self._work, self._stored = work, whole_vectors(work.inputs)
        self._extra_channels = lanes if work.is_last else work.source_channels

    def write(self) -> list[Any]:
        """Returns the types of the arguments."""
        work, size = self._work, self._size
        arguments = "xixiiixxxixx"
        source, source_row, target, target_row, rows, columns, weights, bias, extra, extra_row, scratch, watched = (
            self._begin(arguments)
        )
        b = self._b
        for argument in (weights, scratch):
            argument.add_attribute("noalias")
        given = [self._at(scratch, i * (work.block * self._stored + _APART)) for i in range(_PLACES)]
        products = self._at(scratch, _PLACES * (work.block * self._stored + _APART))
        sums = [self._at(products, i * (work.block * work.outputs + _APART)) for i in range(_PLACES)]
        self._watched = self._variable(self._load(watched, 0))
        with self._loop(rows) as row:
            from_row = self._at(source, self._times(row, source_row, CELL))
            to_row = self._at(target, self._times(row, target_row, CELL))
            extra_line = self._at(extra, self._times(row, extra_row, CELL))
            with self._loop(columns, work.block) as first:
                left = b.sub(columns, first)
                count = b.select(b.icmp_signed("<", left, size(work.block)), left, size(work.block))
                with self._loop(count) as cell:
                    column = self._times(b.add(first, cell), CELL * work.source_channels)
                    self._transform(self._at(from_row, column), source_row, given, cell)
                self._multiply(given[0], weights, products, count)
                with self._loop(count) as cell:
                    column = b.add(first, cell)
                    to = self._at(to_row, self._times(column, CELL * work.target_channels))
                    if work.ending != "prelu":
                        extra = self._at(extra_line, self._times(column, CELL * self._extra_channels))
                    self._transform_back(sums, cell, to, target_row, bias, extra, extra_row)
        self._store(self._value(self._watched), watched, 0)
        b.ret_void()
        return _types(arguments)

    def _transform(self, source: Any, source_row: Any, given: Sequence[Any], cell: Any) -> None:
        """`B^T d B` of a cell."""
        with self._loop(self._size(self._stored), self._lanes) as channel:
            here = self._at(source, channel)
            rows = [self._at(here, self._times(source_row, y - 1)) for y in range(4)]
            columns = [
                self._times_b([self._load(rows[y], (x - 1) * self._work.source_channels) for y in range(4)])
                for x in range(4)
            ]
            place = self._b.add(self._times(cell, self._stored), channel)
            for y in range(4):
                for x, value in enumerate(self._times_b([columns[x][y] for x in range(4)])):
                    self._store(value, given[4 * y + x], place)

    def _multiply(self, given: Any, weights: Any, products: Any, count: Any) -> None:
        """The 16 matrix products: of `[cell, input]` and `[input, output]` each."""
        work, stored, outputs, lanes = self._work, self._stored, self._work.outputs, self._lanes
        vectors, group = _grouping(outputs)
        steps = _steps(work.inputs)
        with self._loop(self._size(_PLACES)) as place:
            given = self._at(given, self._times(place, work.block * stored + _APART))
            weights = self._at(weights, self._times(place, work.inputs * outputs))
            products = self._at(products, self._times(place, work.block * outputs + _APART))
            with self._loop(count, group) as first:
                cells = self._at(given, self._times(first, stored))
                results = self._at(products, self._times(first, outputs))
                for start in range(0, outputs, vectors * lanes):
                    channels = range(start, min(outputs, start + vectors * lanes), lanes)
                    zero = self._constant(0.0)
                    sums = {(cell, to): self._variable(zero) for cell in range(group) for to in channels}
                    with self._loop(self._size(work.inputs), steps) as channel:
                        values, kernel = self._at(cells, channel), self._at(weights, self._times(channel, outputs))
                        for step in range(steps):
                            factors = {to: self._load(kernel, step * outputs + to) for to in channels}
                            for cell in range(group):
                                value = self._everywhere(values, cell * stored + step)
                                for to in channels:
                                    self._add_product(sums[cell, to], value, factors[to])
                    for (cell, to), total in sums.items():
                        self._store(self._value(total), results, cell * outputs + to)

    def _transform_back(
        self, sums: Sequence[Any], cell: Any, target: Any, target_row: Any, bias: Any, extra: Any, extra_row: Any
    ) -> None:
        """`A^T . A` of a cell, and what comes after."""
        work, b = self._work, self._b
        # Which channel of the image a lane needs differs from vector to vector.
        for start in range(0, work.outputs, self._lanes) if work.is_last else (0,):
            stop = start + self._lanes if work.is_last else work.outputs
            with self._loop(self._size(stop), self._lanes, self._size(start)) as channel:
                place = b.add(self._times(cell, work.outputs), channel)
                columns = [self._times_a([self._load(sums[4 * y + x], place) for y in range(4)]) for x in range(4)]
                offset = self._load(bias, channel)
                slope = self._load(extra, channel) if work.ending == "prelu" else None
                for y in range(CELL):
                    row = b.add(self._times(target_row, y), channel)
                    for x, value in enumerate(self._times_a([columns[x][y] for x in range(4)])):
                        value = b.fadd(value, offset)
                        if slope is not None:
                            positive = b.fcmp_ordered(">", value, self._constant(0.0))
                            value = b.select(positive, value, b.fmul(value, slope))
                        if work.ending != "prelu":
                            there = b.add(self._times(extra_row, y), self._size(x * self._extra_channels))
                            if work.is_last:
                                value = self._on_image(value, self._load(extra, there), start)
                            else:
                                value = b.fadd(value, self._load(extra, b.add(there, channel)))
                        self._store(value, target, b.add(row, self._size(x * work.target_channels)))

    def _on_image(self, value: Any, pixel: Any, start: int) -> Any:
        channels = [min(3, (start + lane) // self._work.repeated) for lane in range(self._lanes)]
        value = self._b.fadd(value, self._shuffled(pixel, channels))
        # Zero times it is NaN if it is not finite.
        self._add_product(self._watched, value, self._constant(0.0))
        return self._clamped(value, 1.0) if self._work.ending == "picture" else value

    def _times_b(self, d: Sequence[Any]) -> list[Any]:
        b = self._b
        return [b.fsub(d[0], d[2]), b.fadd(d[1], d[2]), b.fsub(d[2], d[1]), b.fsub(d[1], d[3])]

    def _times_a(self, m: Sequence[Any]) -> list[Any]:
        b = self._b
        return [b.fadd(b.fadd(m[0], m[1]), m[2]), b.fsub(b.fsub(m[1], m[2]), m[3])]


class _FilterWriter(_Writer):
    #: Pixels at a time.
    _GROUP: Final = 8

    def __init__(self, module: Any, lanes: int, work: Filter) -> None:
        super().__init__(module, lanes)
        self._work = work

    def write(self) -> list[Any]:
        """Returns the types of the arguments."""
        work = self._work
        arguments = "xixiiixxxx"
        source, source_row, target, target_row, rows, columns, *parameters = self._begin(arguments)
        b = self._b
        written = whole_vectors(work.outputs) if work.peak is None else work.outputs
        code = self._ir.IntType(8 if work.peak is not None and work.peak < 256 else 16)
        kind = self._float if work.peak is None else code
        groups = self._times(b.sdiv(columns, self._size(self._GROUP)), self._GROUP)
        with self._loop(rows) as row:
            from_row = self._at(source, self._times(row, source_row))
            to_row = self._at(target, self._times(row, target_row), kind)
            for group, first, last in ((self._GROUP, None, groups), (1, groups, columns)):
                with self._loop(last, group, first) as column:
                    here = self._at(from_row, self._times(column, work.source_channels))
                    to = self._at(to_row, self._times(column, written), kind)
                    for start in range(0, work.outputs, self._lanes):
                        self._pixels(group, start, here, source_row, to, kind, row, column, *parameters)
        b.ret_void()
        return _types(arguments)

    def _pixels(
        self,
        group: int,
        start: int,
        source: Any,
        source_row: Any,
        target: Any,
        kind: Any,
        row: Any,
        column: Any,
        weights: Any,
        bias: Any,
        row_gains: Any,
        column_gains: Any,
    ) -> None:
        """A vector of channels of some pixels side by side."""
        work, b, wide = self._work, self._b, whole_vectors(self._work.outputs)
        steps = _steps(work.inputs)
        sums = [self._variable(self._constant(0.0)) for _ in range(group)]
        for y in range(work.taps[0]):
            tap_row = self._at(source, self._times(source_row, y - work.taps[0] // 2))
            for x in range(work.taps[1]):
                tap = self._at(tap_row, (x - work.taps[1] // 2) * work.source_channels)
                kernel = self._at(weights, (y * work.taps[1] + x) * work.inputs * wide + start)
                with self._loop(self._size(work.inputs), steps) as channel:
                    values, factors = self._at(tap, channel), self._at(kernel, self._times(channel, wide))
                    for step in range(steps):
                        factor = self._load(factors, step * wide)
                        for pixel, total in enumerate(sums):
                            value = self._everywhere(values, pixel * work.source_channels + step)
                            self._add_product(total, value, factor)
        offset = self._load(bias, start)
        gain = self._load(row_gains, b.add(self._times(row, wide), self._size(start))) if work.has_gains else None
        for pixel, total in enumerate(sums):
            value = self._value(total)
            if gain is not None:
                place = b.add(self._times(column, wide), self._size(pixel * wide + start))
                value = self._call("fma", b.fmul(value, gain), self._load(column_gains, place), offset)
            else:
                value = b.fadd(value, offset)
            if work.peak is None:
                self._store(value, target, pixel * wide + start)
            else:
                count = min(self._lanes, work.outputs - start)
                codes = b.fptosi(
                    self._clamped(value, float(work.peak)), self._ir.VectorType(self._ir.IntType(32), self._lanes)
                )
                codes = b.trunc(self._shuffled(codes, range(count)), self._ir.VectorType(kind, count))
                b.store(codes, self._at(target, pixel * work.outputs + start, kind), align=1)


def _types(arguments: str) -> list[Any]:
    return [ctypes.c_void_p if kind == "x" else ctypes.c_int64 for kind in arguments]
