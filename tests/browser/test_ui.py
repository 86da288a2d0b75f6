"""An operator in a browser, from an empty machine: finds the deployment, fills the form, watches, reads, cancels.

Pictures of every screen are kept in `$SUPERRES_SCREENSHOTS`, or in the folder of the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import pytest
from playwright.sync_api import Page, expect

from infra.debian import PackagesError
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.record import JobState
from tasks.media.sample import FRAMES, write_sample
from tests.browser.chromium import running_chromium
from tests.flows.jobs import PATIENCE
from tests.installation import Installation
from tests.media.clips import run_ffmpeg
from tests.waiting import eventually

pytestmark = pytest.mark.browser

#: Where runs end.
_ENDED: Final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

#: Characters of the log that a failure shows.
_LOG_SHOWN: Final = 6000

#: Milliseconds in which a page shows what it is waited for, also on a busy machine.
_PAGE: Final = 60_000


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    try:
        with running_chromium() as browser:
            page = browser.new_page(viewport={"width": 1400, "height": 1300})
            page.set_default_timeout(_PAGE)
            expect.set_options(timeout=_PAGE)
            yield page
    except PackagesError as error:
        pytest.skip(f"chromium is not installed, and could not be fetched ({error})")


class Operator:
    """Somebody at the browser, who keeps a picture of each screen."""

    def __init__(self, page: Page, installation: Installation, pictures: Path) -> None:
        self.page, self.installation, self.pictures = page, installation, pictures
        self.pictures.mkdir(parents=True, exist_ok=True)

    def go(self, path: str) -> None:
        self.page.goto(f"{self.installation.address}{path}")

    def keep(self, name: str) -> None:
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def run(self, source: Path, destination: str) -> str:
        """Start a run of `upscale-video` through its form, and open its page; gives its id."""
        self.go("/deployments")
        row = self.page.get_by_role("row").filter(has_text="upscale-video")
        row.get_by_role("link", name="local").click()
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_text("Custom run").click()
        expect(self.page.get_by_text("Denoise strength")).to_be_visible()
        run = self._submit(str(source), destination)
        self.go(f"/runs/flow-run/{run}")
        expect(self.page.get_by_role("button", name="Cancel")).to_be_visible()
        return str(run)

    def _submit(self, source: str, destination: str) -> str:
        """Fill the form, and again where it was drawn anew meanwhile, until there is a run."""
        before = {run["id"] for run in self.installation.runs("upscale-video")}

        def submitted() -> str | None:
            return next((run["id"] for run in self.installation.runs("upscale-video") if run["id"] not in before), None)

        for seconds in (20, 20, 60):
            boxes = self.page.locator("textarea")
            boxes.nth(0).fill(source)
            boxes.nth(1).fill(destination)
            self.keep("form")
            self.page.get_by_role("button", name="Submit").click()
            with suppress(AssertionError):
                return str(eventually(submitted, seconds))
            self.keep("not-submitted")
        raise AssertionError("the form submits nothing")

    def artifact(self, run: str, key: str, text: str = "") -> dict[str, Any]:
        """Wait for an artifact of a run with this text in its description."""
        wanted = {"flow_run_id": {"any_": [run]}, "key": {"any_": [key]}}
        self.page.goto("about:blank")  # A timeline that moves takes half a core where there is no GPU.

        seen: list[str] = []

        def found() -> dict[str, Any] | None:
            # Asked for first: what a run that has ended then does not have, it never will.
            state = self.installation.state(run)
            there: list[dict[str, Any]] = self.installation.ask("/artifacts/filter", artifacts=wanted)
            seen[:] = [state, *(str(one["description"]) for one in there)]
            fitting = next((one for one in there if text in str(one["description"])), None)
            assert fitting or state not in _ENDED, f"the run ended {state}"
            return fitting

        try:
            shown: dict[str, Any] = eventually(found, PATIENCE)
        except AssertionError as error:
            self.go(f"/runs/flow-run/{run}")
            self.page.wait_for_load_state("networkidle")
            self.keep("missed")
            log = self.installation.log.read_text(errors="replace")[-_LOG_SHOWN:]
            raise AssertionError(
                f"no artifact {key!r} with {text!r} of run {run}: {error}. Last seen: {seen}. "
                f"A picture is in {self.pictures}/missed.png. What server, worker and runs said last:\n{log}"
            ) from error
        return shown

    def open(self, artifact: dict[str, Any]) -> None:
        self.go(f"/artifacts/artifact/{artifact['id']}")


@pytest.fixture
def operator(page: Page, installation: Installation, tmp_path: Path) -> Operator:
    return Operator(page, installation, Path(os.environ.get("SUPERRES_SCREENSHOTS") or tmp_path / "screens"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "sample.mp4"
    write_sample(path)
    return path


def test_a_run_from_the_form_to_the_report(operator: Operator, sample: Path) -> None:
    page = operator.page
    operator.go("/deployments")
    for flow in ("upscale-video", "upscale-library", "preview", "evaluate", "flight-check", "housekeeping"):
        expect(page.get_by_role("row").filter(has_text=flow)).to_be_visible()
    operator.keep("deployments")

    (sample.parent / "results").mkdir()
    run = operator.run(sample, f"{sample.parent}/results/")
    progress = operator.artifact(run, "progress", "frames/s")
    assert f"of {FRAMES} frames" in progress["description"]
    assert "gpu 1" in progress["description"]
    operator.go(f"/runs/flow-run/{run}")
    expect(page.get_by_text("sample x2 compact").first).to_be_visible()
    page.locator("#artifacts").click()
    expect(page.get_by_text(f"of {FRAMES} frames").first).to_be_visible()
    operator.keep("progress")

    operator.open(operator.artifact(run, "comparison"))
    picture = page.locator("img[src^='data:image/jpeg']")
    expect(picture).to_be_visible()
    width, height = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert width > height > 100
    operator.keep("comparison")

    operator.go(f"/runs/flow-run/{run}")
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=1000 * PATIENCE)
    page.locator("#artifacts").click()
    expect(page.get_by_text("Result of sample.mp4")).to_be_visible()
    operator.keep("run")
    operator.open(operator.artifact(run, "result"))
    expect(page.get_by_text("Read back and compared with the source")).to_be_visible()
    expect(page.get_by_text("Fidelity", exact=True)).to_be_visible()
    timeline = page.locator("img[src^='data:image/svg']")
    expect(timeline).to_be_visible()
    assert timeline.evaluate("image => image.naturalWidth") > 400
    operator.keep("report")
    operator.open(operator.artifact(run, "chunks"))
    expect(page.get_by_text("0-47", exact=True)).to_be_visible()
    operator.keep("chunks")
    assert (sample.parent / "results/sample.mp4").stat().st_size > 0


def test_a_wrong_form_is_refused_before_a_run_starts(operator: Operator, sample: Path) -> None:
    before = len(operator.installation.runs("upscale-video"))
    operator.go(f"/deployments/deployment/{operator.installation.deployment('upscale-video')}/run")
    boxes = operator.page.locator("textarea")
    boxes.nth(0).fill(str(sample))
    boxes.nth(1).fill("result.avi")
    operator.page.get_by_role("button", name="Submit").click()
    expect(operator.page.get_by_text("does not match").first).to_be_visible()
    operator.keep("refused")
    assert len(operator.installation.runs("upscale-video")) == before


def test_a_cancelled_run_is_shown_as_cancelled_and_its_workers_are_gone(
    operator: Operator, sample: Path, tmp_path: Path
) -> None:
    film = tmp_path / "film.mp4"
    # To draw so many frames would take longer than all the rest.
    run_ffmpeg("-stream_loop", "9", "-i", sample, "-map", "0:v", "-c:v", "libx264", "-preset", "veryfast", film)
    run = operator.run(film, f"{tmp_path}/large.mp4")
    operator.artifact(run, "progress", "frames/s")
    ledger = open_ledger(LedgerSettings(file=str(operator.installation.home / "jobs.sqlite")))
    (record,) = [record for record in ledger.by_state(JobState.UPSCALING) if record.flow_run_id == run]
    operator.go(f"/runs/flow-run/{run}")
    processes = [record.holder.pid, *children_of(record.holder.pid)]
    assert len(processes) > 2
    operator.page.get_by_role("button", name="Cancel").click()
    operator.keep("cancel")
    operator.page.get_by_role("button", name="Confirm").click()
    expect(operator.page.get_by_text("Cancelled", exact=True).first).to_be_visible()
    operator.keep("cancelled")
    eventually(lambda: not any(Path("/proc", str(pid)).exists() for pid in processes))
    state = httpx.get(f"{operator.installation.api}/flow_runs/{run}", timeout=30).json()["state_name"]
    assert state == "Cancelled"
    assert not (tmp_path / "large.mp4").exists()


def children_of(pid: int) -> list[int]:
    """All processes that came out of one."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
