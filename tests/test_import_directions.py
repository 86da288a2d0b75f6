"""Dependencies point one way: `flows -> tasks -> tasks.media, tasks.models` and `flows -> blocks -> infra.pools`.

And what makes a process slow to start is loaded only where it is needed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from blocks.stages import CPU_IMPORTS, GPU_IMPORTS

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("flows", "tasks", "blocks", "deployments", "infra")


@dataclass(frozen=True)
class Rule:
    """What the modules of one package must not import."""

    package: str
    forbidden: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    """Modules of a forbidden package that may be imported all the same."""
    exempt: tuple[str, ...] = ()
    """Modules of `package` that the rule leaves out."""


ORCHESTRATION: Final = ("prefect", "prefect_dask", "dask", "distributed", "dask_jobqueue")

#: The parts of `tasks` that know nothing of flows and clusters, and what else of `tasks` each of them may use.
PARTS: Final = {
    "tasks.media": (),
    "tasks.models": ("tasks.media",),
    "tasks.store": ("tasks.aws",),
    "tasks.ledger": ("tasks.aws", "tasks.home"),
    "tasks.metrics": ("tasks.aws", "tasks.home", "tasks.chunk_report"),
}

#: Modules of `tasks` that say what the installation on AWS has to be like.
AGREED: Final = ("tasks.ledger.table", "tasks.metrics.samples")

RULES: Final = (
    Rule("tasks", ("flows", "blocks", "infra", "deployments")),
    Rule("tasks.media", ("torch",), exempt=("tasks.media.colour",)),
    *(Rule(part, ORCHESTRATION) for part in PARTS),
    *(Rule(part, ("tasks",), allowed=(part, "tasks.errors", *others)) for part, others in PARTS.items()),
    Rule(
        "infra",
        ("flows", "tasks", "blocks", "deployments"),
        allowed=("tasks.errors", "tasks.cores", "tasks.device", "tasks.place", "tasks.home"),
        exempt=("infra.aws",),
    ),
    # What the code and the installation around it must agree on: keys of the ledger, names of metrics.
    Rule("infra.aws", ("flows", "tasks", "blocks", "deployments", *ORCHESTRATION), allowed=("tasks.errors", *AGREED)),
    Rule("infra.aws.lambda", ("infra", "tasks", "prefect"), allowed=("infra.aws.lambda",)),
    Rule(
        "blocks",
        ("flows", "tasks", "deployments"),
        allowed=("tasks.errors", "tasks.aws", "tasks.store.settings", "tasks.ledger", "tasks.metrics"),
    ),
    *(Rule(package, ("tests",)) for package in PACKAGES),
)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Full names of all modules that a source text imports anywhere in it, with line numbers.

    Of `from a import b` both `a` and `a.b` could be the module meant: `a.b` is given, which lies within `a`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for name in node.names:
                yield f"{base}.{name.name}", node.lineno
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value), node.lineno


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports of a source text that a rule forbids."""
    return [
        f"{module}:{line} imports {name}"
        for name, line in imported(source, module, is_package=is_package)
        for rule in RULES
        if _within(module, rule.package)
        and not any(_within(module, exempt) for exempt in rule.exempt)
        and any(_within(name, forbidden) for forbidden in rule.forbidden)
        and not any(_within(name, allowed) for allowed in rule.allowed)
    ]


def _modules() -> Iterator[tuple[Path, str]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if ".venv" in parts:  # An environment of its own, of tools that the installation needs.
                continue
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_import_follows_the_rules() -> None:
    modules = list(_modules())
    assert {"tasks.media.probe", "tasks.plan", "flows.cli", "infra.pools"} <= {module for _, module in modules}
    found = [
        violation
        for path, module in modules
        for violation in violations(path.read_text(), module, is_package=path.name == "__init__.py")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tasks.plan", "import flows"),
        ("tasks.plan", "from flows.upscale_video import upscale_video"),
        ("tasks.plan", "def late():\n    from infra.pools import pool"),
        ("tasks.plan", "import importlib\nimportlib.import_module('blocks.pools')"),
        ("tasks.media.probe", "from prefect import task"),
        ("tasks.media.probe", "import dask.array"),
        ("tasks.media.probe", "import torch"),
        ("tasks.media.probe", "from tasks.plan import Plan"),
        ("tasks.media.probe", "from ..plan import Plan"),
        ("tasks.media.probe", "from .. import plan"),
        ("tasks.store.listing", "import prefect_aws.credentials\nimport prefect"),
        ("tasks.store.upload", "from tasks.media.encoders import file_digest"),
        ("infra.aws.lambda.handler", "from tasks.errors import StoreError"),
        ("infra.aws.stacks.data", "from tasks.ledger.dynamodb import create_table"),
        ("infra.aws.stacks.data", "from tasks.home import default_home"),
        ("infra.aws.cluster.pools", "import prefect"),
        ("infra.pools.pool", "from tasks.ledger import table"),
        ("tasks.models.engine", "if True:\n    from distributed import get_worker"),
        ("tasks.ledger.ledger", "from tasks.plan import Plan"),
        ("tasks.ledger.sqlite", "def late():\n    from prefect import task"),
        ("infra.pools.pool", "from tasks import errors, plan"),
        ("infra.pools.pool", "from flows import cli"),
        ("flows.cli", "from tests.media.clips import Clips"),
    ],
)
def test_the_scanner_catches_a_planted_violation(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tasks.media.colour", "import torch"),
        ("tasks.media.probe", "from .pixels import Colour\nfrom tasks.errors import SourceError"),
        ("tasks.models.engine", "import torch\nfrom tasks.media.colour import PlanesToRgb"),
        ("tasks.ledger", "from tasks.aws import AwsSettings\nfrom tasks.home import default_home"),
        ("infra.pools.pool", "from tasks.errors import PoolError"),
        ("infra.aws.stacks.data", "from tasks.ledger import table"),
        ("flows.cli", "from tasks.request import check_request\nfrom infra.pools import open_pools"),
        ("tasks.plan", "import flowsheet"),
    ],
)
def test_the_scanner_lets_allowed_imports_through(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (("prefect.server.api.server",), ["prefect"]),
        (("flows.cli", "flows.terminal"), []),
        (("flows.upscale_video",), ["prefect"]),
        (("infra.pools.remote", *CPU_IMPORTS), ["prefect"]),
        (("infra.pools.remote", *GPU_IMPORTS), ["prefect", "torch"]),
    ],
)
def test_a_process_loads_what_it_needs(modules: tuple[str, ...], expected: list[str]) -> None:
    # lark: the grammar of IRIs, which takes longer to read than all of Prefect and which nothing here uses.
    code = f"import sys, {', '.join(modules)}\nprint(*sorted({{'lark', 'prefect', 'torch'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == expected
