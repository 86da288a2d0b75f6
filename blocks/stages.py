"""What the tasks of each pool need: modules that workers import while they wait for their first chunk, by name."""

from __future__ import annotations

from typing import Final

CPU_IMPORTS: Final = ("tasks.extract", "tasks.encode")
GPU_IMPORTS: Final = ("tasks.upscale", "tasks.models.engine")
