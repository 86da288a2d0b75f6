"""Prefect's models are whole before the first task of a worker, or flow of a process, uses them in its thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: What a task run tells the server of itself is the first that a worker makes of a model.
MAKE_ONE = """
import ast
from prefect.events.schemas.events import Event, Resource

def refuse(*_, **__):
    raise SystemError("AST constructor recursion depth mismatch")

ast.parse = refuse
Event(event="test", resource=Resource({"prefect.resource.id": "test"}))
"""


@pytest.mark.parametrize(
    "ready",
    [
        "from infra.pools.pool import ENGINE; from infra.pools.worker import _import_ahead; _import_ahead(ENGINE)",
        "import flows.upscale_video; from infra.prefect_models import complete_models; complete_models()",
    ],
)
def test_making_one_parses_no_python(ready: str) -> None:
    subprocess.run([sys.executable, "-c", ready + MAKE_ONE], cwd=Path(__file__).parents[2], check=True)
