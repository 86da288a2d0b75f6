"""The picture of a run: who worked on which chunk when."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from flows.artifacts.timeline import draw_timeline
from tasks.chunk_report import StageReport
from tasks.place import Place

SVG = "{http://www.w3.org/2000/svg}"
BEGUN = 1_700_000_000.0

#: Numbers in the picture have one digit after the point.
ROUNDING = 0.1

#: A stage too short to see is drawn this wide.
LEAST = 1.0


@dataclass(frozen=True)
class Bar:
    """One stage as it is drawn."""

    stage: str
    chunk: int
    left: float
    top: float
    width: float
    height: float
    colour: str

    @property
    def right(self) -> float:
        return self.left + self.width


class Picture:
    """A timeline, read back."""

    def __init__(self, svg: str) -> None:
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        self.width, self.height = float(root.attrib["width"]), float(root.attrib["height"])
        assert root.attrib["viewBox"] == f"0 0 {root.attrib['width']} {root.attrib['height']}"
        self.texts = [(text.text or "", dict(text.attrib)) for text in root.iter(f"{SVG}text")]
        self.bars = [self._bar(rect) for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]

    def _bar(self, rect: ElementTree.Element) -> Bar:
        title = rect.findtext(f"{SVG}title") or ""
        found = re.fullmatch(r"(\w+) of chunk (\d+): [\d.]+ s", title)
        assert found, title
        left, top, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        return Bar(found[1], int(found[2]), left, top, width, height, rect.attrib["fill"])

    @property
    def rows(self) -> list[list[Bar]]:
        """The bars by row, from above and from the left."""
        tops = sorted({bar.top for bar in self.bars})
        return [sorted((bar for bar in self.bars if bar.top == top), key=lambda bar: bar.left) for top in tops]

    @property
    def names(self) -> list[str]:
        """What stands left of the rows, from above."""
        ends = [(float(place["y"]), text) for text, place in self.texts if place.get("text-anchor") == "end"]
        return [text for _, text in sorted(ends)]


def on(number: int) -> Place:
    """A worker."""
    return Place("node", str(number), "", 0)


def report(stage: str, chunk: int, started: float, seconds: float, where: Place, **more: bool) -> StageReport:
    return StageReport(stage, chunk, BEGUN + started, seconds, where=where, **more)


def busy_run(seed: int) -> list[StageReport]:
    """Stages of a run as they could be, on workers with one to three slots; some of them were reused."""
    chance = random.Random(seed)
    reports = []
    chunks = iter(range(1000))
    for stage, workers, slots in (("extract", 2, 3), ("upscale", 3, 1), ("encode", 2, 2)):
        for worker in range(workers):
            where = on(10 * len(stage) + worker)
            for _ in range(slots):
                now = chance.uniform(0, 50)
                for _ in range(12):
                    seconds = chance.choice([0.0, 0.02, 1.0, 30.0]) * chance.uniform(0.5, 1.5)
                    reports.append(report(stage, next(chunks), now, seconds, where))
                    now += seconds + chance.choice([0.0, 0.01, 5.0])
    reports += [StageReport.reused("extract", next(chunks)) for _ in range(5)]
    chance.shuffle(reports)
    return reports


@pytest.mark.parametrize("seed", range(5))
class TestBusyRun:
    def test_one_bar_per_stage_that_was_done(self, seed: int) -> None:
        reports = busy_run(seed)
        done = Counter((entry.stage, entry.chunk) for entry in reports if not entry.was_reused)
        assert Counter((bar.stage, bar.chunk) for bar in Picture(draw_timeline(reports)).bars) == done

    def test_bars_of_a_row_do_not_overlap(self, seed: int) -> None:
        for row in Picture(draw_timeline(busy_run(seed))).rows:
            for before, after in pairwise(row):
                most = LEAST if before.width == LEAST else 2 * ROUNDING
                assert before.right <= after.left + most

    def test_bars_are_inside(self, seed: int) -> None:
        picture = Picture(draw_timeline(busy_run(seed)))
        for bar in picture.bars:
            assert bar.left >= 0 and bar.top >= 0 and bar.width >= LEAST and bar.height > 0
            assert bar.right <= picture.width
            assert bar.top + bar.height <= picture.height

    def test_rows_lie_apart(self, seed: int) -> None:
        for above, below in pairwise(Picture(draw_timeline(busy_run(seed))).rows):
            assert above[0].top + above[0].height < below[0].top

    def test_a_row_belongs_to_one_worker(self, seed: int) -> None:
        reports = busy_run(seed)
        where = {(entry.stage, entry.chunk): str(entry.where) for entry in reports}
        picture = Picture(draw_timeline(reports))
        owners = [{where[bar.stage, bar.chunk] for bar in row} for row in picture.rows]
        assert all(len(owner) == 1 for owner in owners)
        # A worker with several slots has its name at the first of its rows only.
        named = [name for name in picture.names if name]
        assert Counter(named) == Counter({name for owner in owners for name in owner})
        assert [name for name, owner in zip(picture.names, owners, strict=True) if name and owner != {name}] == []

    def test_bars_are_as_long_as_their_stages(self, seed: int) -> None:
        reports = {(entry.stage, entry.chunk): entry for entry in busy_run(seed) if not entry.was_reused}
        bars = Picture(draw_timeline(list(reports.values()))).bars
        begun = min(entry.started for entry in reports.values())
        longest = max(bars, key=lambda bar: bar.width)
        scale = longest.width / reports[longest.stage, longest.chunk].seconds
        edge = min(bar.left for bar in bars)
        for bar in bars:
            entry = reports[bar.stage, bar.chunk]
            assert bar.width == pytest.approx(max(LEAST, entry.seconds * scale), abs=2)
            assert bar.left - edge == pytest.approx((entry.started - begun) * scale, abs=2)


class TestRows:
    def test_stages_at_the_same_time_have_rows_of_their_own(self) -> None:
        reports = [report("extract", 0, 0, 10, on(1)), report("extract", 1, 5, 10, on(1))]
        picture = Picture(draw_timeline(reports))
        assert [[bar.chunk for bar in row] for row in picture.rows] == [[0], [1]]
        assert picture.names == ["", "node job 1"] or picture.names == ["node job 1", ""]

    def test_stages_one_after_the_other_share_a_row(self) -> None:
        reports = [report("upscale", chunk, 10 * chunk, 10, on(1)) for chunk in (2, 0, 1)]
        assert [[bar.chunk for bar in row] for row in Picture(draw_timeline(reports)).rows] == [[0, 1, 2]]

    def test_gpu_workers_come_last(self) -> None:
        reports = [
            report("upscale", 0, 1, 10, on(1)),
            report("encode", 0, 11, 1, on(2)),
            report("extract", 0, 0, 1, on(3)),
        ]
        assert Picture(draw_timeline(reports)).names == ["node job 3", "node job 2", "node job 1"]

    def test_each_stage_has_its_colour_and_the_legend_shows_it(self) -> None:
        stages = ("extract", "upscale", "encode")
        svg = draw_timeline([report(stage, 0, 0, 1, on(place)) for place, stage in enumerate(stages)])
        colours = {bar.stage: bar.colour for bar in Picture(svg).bars}
        assert len(set(colours.values())) == 3
        legend = re.findall(r'<rect [^>]*fill="(#\w+)"/>\n<text [^>]*>(\w+)</text>', svg)
        assert {stage: colour for colour, stage in legend} == colours


def test_names_are_escaped() -> None:
    place = Place("<a>&\"b'", "", "", 7)
    picture = Picture(draw_timeline([report("upscale", 0, 0, 1, place)]))
    assert picture.names == ["<a>&\"b' process 7"]


def test_worker_of_this_process() -> None:
    here = StageReport("upscale", 3, BEGUN, 1.5)
    assert Picture(draw_timeline([here])).names == [str(here.where)]


@pytest.mark.parametrize("reports", [[], [StageReport.reused("extract", 0), StageReport.reused("encode", 0)]])
def test_run_in_which_nothing_was_done(reports: list[StageReport]) -> None:
    picture = Picture(draw_timeline(reports))
    assert picture.bars == []
    assert {"extract", "upscale", "encode"} <= {text for text, _ in picture.texts}


def test_stages_that_took_no_time() -> None:
    picture = Picture(draw_timeline([report("upscale", chunk, 0, 0.0, on(chunk)) for chunk in range(3)]))
    assert len(picture.bars) == 3
    assert all(bar.left >= 0 and bar.right <= picture.width for bar in picture.bars)


def test_time_axis_ends_with_the_run() -> None:
    picture = Picture(draw_timeline([report("upscale", 0, 0, 800, on(0))]))
    ticks = [text for text, _ in picture.texts if re.fullmatch(r"\d+ s", text)]
    assert ticks == ["0 s", "100 s", "200 s", "300 s", "400 s", "500 s", "600 s", "700 s", "800 s"]
