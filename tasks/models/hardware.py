"""The hardware a network runs on: devices and precisions by name, memory, and the fastest it could be."""

from __future__ import annotations

import ctypes
import math
import platform
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

from tasks.errors import SettingsError

#: Type of what goes into a network and comes out. `int8` names what the layers between compute in.
PRECISIONS: Final[dict[str, torch.dtype]] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
}


def find_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises:
        SettingsError: It is not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f'There is no device called "{name}"', "Use auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise SettingsError(f'The device "{name}" is not supported', "Use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise SettingsError(f'The device "{name}" is not on this machine', "Use auto or cpu, or run on a GPU node")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision that `auto` or a key of `PRECISIONS` means on a device.

    Raises:
        SettingsError: There is no such precision, or not on this device.
    """
    if name == "auto":
        return "fp32" if device.type == "cpu" else "fp16"
    if name not in PRECISIONS:
        raise SettingsError(f'There is no precision called "{name}"', f"Use auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type == "cpu":
        raise SettingsError("fp16 on a CPU is slower than fp32 and less exact", "Use auto or bf16, or a GPU")
    if name == "bf16" and device.type == "cpu" and not computes_in_bf16():
        raise SettingsError(
            "this CPU does not compute in bf16, which AMX or AVX-512 BF16 would do", "Use auto or int8, or a GPU"
        )
    if name == "int8" and device.type != "cpu":
        raise SettingsError("int8 is for CPUs", "Use auto")
    return name


@lru_cache(maxsize=1)
def computes_in_bf16() -> bool:
    """Whether this CPU has instructions for products of `bf16`; others would only imitate it."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return flags is not None and not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags[1].split())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, whatever library raised it, means that memory did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "cannot allocate", "alloc_failed", "bad_alloc")
    return any(sign in text for sign in signs)


def free_memory(device: torch.device) -> int:
    """Bytes an engine may plan with: most of a GPU's free memory, half of what machine and control groups have left."""
    if device.type == "cuda":
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    limits = list(memory_left_in_groups())
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    return min(limits, default=4 << 30) // 2


def memory_left_in_groups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes left in each control group around this process that has a limit: containers and jobs of batch systems.

    Args:
        membership: What says which groups the process is in.
        root: Where their file system is mounted, of version 1 or 2.
    """
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit_name, used_name, cache_name = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit_name, used_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_name = "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        while group.is_relative_to(top):
            limit, used, stat = group / limit_name, group / used_name, group / "memory.stat"
            if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdecimal():
                counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
                # Files that were read are counted as used, and given up as soon as somebody needs the memory.
                taken = int(used.read_text()) - int(counts.get(cache_name, 0))
                yield max(0, int(text) - taken)
            group = group.parent


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning every large block to the kernel.

    An activation is freed and allocated again for each layer; by default glibc maps each anew and the kernel clears
    every page of it again, which costs as much time as the arithmetic on some machines. Holds for the whole process,
    whether torch is imported already or not; outside the main thread, whose heap alone grows without end, for blocks
    below 64 MiB.

    Returns:
        Whether the C library is glibc and took the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # From malloc.h: M_MMAP_MAX (-4), no block by mmap of its own; M_TRIM_THRESHOLD (-1), return nothing below 2 GiB.
    return bool(libc.mallopt(-4, 0)) and bool(libc.mallopt(-1, 2**31 - 1))


@lru_cache(maxsize=8)
def device_name(device: torch.device) -> str:
    """Name of the hardware behind `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def matmul_peak(
    device: torch.device | str = "cpu", precision: str = "fp32", seconds: float = 1.0, threads: int | None = None
) -> float:
    """The fastest matrix product this device did in `seconds` of trying: the yardstick for the network's speed.

    Args:
        device: Where.
        precision: A key of `PRECISIONS`.
        seconds: For how long.
        threads: CPU threads, by default as many as torch takes.

    Returns:
        FLOP/s.
    """
    device = torch.device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.rand(size, size, device=device).to(PRECISIONS[precision]) for _ in range(2))
    torch.mm(a, b)
    best = math.inf
    deadline = time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < deadline:
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
