"""What runs: one module per deployment, whose flow the package offers by the same name.

    from flows import UpscaleOptions, upscale_video

    upscale_video("film.mkv", "film-4x.mkv", UpscaleOptions(scale=4))

Nothing else is needed: a private Prefect server and the pools of this machine start by themselves, and end with the
flow. Inside `ensure_api()` and `open_pools()` they stay for the next one.

The package itself loads nothing, so that the command line can refuse bad input without waiting for Prefect: names are
imported on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from flows.evaluate import evaluate
    from flows.flight_check import FlightCheckOptions, flight_check
    from flows.housekeeping import HousekeepingOptions, housekeeping
    from flows.parameters import EvaluateOptions, PreviewOptions, UpscaleOptions
    from flows.preview import preview
    from flows.upscale_library import LibraryOptions, upscale_library
    from flows.upscale_video import upscale_video

__all__ = [
    "EvaluateOptions",
    "FlightCheckOptions",
    "HousekeepingOptions",
    "LibraryOptions",
    "PreviewOptions",
    "UpscaleOptions",
    "evaluate",
    "flight_check",
    "housekeeping",
    "preview",
    "upscale_library",
    "upscale_video",
]

_MODULES: Final = {
    "EvaluateOptions": "flows.parameters",
    "FlightCheckOptions": "flows.flight_check",
    "HousekeepingOptions": "flows.housekeeping",
    "LibraryOptions": "flows.upscale_library",
    "PreviewOptions": "flows.parameters",
    "UpscaleOptions": "flows.parameters",
    "evaluate": "flows.evaluate",
    "flight_check": "flows.flight_check",
    "housekeeping": "flows.housekeeping",
    "preview": "flows.preview",
    "upscale_library": "flows.upscale_library",
    "upscale_video": "flows.upscale_video",
}


class _Package(ModuleType):
    """A package whose flows keep their names.

    Whoever imports `flows.upscale_video` first, the import system then sets that module as `upscale_video` of the
    package, and the name would be the flow or the module, as it happens. Here it is always the flow. The module is
    `sys.modules["flows.upscale_video"]`, and `from flows.upscale_video import ...` finds it there.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
