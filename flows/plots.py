"""Plots of an evaluation: what a model gains, and what it takes.

    %matplotlib inline
    rows = evaluate(["a.mp4", "b.mp4"], ["compact-x2", "RealESRGAN_x2plus"])["rows"]
    quality_against_speed(rows)

Both functions take the rows that the flow `evaluate` returns and give a figure of matplotlib, which is loaded when one
of them is called. Rows without measures are left out.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from flows.evaluation_files import Row, mean_rows
from tasks.media.pictures import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that stay apart for colour-blind readers (Okabe and Ito, 2008). Yellow is left out: it is lost on white.
_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")
_MARKS: Final = ("o", "s", "^", "D")

_BASELINES: Final = {"bicubic": ("#666666", "--"), "lanczos": ("#999999", ":")}
"""Colour and line of what is no model; they have no speed."""

_RESTORED: Final = {"psnr": "PSNR of luma (dB)", "vmaf": "VMAF (0 to 100)"}
_UNCOMPARED: Final = {"sharpness": "sharpness (bicubic = 1)", "fidelity": "fidelity to the source (dB)"}

_GAINS: Final = {"psnr": "gain in PSNR over bicubic (dB)", "sharpness": "gain in sharpness over bicubic (%)"}

#: Speeds are shown on an axis that spans at least this factor to each side.
_LEAST_SPAN: Final = 2.0

_DOTS_PER_INCH: Final = 110


def quality_against_speed(rows: Sequence[Row]) -> Figure:
    """Mean quality of each model against its speed, with a faint mark for each clip.

    Means are those of `mean_rows`: over the clips that all models have in common. Baselines, which have no speed, are
    lines.

    Args:
        rows: Of one evaluation.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    good, means = [row for row in rows if not row["error"]], mean_rows(rows)
    measures = {name: text for name, text in _measures(good).items() if any(row[name] is not None for row in good)}
    models = [name for name in _names(good) if name not in _BASELINES]
    height = max(3.6, 1.8 + 0.22 * len(models))
    figure = Figure(figsize=(3.0 + 3.6 * len(measures), height), layout="constrained")
    for place, (measure, text) in enumerate(measures.items()):
        axes: Axes = figure.add_subplot(1, len(measures), place + 1)
        for name, (colour, line) in _BASELINES.items():
            for mean in _judged(means, name, measure):
                axes.axhline(mean[measure], color=colour, linestyle=line, linewidth=1.2, label=name)
        for number, name in enumerate(models):
            timed = _judged(good, name, measure)
            style: dict[str, Any] = {"color": _colour(number), "marker": _mark(number), "linestyle": "none"}
            axes.plot(
                [row["frames_per_second"] for row in timed],
                [row[measure] for row in timed],
                markersize=4,
                alpha=0.35,
                **style,
            )
            for mean in _judged(means, name, measure):
                axes.plot([mean["frames_per_second"]], [mean[measure]], markersize=9, label=name, **style)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        middle = (low * high) ** 0.5
        axes.set_xlim(min(low, middle / _LEAST_SPAN), max(high, middle * _LEAST_SPAN))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("frames per second (faster to the right)")
        axes.set_ylabel(text)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if measures:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle("Quality against speed; large marks are means over clips", fontsize=10)
    return figure


def gains_over_bicubic(rows: Sequence[Row]) -> Figure:
    """What each model gains over bicubic interpolation: a mark for each clip, and the mean.

    In PSNR where there is a reference, else in sharpness.

    Args:
        rows: Of one evaluation.
    """
    from matplotlib.figure import Figure

    good = [row for row in rows if not row["error"]]
    measure = next(iter(_measures(good)))
    plain = {row["clip"]: row[measure] for row in _judged(good, "bicubic", measure)}
    names = [name for name in _names(good) if name != "bicubic"]
    figure = Figure(figsize=(8.0, 1.2 + 0.36 * max(2, len(names))), layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.axvline(0, color=_BASELINES["bicubic"][0], linestyle=_BASELINES["bicubic"][1], linewidth=1.2)
    models = [name for name in names if name not in _BASELINES]
    for height, name in enumerate(names):
        colour = _colour(models.index(name)) if name in models else _BASELINES[name][0]
        gains = [
            _gain(measure, row[measure], plain[row["clip"]])
            for row in _judged(good, name, measure)
            if row["clip"] in plain
        ]
        if not gains:
            continue
        mean = sum(gains) / len(gains)
        axes.plot(gains, [height] * len(gains), "o", color=colour, markersize=5, alpha=0.4)
        axes.plot([mean], [height], "D", color=colour, markersize=9)
        axes.annotate(f"{mean:+.2f}", (mean, height), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.margins(x=0.08)
    axes.set_xlabel(_GAINS[measure])
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("A mark for each clip; diamonds are means", fontsize=10)
    return figure


def svg(figure: Figure) -> bytes:
    """A figure as an SVG file, the same bytes for the same figure."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "evaluation"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def as_data_uri(figure: Figure) -> str:
    """A figure as a PNG picture that a page can hold in its text."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DOTS_PER_INCH)
    return data_uri(content.getvalue(), "png")


def _measures(rows: Sequence[Row]) -> Mapping[str, str]:
    return _RESTORED if any(row["psnr"] is not None for row in rows) else _UNCOMPARED


def _gain(measure: str, value: float, plain: float) -> float:
    return value - plain if measure == "psnr" else 100 * (value / plain - 1)


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _judged(rows: Sequence[Row], name: str, measure: str) -> list[Row]:
    """The rows of a model that have a measure."""
    return [row for row in rows if row["model"] == name and row[measure] is not None]


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _mark(number: int) -> str:
    # Seven colours and four marks: no two of 28 models look alike, nor do neighbours where colours cannot be seen.
    return _MARKS[number % len(_MARKS)]
