"""A picture of a run: one row per worker, one bar per stage of a chunk, time to the right (a Gantt chart, as SVG)."""

from __future__ import annotations

from collections.abc import Sequence
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


def draw_timeline(reports: Sequence[StageReport]) -> str:
    """Draw what each worker did when.

    Args:
        reports: The stages, in any order; those that were found finished have no bar.

    Returns:
        The text of an SVG file.
    """
    done = sorted((report for report in reports if not report.was_reused), key=lambda report: report.started)
    begun = min((report.started for report in done), default=0.0)
    span = max((report.started + report.seconds for report in done), default=1.0) - begun or 1.0
    scale = (_WIDTH - _LEFT - 20) / span
    lanes = _lanes(done)
    height = _TOP + _ROW * len(lanes) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for index, (stage, colour) in enumerate(_COLOURS.items()):
        left = _LEFT + 110 * index
        parts.append(f'<rect x="{left}" y="14" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{left + 18}" y="24">{stage}</text>')
    bottom = _TOP + _ROW * len(lanes)
    for tick in range(_TICKS + 1):
        x = _LEFT + span * tick / _TICKS * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{span * tick / _TICKS:.0f} s</text>')
    for row, (name, lane) in enumerate(lanes):
        y = _TOP + _ROW * row
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for report in lane:
            x, width = _LEFT + (report.started - begun) * scale, max(1.0, report.seconds * scale)
            title = f"{report.stage} of chunk {report.chunk}: {report.seconds:.1f} s"
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 6}" rx="2" '
                f'fill="{_COLOURS[report.stage]}"><title>{title}</title></rect>'
            )
            if width > 8 * len(str(report.chunk)):
                middle = x + width / 2
                parts.append(f'<text x="{middle:.1f}" y="{y + 15}" text-anchor="middle">{report.chunk}</text>')
    return "\n".join([*parts, "</svg>", ""])


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
