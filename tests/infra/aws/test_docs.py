"""The pages about AWS are current, and what they point at is there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from infra.aws.acknowledgements import FINDINGS
from infra.aws.cluster.instances import INSTANCE_TYPES
from infra.aws.gpus import GPUS, estimated
from infra.aws.prices import idle, of_video
from infra.aws.profiles import DEV, PROD, PROFILES
from infra.aws.synthesis import kept
from tasks.errors import SettingsError

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


class TestGpus:
    """How the page changes once a GPU was measured. The figures are made up; the rows have what real ones have."""

    @pytest.fixture
    def row(self, maker: ModuleType) -> dict[str, Any]:
        """A row as `superres bench` printed it, of a GPU that does 1000 frames a second."""
        kept = next(row for row in maker.speeds() if row["device_type"] == "cpu")
        on_gpu = {"device_type": "cuda", "device": GPUS["H100"].device, "backend": "torch", "precision": "fp16"}
        return {**kept, **on_gpu, "model": "network", "size": "640x360", "fps": 1000.0, "threads": 0}

    def table(self, maker: ModuleType, *rows: dict[str, Any]) -> list[dict[str, str]]:
        """Its rows, by the titles of columns."""
        lines = [line for line in maker.per_hour_of_video_on_gpus(list(rows)).splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return [dict(zip(cells[0], each, strict=True)) for each in cells[2:]]

    def test_without_any_the_page_says_so(self, maker: ModuleType) -> None:
        on_cpus = [row for row in maker.speeds() if row["device_type"] == "cpu"]
        assert "There are no figures for GPUs yet" in maker.per_hour_of_video_on_gpus(on_cpus)
        assert len(maker.per_hour_of_video(on_cpus).splitlines()) == 2 + len(on_cpus)

    def test_its_own_instance_is_measured_and_others_are_estimates(
        self, maker: ModuleType, row: dict[str, Any]
    ) -> None:
        text = maker.per_hour_of_video_on_gpus([row])
        assert "no figures" not in text and GPUS["H100"].device in text and "is an estimate" in text
        (cells,) = self.table(maker, row)
        assert cells["Model"] == "`network`" and cells["H100, frames/s"] == "1,000.0"
        # An hour at 24 frames/s is 86.4 s of this GPU.
        assert cells["p5.4xlarge: 1 x H100"] == f"{86.4 / 3600 * 6.880:.2f}" == "0.17"
        # 864 of 3350 GB/s, which is less than 362 of 989 TFLOP/s; 65 of 989 TFLOP/s, less than 320 of 3350 GB/s.
        assert cells["g6e.2xlarge: 1 x L40S"] == f"~{24 / (1000 * 864 / 3350) * 2.242:.2f}" == "~0.21"
        assert cells["g4dn.xlarge: 1 x T4"] == f"~{24 / (1000 * 65 / 989) * 0.526:.2f}" == "~0.19"
        # No faster by arithmetic, and eight of them.
        assert cells["p5en.48xlarge: 8 x H200"] == f"~{24 / 8000 * 63.30:.2f}" == "~0.19"

    def test_every_instance_of_a_profile_with_gpus_is_there(self, maker: ModuleType, row: dict[str, Any]) -> None:
        (cells,) = self.table(maker, row)
        queues = [queue for profile in PROFILES.values() for queue in profile.queues.queues]
        names = {each.name for queue in queues for each in queue.types if each.gpus}
        assert names and names <= {title.partition(":")[0] for title in cells if cells[title]}
        assert {bool(each.gpu) == bool(each.gpus) for each in INSTANCE_TYPES.values()} == {True}

    def test_two_gpus_that_were_measured(self, maker: ModuleType, row: dict[str, Any]) -> None:
        other = {**row, "device": GPUS["H200"].device, "fps": 1200.0}
        (cells,) = self.table(maker, row, other)
        assert (cells["H100, frames/s"], cells["H200, frames/s"]) == ("1,000.0", "1,200.0")
        assert cells["p5en.48xlarge: 8 x H200"] == f"{24 / 9600 * 63.30:.2f}" == "0.16"
        # The estimate that promises less: from the H200, whose memory is faster by more than it is.
        assert estimated(1200, GPUS["H200"], GPUS["L40S"]) < estimated(1000, GPUS["H100"], GPUS["L40S"])
        assert cells["g6e.2xlarge: 1 x L40S"] == f"~{24 / (1200 * 864 / 4800) * 2.242:.2f}" == "~0.25"

    def test_of_another_precision_nothing_is_estimated(self, maker: ModuleType, row: dict[str, Any]) -> None:
        (cells,) = self.table(maker, {**row, "precision": "fp32"})
        assert cells["p5.4xlarge: 1 x H100"] == "0.17" and cells["g6e.2xlarge: 1 x L40S"] == ""

    def test_nothing_is_estimated_where_its_kernels_do_not_run(self, maker: ModuleType, row: dict[str, Any]) -> None:
        (cells,) = self.table(maker, {**row, "backend": "cuda"})
        assert cells["g4dn.xlarge: 1 x T4"] == "" and cells["g6e.2xlarge: 1 x L40S"] == "~0.21"

    def test_it_is_not_among_the_cpus(self, maker: ModuleType, row: dict[str, Any]) -> None:
        assert "network" not in maker.per_hour_of_video([row])

    def test_a_gpu_that_is_not_known(self, maker: ModuleType, row: dict[str, Any]) -> None:
        with pytest.raises(SettingsError, match=r"H100 PCIe.*gpus\.py"):
            maker.per_hour_of_video_on_gpus([{**row, "device": "NVIDIA H100 PCIe"}])

    def test_measurements_are_found_beside_those_of_cpus(
        self, maker: ModuleType, row: dict[str, Any], tmp_path: Path
    ) -> None:
        for name, model in (("speed-h100.json", "second"), ("speed.json", "first"), ("scaling.json", "none")):
            (tmp_path / name).write_text(json.dumps({"results": [{**row, "model": model}]}))
        assert [each["model"] for each in maker.speeds(tmp_path)] == ["first", "second"]
