"""The CUDA kernel of the engine on a CPU, so that its arithmetic is tested where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

from tasks.models.backends.cuda_network import Shape

COMPILER = shutil.which("g++")


class KernelOnCpu:
    """Stands in for `cuda_program.Kernel`."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self._shape = shape
        assert COMPILER is not None
        source, library = folder / f"{abs(hash(shape))}.cu", folder / f"{abs(hash(shape))}.so"
        source.write_text(shape.source)
        harness = Path(__file__).with_suffix(".cpp")
        definitions = [f'-DSOURCE="{source}"', f"-DGROUP={int(shape.group)}", f"-DOUT={shape.out}"]
        options = ["-std=c++20", "-O2", "-march=native", "-w", "-shared", "-fPIC", "-pthread", *definitions]
        subprocess.run([COMPILER, *options, str(harness), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(self, blocks: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        """See `Kernel.launch`."""
        shared = ctypes.c_size_t(self._shape.shared_bytes)
        self._library.launch(*blocks, shared, ctypes.byref(arguments))


@cache
def kernel_on_cpu(shape: Shape, folder: Path) -> KernelOnCpu:
    """That of a shape."""
    return KernelOnCpu(shape, folder)
