"""Loads the event handler by its path: no import can name a folder called `lambda`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

HANDLER: Final = Path(__file__).parents[3] / "infra" / "aws" / "lambda" / "handler.py"


def load_handler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("event_handler", HANDLER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
