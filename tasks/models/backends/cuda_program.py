"""CUDA kernels from source: compiled by NVRTC, which every torch for CUDA brings along, and started by the driver.

    kernel = Kernel(source, "convolve", threads=256, shared_bytes=98304)
    kernel.launch((columns, rows, images), arguments)

What was compiled is kept in the user's cache under a hash of all it depends on, for the workers of later jobs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

from tasks.errors import ModelError
from tasks.media.chunk_file import partial_path
from tasks.models.weights import cache_folder

#: From cuda.h: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
_MOST_SHARED_BYTES: Final = 8


class Kernel:
    """A kernel on the device that is current when it is made.

    Args:
        source: CUDA C++, without includes.
        name: Of an `extern "C"` kernel in it that takes one structure.
        threads: In a block.
        shared_bytes: Shared memory of a block.

    Raises:
        ModelError: It cannot be compiled or loaded.
    """

    def __init__(self, source: str, name: str, threads: int, shared_bytes: int) -> None:
        self._threads, self._shared_bytes = threads, shared_bytes
        torch.cuda.current_stream()  # Makes the context that the driver loads the program into.
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        program = compiled(source, architecture(torch.cuda.get_device_capability()))
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), program))
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
        _check(_driver().cuFuncSetAttribute(self._function, _MOST_SHARED_BYTES, shared_bytes))

    def launch(self, blocks: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        """Start it in the current stream.

        Raises:
            RuntimeError: The driver refuses.
        """
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        block = (self._threads, 1, 1)
        _check(_driver().cuLaunchKernel(self._function, *blocks, *block, self._shared_bytes, stream, pointers, None))


def can_compile() -> bool:
    """Whether there is an NVRTC."""
    try:
        _compiler()
    except OSError:
        return False
    return True


def architecture(capability: tuple[int, int]) -> str:
    """Name of the instruction set of a device of that compute capability; that of Hopper with what only it has."""
    return f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")


def compiled(source: str, target: str) -> bytes:
    """Machine code of `source` for the architecture `target`, out of the cache where it is there already.

    Raises:
        ModelError: NVRTC refuses.
    """
    key = hashlib.sha256("\0".join((source, target, *map(str, _version()))).encode()).hexdigest()
    path = cache_folder().parent / "kernels" / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        program = _compile(source, target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: other workers compile the same at the same time.
        partial = partial_path(path)
        partial.write_bytes(program)
        os.replace(partial, path)
    except OSError:
        pass  # A home that cannot be written costs a second at the next start.
    return program


def _compile(source: str, target: str) -> bytes:
    compiler, program, size = _compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        options = (ctypes.c_char_p * 2)(f"--gpu-architecture={target}".encode(), b"--std=c++17")
        if compiler.nvrtcCompileProgram(program, len(options), options):
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            compiler.nvrtcGetProgramLog(program, log)
            raise ModelError(
                f"NVRTC cannot compile the kernels for {target}: {log.value.decode(errors='replace').strip()}",
                "Use the backend torch, or a torch whose CUDA knows this GPU",
            )
        compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


@lru_cache(maxsize=1)
def _compiler() -> ctypes.CDLL:
    """NVRTC, the one that belongs to torch.

    Raises:
        OSError: There is none.
    """
    if torch.version.cuda is None:
        raise OSError("this torch is not for CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        packages = Path(torch.__file__).parents[1] / "nvidia"
        beside = sorted(packages.glob(f"*/lib/{name}*"))
        if not beside:
            raise
        return ctypes.CDLL(str(beside[0]))


@lru_cache(maxsize=1)
def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA error: {text.value.decode() if text.value else result}")
