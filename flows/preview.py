"""A few short excerpts through several models, side by side, before days of GPUs are spent.

Excerpts are chosen by themselves, each inside one scene and as different from one another as they come. The run shows
the same detail of each as interpolation and every model enlarge it, how fast each model is on the pools that were
asked, and what the whole video would take and cost. With `approve` it then waits for somebody to choose, holding no
workers, and upscales the whole video.

Purpose: choosing a model for a video, by hand.
Cache policy: none; every preview measures anew.
Blocks: pools, media store and job ledger, as the options name them.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any, Final, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field, create_model

from flows.parameters import PreviewOptions, Source
from flows.preview_runs import compare_models
from flows.terminal import duration
from flows.upscale_video import upscale_video
from tasks.errors import ApprovalError
from tasks.media.pictures import data_uri

#: Bytes of pictures that one report holds; the others are only in the folder.
_INLINE_BYTES: Final = 1_500_000

#: Seconds between two looks whether somebody has answered.
_LOOK_SECONDS: Final = 2


class Approval(RunInput):
    """What somebody answers who has seen the pictures."""

    go_on: bool = Field(False, title="Go on", description="Upscale the whole video.", json_schema_extra={"position": 0})
    model: str = Field("", title="Model", description="With which model.", json_schema_extra={"position": 1})
    destination: str = Field(
        "",
        title="Destination",
        description="Path or `s3://` URI of the result; its ending (.mp4, .mov, .mkv) names the container.",
        json_schema_extra={"position": 2},
    )


def _run_name() -> str:
    return f"{Path(flow_run.parameters['source']).stem} preview"


@flow(name="preview", flow_run_name=_run_name, validate_parameters=True)
def preview(source: Source, options: PreviewOptions = PreviewOptions()) -> dict[str, Any]:  # noqa: B008
    """Show what models make of a video, and what they would take for the whole of it.

    Args:
        source: Path or `s3://` URI of the video.
        options: Which models, how many excerpts, and whether to go on with one of them.

    Returns:
        `source`, `frames`, `width` and `height` of the result, `excerpts` (`first`, `last`, `start_seconds`), `models`
        (`model`, `frames_per_second`, `wall_seconds`, `gpu_seconds`, `cost`, `basis`), `pictures` (paths), and where
        somebody chose a model `approved`, with `result`, what `upscale-video` returned.

    Raises:
        ApprovalError: Nobody answered in time, or somebody named no destination.
        SuperResolutionError: The request was refused, or an excerpt or the whole video failed.
    """
    seen = compare_models(source, options)
    create_markdown_artifact(
        f"{table(seen)}\n\n{_inline(seen)}", key="preview", description=f"Preview of {Path(source).name}"
    )
    if not options.approve:
        return seen
    approved = _wait_for_approval(options, seen)
    if approved is None:
        get_run_logger().info("nobody wants the whole video; the pictures stay in %s", _folder(seen))
        return {**seen, "approved": None}
    result = upscale_video(source, approved.destination, options.upscale(approved.model))
    chosen = {"model": approved.model, "destination": approved.destination}
    return {**seen, "approved": chosen, "result": result}


def table(seen: dict[str, Any]) -> str:
    """The models of a preview with what they take, as Markdown."""
    rows = [
        "| model | frames/s of a device | until finished | GPU-hours | cost |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in seen["models"]:
        cost = "unknown" if row["cost"] is None else f"{row['cost']:.2f}"
        rows.append(
            f"| {row['model']} | {row['frames_per_second']:.2f} | {duration(row['wall_seconds'])}"
            f" | {row['gpu_seconds'] / 3600:.2f} | {cost} |"
        )
    size = f"{seen['frames']} frames at {seen['width']}x{seen['height']}"
    return "\n".join([f"What the whole video takes, {size}:", "", *rows, "", f"Speeds: {_bases(seen)}."])


def _bases(seen: dict[str, Any]) -> str:
    return "; ".join(dict.fromkeys(row["basis"] for row in seen["models"]))


def _inline(seen: dict[str, Any]) -> str:
    """The pictures of a preview as Markdown, as many as a report can hold."""
    lines, room = [], _INLINE_BYTES
    for picture in map(Path, seen["pictures"]):
        jpeg = picture.read_bytes()
        if (room := room - len(jpeg)) >= 0:
            lines.append(f"![{picture.stem}]({data_uri(jpeg)})")
    return "\n\n".join([*lines, f"All pictures are in `{_folder(seen)}`."])


def _folder(seen: dict[str, Any]) -> Path:
    return Path(seen["pictures"][0]).parent


def _field(name: str, default: str) -> Any:
    """A field of the form with another default."""
    field = copy(Approval.model_fields[name])
    field.default = default
    return field


def _wait_for_approval(options: PreviewOptions, seen: dict[str, Any]) -> Approval | None:
    """Pause until somebody has answered.

    Returns:
        The answer; `None` if it is no.

    Raises:
        ApprovalError: Nobody answered in time, or somebody named no destination.
    """
    names: Any = Literal[options.compared]
    form = create_model(
        "Approval",
        __base__=Approval,
        model=(names, _field("model", options.compared[0])),
        destination=(str, _field("destination", options.destination)),
    ).with_initial_data(description=f"{table(seen)}\n\nThe pictures are in the artifact `preview` of this run.")
    get_run_logger().info("waiting up to %g hours for somebody to choose a model", options.hours)
    try:
        answer = pause_flow_run(
            wait_for_input=form, timeout=max(1, round(options.hours * 3600)), poll_interval=_LOOK_SECONDS
        )
    except FlowPauseTimeout as error:
        raise ApprovalError(
            f"nobody chose a model within {options.hours:g} hours; the whole video was not upscaled",
            f"Look at the pictures in {_folder(seen)}, and run upscale-video with the one you like",
        ) from error
    if not answer.go_on:
        return None
    if not answer.destination:
        raise ApprovalError(
            "the whole video was approved without a destination", "Run upscale-video, and say where the result goes"
        )
    return answer
