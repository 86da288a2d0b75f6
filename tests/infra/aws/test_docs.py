"""The pages about AWS are current, and what they point at is there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from infra.aws.acknowledgements import FINDINGS
from infra.aws.prices import idle, of_video
from infra.aws.profiles import DEV, PROD, PROFILES
from infra.aws.synthesis import kept

pytestmark = pytest.mark.infra

ROOT: Final = Path(__file__).parents[3]
PAGES: Final = sorted((ROOT / "docs" / "aws").glob("*.md"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_aws_docs", ROOT / "docs" / "make_aws_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current(maker: ModuleType) -> None:
    stale = [path.name for path, text in maker.pages().items() if path.read_text() != text]
    assert not stale, "make infra renews them"


def test_the_picture_shows_every_stack_and_what_each_takes_from_others(maker: ModuleType) -> None:
    templates = kept(PROD.name)
    edges = {name: maker.imports(template) for name, template in templates.items()}
    assert edges["Lustre"] == {"Security", "Network", "Storage"} and not edges["Security"]
    kinds = {body["Type"] for template in templates.values() for body in template["Resources"].values()}
    assert kinds >= set(maker.SHOWN), "nothing is to be shown that is not there"
    drawn = maker.picture(templates)
    assert set(re.findall(r'font-size="13">(\w+)<', drawn)) == set(templates)
    columns, routes = maker.routed(edges)
    assert drawn.count("marker-end") == len(routes) >= len(templates) - 1
    assert {name for column in columns for name in column} >= set(templates)


def test_what_is_taken_from_the_picture_follows_from_the_rest(maker: ModuleType) -> None:
    edges = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a", "c"}}
    assert maker.reduced(edges) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"c"}}
    assert maker.layers(edges) == [["a"], ["b"], ["c"], ["d"]]


def test_every_finding_is_in_the_list() -> None:
    said = (ROOT / "docs/aws/security.md").read_text()
    for finding in FINDINGS:
        assert finding.reason in said
        assert finding.rule.partition("[")[0] in said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_what_was_asked_for_has_a_file_and_a_test() -> None:
    text = (ROOT / "docs/aws/architecture.md").read_text()
    rows = re.findall(r"^\| .+ \| ([\w, ]+) \| `([^`]+)` \| `([^`:]+)::(\w+)` \|$", text, re.MULTILINE)
    assert len(rows) >= 20
    stacks = set(kept(PROD.name))
    for named, file, tests, test in rows:
        assert set(named.split(", ")) <= stacks
        assert (ROOT / file).is_file(), file
        functions = {
            each.name for each in ast.parse((ROOT / tests).read_text()).body if isinstance(each, ast.FunctionDef)
        }
        assert test in functions, test


def test_costs_are_sums_and_quotients() -> None:
    for profile in PROFILES.values():
        items = idle(profile)
        assert all(item.monthly > 0 for item in items)
        assert len({item.what for item in items}) == len(items)
    assert sum(item.monthly for item in idle(PROD)) > 2 * sum(item.monthly for item in idle(DEV))
    # An hour at 24 frames/s is 86,400 frames: at 240 frames/s that is six minutes of a node.
    assert of_video(240, hourly_price=10.0) == pytest.approx(1.0)
    assert of_video(240, hourly_price=10.0, rate=48) == pytest.approx(2.0)
