"""What runs: one module per deployment.

from flows import upscale_video

upscale_video("film.mkv", "film-2x.mkv")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.upscale_video import upscale_video

__all__ = ["upscale_video"]


def __getattr__(name: str) -> Any:
    # On first use: the command line must be able to refuse bad input without waiting for Prefect to load.
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(f"flows.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
