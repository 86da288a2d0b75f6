"""Models on clips: which one to choose, by quality, speed and cost.

Some seconds from the middle of each clip are enlarged by each model and by two classical kernels. To `restore`, the
frames are shrunk and coded first, so that the result can be compared with what it should be; without a reference the
clip itself is enlarged and only judged by what can be seen without one. The result is one row for each clip and model:
as a table and as plots in the UI, and as CSV, Parquet and SVG files.

Purpose: before an archive is upscaled, or when a model comes in that others say is better.
Cache policy: none; everything in scratch goes away with the run.
Blocks: none needed. Options can name a block of pools, whose price of a GPU worker gives the costs, and a media store.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks.site import load_store
from flows.evaluation_files import COLUMNS, Row, as_markdown, mean_rows, write_results
from flows.parameters import EvaluateOptions
from flows.plots import as_data_uri, gains_over_bicubic, quality_against_speed, svg
from flows.pools import pools_of_flow_run, site_of_flow_run
from flows.staging import reachable
from flows.stopping import LOOK_SECONDS, check_stop, first_failure
from infra.pools import PoolTaskRunner
from tasks.contenders import Contender, find_contender, with_baselines
from tasks.errors import DestinationError, EvaluationError, SuperResolutionError
from tasks.evaluate import Speed, enlarge, interpolate, measure, prepare
from tasks.excerpts import Excerpt, check_named, find_all, find_excerpt, numbered, refuse
from tasks.home import default_home
from tasks.request import check_room, check_scratch, scratch_folder
from tasks.scratch import give_up, note_job, own_job
from tasks.stage import Source, look_at
from tasks.store.settings import StoreSettings

#: Rows of the table in the UI.
_TABLE_ROWS: Final = 1000

#: Digits behind the point in rows.
_DIGITS: Final = 4


def _run_name() -> str:
    """For example `3 clips x 2 models`."""
    counts = {what: len(flow_run.parameters[what]) for what in ("clips", "models")}
    return " x ".join(f"{count} {what if count != 1 else what[:-1]}" for what, count in counts.items())


@flow(
    name="evaluate",
    flow_run_name=_run_name,
    task_runner=PoolTaskRunner(pools_of_flow_run),  # type: ignore[arg-type]
    validate_parameters=True,
)
def evaluate(
    clips: list[str],
    models: list[str],
    options: EvaluateOptions = EvaluateOptions(),  # noqa: B008
) -> dict[str, Any]:
    """Compare models on clips.

    Args:
        clips: Paths or `s3://` URIs of videos.
        models: Names of model cards, or paths of weight files. Bicubic and Lanczos interpolation always take part.
        options: How.

    Returns:
        `rows`, one for each clip and model (see `COLUMNS`), and the paths `csv`, `parquet` and `plots`.

    Raises:
        EvaluationError: Some models failed on some clips; the other rows are there.
        SuperResolutionError: A clip, a model or an option cannot be used; nothing was done.
    """
    folder = _results_folder(options.folder)
    site, store = site_of_flow_run(options), load_store(options.store)
    scratch = scratch_folder(options.scratch or site.scratch)
    check_scratch(scratch)
    price = site.hourly_prices.get("gpu") or None
    with _checked(clips, models, options, store, scratch) as (excerpts, contenders):
        _check_space(excerpts, site.capacity.window, scratch)
        with _work_folder(scratch) as work:
            rows = _judge(excerpts, contenders, options.precision, price, work, site.capacity.window)
    return _report(rows, folder, options)


@contextmanager
def _checked(
    clips: Sequence[str], models: Sequence[str], options: EvaluateOptions, store: StoreSettings, scratch: Path
) -> Iterator[tuple[list[Excerpt], list[Contender]]]:
    """Have all clips within reach of the workers while the block runs; whatever cannot be used is refused together."""
    check_named(clips, models)
    refusals: list[SuperResolutionError] = []
    contenders = with_baselines(find_all(lambda model: find_contender(model, options.scale), models, refusals))
    sources = find_all(lambda clip: look_at(clip, store), clips, refusals)
    with ExitStack() as stack:

        def excerpt_of(source: Source) -> Excerpt:
            path = stack.enter_context(reachable(source, scratch, store, str(flow_run.get_id())))
            return find_excerpt(source.uri, Path(path), options.mode, options.scale, options.seconds, options.crf)

        found: dict[str, Excerpt] = {}
        # What lies here first: nothing is downloaded for an evaluation that will be refused.
        for is_stored in (False, True):
            among = [source for source in sources if source.is_stored == is_stored]
            found |= {excerpt.clip: excerpt for excerpt in find_all(excerpt_of, among, refusals)}
            refuse(refusals)
        yield numbered(found[source.uri] for source in sources), contenders


@contextmanager
def _work_folder(scratch: Path) -> Iterator[Path]:
    """A folder in scratch for this run, which is gone afterwards."""
    run = str(flow_run.get_id())
    folder = scratch / xxhash.xxh3_128_hexdigest(f"evaluate {run}".encode())[:16]
    try:
        with own_job(folder):
            note_job(folder, run)
            yield folder
    finally:
        give_up(folder)


def _results_folder(named: str) -> Path:
    """Where results go, which can be made and written.

    Raises:
        DestinationError: It cannot.
    """
    made = f"{time.strftime('%Y%m%d-%H%M%S')}-{str(flow_run.get_id())[:8]}"
    folder = Path(named).expanduser().absolute() if named else default_home() / "evaluations" / made
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return folder
    except OSError as error:
        raise DestinationError(
            f"results cannot be written into {folder} ({error.strerror})", "Choose another folder"
        ) from error


def _check_space(excerpts: Sequence[Excerpt], window: int, scratch: Path) -> None:
    needed = sum(excerpt.bytes for excerpt in excerpts) + window * max(excerpt.result_bytes for excerpt in excerpts)
    check_room(scratch, needed, "this evaluation needs about", "choose another scratch folder, or fewer seconds")


@dataclass
class _Trial:
    """One contender on one excerpt: its futures, in order."""

    excerpt: Excerpt
    number: int
    contender: Contender
    futures: tuple[PrefectFuture[Any], ...]


def _judge(
    excerpts: Sequence[Excerpt],
    contenders: Sequence[Contender],
    precision: str,
    price: float | None,
    work: Path,
    window: int,
) -> list[Row]:
    """Try every contender on every excerpt, at most `window` trials at a time; one that fails stops no other."""
    logger = get_run_logger()
    prepared = {excerpt.index: prepare.submit(excerpt, str(work), excerpt.label) for excerpt in excerpts}
    # A GPU loads each model once this way, and the kernels, which need none, do not keep it waiting.
    order = sorted(enumerate(contenders), key=lambda item: not item[1].is_model)
    waiting = deque((excerpt, number, contender) for number, contender in order for excerpt in excerpts)
    ended: queue.SimpleQueue[_Trial] = queue.SimpleQueue()
    rows: dict[tuple[int, int], Row] = {}
    running, total = 0, len(waiting)
    while waiting or running:
        while waiting and running < window:
            excerpt, number, contender = waiting.popleft()
            _submit(excerpt, number, contender, precision, work, prepared[excerpt.index], ended.put)
            running += 1
        check_stop()
        try:
            trial = ended.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            continue
        running -= 1
        row = rows[trial.excerpt.index, trial.number] = _row(trial, price)
        if row["error"]:
            logger.warning("%s on %s: %s", row["model"], row["clip"], row["error"])
        else:
            logger.info("%s on %s is judged, %d of %d", row["model"], row["clip"], len(rows), total)
    return [row for _, row in sorted(rows.items())]


def _submit(
    excerpt: Excerpt,
    number: int,
    contender: Contender,
    precision: str,
    work: Path,
    prepared: PrefectFuture[None],
    put: Callable[[_Trial], None],
) -> None:
    label, folder = f"{excerpt.label} {contender.label}", str(work)
    enlarged: PrefectFuture[Any]
    if contender.is_model:
        enlarged = enlarge.submit(
            excerpt, contender, number, precision, folder, label, return_state=False, wait_for=[prepared]
        )
    else:
        enlarged = interpolate.submit(
            excerpt, contender, number, folder, label, return_state=False, wait_for=[prepared]
        )
    measured = measure.submit(excerpt, number, folder, label, return_state=False, wait_for=[enlarged])
    trial = _Trial(excerpt, number, contender, (prepared, enlarged, measured))
    measured.add_done_callback(lambda _: put(trial))


def _row(trial: _Trial, price: float | None) -> Row:
    excerpt, contender = trial.excerpt, trial.contender
    row: Row = dict.fromkeys(COLUMNS)
    row |= {"clip": excerpt.label, "model": contender.label, "scale": excerpt.scale, "frames": excerpt.frames}
    row["error"] = ""
    if (found := first_failure(trial.futures)) is not None:
        _, failure = found
        known = isinstance(failure, SuperResolutionError)
        return {**row, "error": " ".join((str(failure) if known else repr(failure)).split())}
    _, enlarged, measured = (future.result() for future in trial.futures)
    row |= {name: None if value is None else round(value, _DIGITS) for name, value in measured.items()}
    if isinstance(enlarged, Speed):
        row |= _speed(enlarged, float(excerpt.table.rate), price)
    return row


def _speed(speed: Speed, rate: float, price: float | None) -> Row:
    """What a minute of video takes of a worker of the `gpu` pool, and costs."""
    gpu_seconds = 60 * rate / speed.frames_per_second
    return {
        "frames_per_second": speed.frames_per_second,
        "gpu_seconds_per_minute": round(gpu_seconds, _DIGITS),
        "cost_per_minute": None if price is None else round(price * gpu_seconds / 3600, 6),
        "kept": speed.kept,
        "precision": speed.engine["precision"],
        "device": speed.engine["device"],
    }


def _report(rows: list[Row], folder: Path, options: EvaluateOptions) -> dict[str, Any]:
    """Write the results, show them, and say what failed."""
    logger = get_run_logger()
    good, failed = ([row for row in rows if bool(row["error"]) == is_bad] for is_bad in (False, True))
    figures = {}
    if good:
        figures = {"quality-speed": quality_against_speed(good), "gains": gains_over_bicubic(good)}
    files = write_results(rows, {name: svg(figure) for name, figure in figures.items()}, folder)
    if options.mode == "restore" and good and all(row["vmaf"] is None for row in good):
        logger.warning("the ffmpeg in use has no libvmaf: there is no VMAF")
    judged = f"{len(good)} of {len(rows)} pairs of clip and model judged"
    shown = [column for column in COLUMNS if any(row[column] not in (None, "") for row in rows)]
    create_table_artifact(
        [{column: row[column] for column in shown} for row in rows[:_TABLE_ROWS]],
        key="evaluation",
        description=f"{judged}; {options.mode}, x{options.scale}",
    )
    pictures = [f"![{name}]({as_data_uri(figure)})" for name, figure in figures.items()]
    means = as_markdown(mean_rows(rows), [name for name in COLUMNS if name != "clip"])
    said = f"{judged}. Means over the clips that all models have in common; files are in `{folder}`."
    create_markdown_artifact("\n\n".join([said, means, *pictures]), key="evaluation-plots")
    result = {"rows": rows, **files}
    logger.info("%s; results are in %s", judged, folder)
    if failed:
        names = "; ".join(f"{row['model']} on {row['clip']}: {row['error']}" for row in failed)
        raise EvaluationError(
            f"{len(failed)} of {len(rows)} pairs failed: {names}", f"All rows are in {folder}", result
        )
    return result
