"""A picture of a run: one row per worker, one bar per stage of a chunk, time to the right (a Gantt chart, as SVG)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

from tasks.chunk_report import StageReport

#: Colours that stay apart for colour-blind readers and on black (Okabe and Ito, 2008).
_COLOURS: Final = {"extract": "#56b4e9", "upscale": "#e69f00", "encode": "#009e73"}
_WIDTH: Final = 900
_LEFT: Final = 210
_ROW: Final = 24
_TOP: Final = 46
_TICKS: Final = 8
#: Seconds by which bars may overlap and still follow one another: what rounding makes of times since the epoch.
_TOUCHING: Final = 1e-3

#: Pixels between bars that are drawn as one, tried in this order until a picture is small enough.
_GAPS: Final = (0.0, 1.0, 4.0, 16.0, 64.0, float(_WIDTH))


def draw_timeline(reports: Sequence[StageReport]) -> str:
    """Draw what each worker did when.

    Args:
        reports: The stages, in any order; those that were found finished have no bar.

    Returns:
        The text of an SVG file.
    """
    chart = _Chart.of(reports)
    parts = chart.frame()
    for row, (_, lane) in enumerate(chart.lanes):
        y = _TOP + _ROW * row
        for report in lane:
            x, width = chart.place(report)
            title = f"{report.stage} of chunk {report.chunk}: {report.seconds:.1f} s"
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 6}" rx="2" '
                f'fill="{_COLOURS[report.stage]}"><title>{title}</title></rect>'
            )
            parts += _number(report, x, width, y)
    return "\n".join([*parts, "</svg>", ""])


def draw_small_timeline(reports: Sequence[StageReport], most_bytes: int) -> str | None:
    """The same picture for a page that is kept in a database: one path per row and stage, without titles.

    Args:
        reports: The stages, in any order.
        most_bytes: How large it may be. Where it would be larger, stages of one row that nearly touch become one bar.

    Returns:
        The text of an SVG file; `None` if even the workers alone are too many.
    """
    chart = _Chart.of(reports)
    for gap in _GAPS:
        parts = chart.frame()
        for row, (_, lane) in enumerate(chart.lanes):
            y = _TOP + _ROW * row
            for stage, colour in _COLOURS.items():
                own = [chart.place(report) for report in lane if report.stage == stage]
                path = "".join(_outline(x, width, y) for x, width in _merged(own, gap))
                if path:
                    parts.append(f'<path fill="{colour}" d="{path}"/>')
            if not gap:
                parts += [text for report in lane for text in _number(report, *chart.place(report), y)]
        svg = "\n".join([*parts, "</svg>", ""])
        if len(svg.encode()) <= most_bytes:
            return svg
    return None


@dataclass(frozen=True)
class _Chart:
    """What is drawn, and the scale of time.

    Attributes:
        lanes: Rows, each with what stands to its left.
        begun: When the first stage began, seconds since the epoch.
        span: Seconds until the last one ended.
    """

    lanes: list[tuple[str, list[StageReport]]]
    begun: float
    span: float

    @classmethod
    def of(cls, reports: Sequence[StageReport]) -> _Chart:
        done = sorted((report for report in reports if not report.was_reused), key=lambda report: report.started)
        begun = min((report.started for report in done), default=0.0)
        ended = max((report.started + report.seconds for report in done), default=1.0)
        return cls(_lanes(done), begun, ended - begun or 1.0)

    def place(self, report: StageReport) -> tuple[float, float]:
        """Left edge and width of a bar, in pixels."""
        scale = (_WIDTH - _LEFT - 20) / self.span
        return _LEFT + (report.started - self.begun) * scale, max(1.0, report.seconds * scale)

    def frame(self) -> list[str]:
        """All but the bars."""
        bottom = _TOP + _ROW * len(self.lanes)
        height = bottom + 34
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        ]
        for index, (stage, colour) in enumerate(_COLOURS.items()):
            left = _LEFT + 110 * index
            parts.append(f'<rect x="{left}" y="14" width="12" height="12" fill="{colour}"/>')
            parts.append(f'<text x="{left + 18}" y="24">{stage}</text>')
        for tick in range(_TICKS + 1):
            x = _LEFT + (_WIDTH - _LEFT - 20) * tick / _TICKS
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}" stroke="#ddd"/>')
            seconds = f"{self.span * tick / _TICKS:.{0 if self.span >= 2 * _TICKS else 1}f} s"
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{seconds}</text>')
        for row, (name, _) in enumerate(self.lanes):
            y = _TOP + _ROW * row + 15
            parts.append(f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end">{escape(name)}</text>')
        return parts


def _number(report: StageReport, x: float, width: float, y: int) -> list[str]:
    """The number of a chunk on its bar, where there is room for it."""
    if width <= 8 * len(str(report.chunk)):
        return []
    return [f'<text x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle">{report.chunk}</text>']


def _outline(x: float, width: float, y: int) -> str:
    """A bar as part of a path; a little narrower, where there is room for that, so that it ends before the next one."""
    width = max(width - 0.8, min(width, 2.0))
    return f"M{x:.1f} {y + 2}h{width:.1f}v{_ROW - 6}h-{width:.1f}z"


def _merged(bars: Sequence[tuple[float, float]], gap: float) -> Iterator[tuple[float, float]]:
    """Bars of one row from the left, those less than `gap` pixels apart as one; with no gap as they are."""
    pending: tuple[float, float] | None = None
    for x, width in bars:
        if pending is not None and gap and x - (pending[0] + pending[1]) < gap:
            pending = (pending[0], max(pending[1], x + width - pending[0]))
            continue
        if pending is not None:
            yield pending
        pending = (x, width)
    if pending is not None:
        yield pending


def _lanes(reports: Sequence[StageReport]) -> list[tuple[str, list[StageReport]]]:
    """Rows of stages that do not overlap; a worker with several slots takes several rows under one name."""
    workers: dict[str, list[list[StageReport]]] = {}
    for report in reports:
        lanes = workers.setdefault(str(report.where), [])
        ended = report.started + _TOUCHING
        free = next((lane for lane in lanes if lane[-1].started + lane[-1].seconds <= ended), None)
        if free is None:
            lanes.append(free := [])
        free.append(report)
    # GPU workers last: the eye goes from the many short bars to the few long ones.
    order = sorted(workers.items(), key=lambda item: (item[1][0][0].stage == "upscale", item[1][0][0].started))
    return [(name if not index else "", lane) for name, lanes in order for index, lane in enumerate(lanes)]
