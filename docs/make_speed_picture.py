"""Draws `speed.svg` and writes the tables in `speed.md`: of CPUs from `speed.json`, of GPUs from `speed-*.json`.

superres bench ... --reference --json > docs/speed.json
superres bench ... --reference --json > docs/speed-h100.json
python docs/make_speed_picture.py
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent

#: Colours that stay apart for colour-blind readers (Okabe and Ito, 2008).
COLOURS = {"RealESRGANer": "#999999", "fp32": "#0072b2", "bf16": "#009e73", "int8": "#e69f00"}


def case_of(result: dict[str, Any]) -> tuple[str, str]:
    """What contenders have in common: the model and the size of the source."""
    return result["model"], result["size"]


def draw(results: list[dict[str, Any]]) -> None:
    """Bars of frames per second, a group for each model and size."""
    groups = [(case, list(found)) for case, found in groupby(results, case_of)]
    figure, axes = plt.subplots(figsize=(9, 0.8 * len(groups) + 1), layout="constrained")
    for place, (_, found) in enumerate(groups):
        bars = {"RealESRGANer": found[0]["reference_fps"], **{each["precision"]: each["fps"] for each in found}}
        for row, (name, fps) in enumerate(bars.items()):
            y = place + 0.8 / len(bars) * (row - (len(bars) - 1) / 2)
            axes.barh(y, fps, 0.75 / len(bars), color=COLOURS[name], label=name if place == 0 else None)
            factor = "" if row == 0 else f"  ({found[row - 1]['ratio']:.1f} times)"
            axes.text(fps, y, f" {fps:.2f}{factor}", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [f"{model}\n{size}" for (model, size), _ in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("frames per second")
    axes.set_xlim(right=axes.get_xlim()[1] * 2)
    axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "speed"
    figure.savefig(DOCS / "speed.svg", metadata={"Date": None})


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| Model | Source | Precision | frames/s | `RealESRGANer` | Ratio | TFLOP/s | Of peak | Memory | First frame |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| `{result['model']}` | {result['size']} | {result['precision']} | {result['fps']:.2f}"
            f" | {result['reference_fps']:.2f} | {result['ratio']:.2f} | {result['tflops']:.2f}"
            f" | {result['share_of_peak']:.0%} | {result['peak_memory_bytes'] / 1e6:.0f} MB"
            f" | {result['first_frame_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def table_of_gpus(results: list[dict[str, Any]]) -> str:
    """Results of GPUs in Markdown."""
    lines = [
        "| Model | Source | frames/s | `RealESRGANer` | Ratio | TFLOP/s | Of peak | GPU memory | First frame |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        has_reference = "reference_fps" in result
        reference = f"{result['reference_fps']:.2f} | {result['ratio']:.1f}" if has_reference else "|"
        lines.append(
            f"| `{result['model']}` | {result['size']} | {result['fps']:.1f} | {reference} | {result['tflops']:.0f}"
            f" | {result['share_of_peak']:.0%} | {result['peak_gpu_memory_bytes'] / 1e9:.1f} GB"
            f" | {result['first_frame_seconds']:.1f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Draw and write."""
    results = _results("speed.json")
    draw(results)
    page = DOCS / "speed.md"
    text = _with_table(page.read_text(), "table", table(results))
    for path in sorted(DOCS.glob("speed-*.json")):
        text = _with_table(text, path.stem, table_of_gpus(_results(path.name)))
    page.write_text(text)


def _results(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((DOCS / name).read_text())["results"]
    return found


def _with_table(text: str, name: str, made: str) -> str:
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda match: match[1] + made + "\n" + match[2], text)


if __name__ == "__main__":
    main()
