"""The table of an evaluation, and the files it is kept in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from tasks.media.chunk_file import partial_path, remove_leftover

if TYPE_CHECKING:
    from pandas import DataFrame

Row: TypeAlias = dict[str, Any]
"""One clip and one model, a value for each of `COLUMNS`."""

#: What a row says, with the type that files keep it in. What does not apply, or could not be measured, is null.
COLUMNS: Final = {
    "clip": "string",
    "model": "string",
    "scale": "int64",
    "frames": "int64",
    # Of results that have a reference; see `tasks.media.quality.WithReference` and `tasks.media.vmaf`.
    "psnr": "float64",
    "psnr_worst": "float64",
    "ssim": "float64",
    "vmaf": "float64",
    "flicker": "float64",
    # Of results that have none; see `tasks.media.quality.WithoutReference`.
    "fidelity": "float64",
    "sharpness": "float64",
    "flicker_ratio": "float64",
    # Of the device, without loading the model; seconds and money for a minute of video at the rate of the clip.
    "frames_per_second": "float64",
    "gpu_seconds_per_minute": "float64",
    "cost_per_minute": "float64",
    "kept": "float64",
    "precision": "string",
    "device": "string",
    # Why there are no measures; empty if there are.
    "error": "string",
}


#: What the row of a model over all clips is called.
ALL_CLIPS: Final = "all clips"

#: Columns whose value over all clips is a mean; that of the others is said in `mean_rows`, or there is none.
_MEANS: Final = (
    *("psnr", "ssim", "vmaf", "flicker", "fidelity", "sharpness", "flicker_ratio"),
    *("gpu_seconds_per_minute", "cost_per_minute", "kept"),
)


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for each model, over the clips on which all models were judged, so that models can be compared.

    Most values are means over clips. `frames` is a sum, `psnr_worst` that of the worst frame of all, and
    `frames_per_second` counts the frames of all clips and the seconds that all of them took.

    Args:
        rows: Of one evaluation. Models that were judged on no clip are left out.

    Returns:
        Rows of the clip `ALL_CLIPS`; none if the models have no clip in common.
    """
    good = {(row["clip"], row["model"]): row for row in rows if not row["error"]}
    models = list(dict.fromkeys(model for _, model in good))
    clips = [clip for clip in dict.fromkeys(clip for clip, _ in good) if all((clip, model) in good for model in models)]
    return [_mean_row([good[clip, model] for clip in clips]) for model in models if clips]


def _mean_row(rows: Sequence[Row]) -> Row:
    mean: Row = {**dict.fromkeys(COLUMNS), "clip": ALL_CLIPS, "error": ""}
    mean |= {name: rows[0][name] for name in ("model", "scale", "precision")}
    mean["frames"] = sum(row["frames"] for row in rows)
    if rows[0]["psnr_worst"] is not None:
        mean["psnr_worst"] = min(row["psnr_worst"] for row in rows)
    for name in _MEANS:
        values = [row[name] for row in rows if row[name] is not None]
        mean[name] = sum(values) / len(values) if values else None
    if rows[0]["frames_per_second"] is not None:
        mean["frames_per_second"] = mean["frames"] / sum(row["frames"] / row["frames_per_second"] for row in rows)
    return mean


def as_frame(rows: Sequence[Row]) -> DataFrame:
    """Rows as a table of pandas, with the types of `COLUMNS`."""
    import pandas

    return pandas.DataFrame(list(rows), columns=list(COLUMNS)).astype(COLUMNS)


def write_results(rows: Sequence[Row], plots: Mapping[str, bytes], folder: Path) -> dict[str, Any]:
    """Write `evaluation.csv`, `evaluation.parquet` and the plots.

    Args:
        rows: The table.
        plots: SVG files by name.
        folder: Made if it is not there.

    Returns:
        The paths `csv` and `parquet`, and a list of paths `plots`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = as_frame(rows)
    csv, parquet = folder / "evaluation.csv", folder / "evaluation.parquet"
    _write(csv, table.to_csv(index=False).encode())
    _write(parquet, table.to_parquet(index=False))
    paths = [folder / f"{name}.svg" for name in plots]
    for path, content in zip(paths, plots.values(), strict=True):
        _write(path, content)
    return {"csv": str(csv), "parquet": str(parquet), "plots": [str(path) for path in paths]}


def as_markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a table in Markdown, without columns that say nothing."""
    shown = [name for name in columns if any(row[name] not in (None, "") for row in rows)]
    lines = [[name.replace("_", " ") for name in shown], ["---"] * len(shown)]
    lines += [["" if row[name] is None else _text(row[name]) for name in shown] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears when it is complete."""
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        remove_leftover(partial)
