"""From a bucket to a bucket: the result, the record, the metrics, and that nothing is done twice."""

from __future__ import annotations

import base64
import io
import json
import logging
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from blocks.media_store import MediaStore
from tasks.aws import aws_client
from tasks.errors import AccessError, DestinationError, SettingsError, SourceError
from tasks.ledger.record import JobState
from tests.aws import CREDENTIALS
from tests.flows.clouds import NAMESPACE, TABLE, Cloud, running_cloud
from tests.flows.jobs import GROUP, make_film
from tests.media.witness import packets
from tests.waiting import eventually

CLIP = Path(__file__).parents[3] / "shared/media/bbb-10s.mp4"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A cloud of its own for the tests of this module."""
    with running_cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


def test_a_video_goes_from_bucket_to_bucket(cloud: Cloud) -> None:
    source = cloud.put("in/film one.mp4")
    result = cloud.upscale(source, "film.mp4")
    assert (result["status"], result["output"], result["frames_out"]) == (
        "published",
        "s3://results/film.mp4",
        2 * GROUP,
    )
    record = cloud.record(result)
    assert record.state == JobState.PUBLISHED
    assert record.source == source
    assert record.frames_done == record.frames_total == 2 * GROUP
    assert set(record.phase_seconds) == {"stage", "extract", "upscale", "encode", "assemble", "verify", "publish"}
    assert [step.state for step in record.history] == list(JobState)[:7]
    assert record.output is not None
    assert record.output["version_id"] == cloud.versions("film.mp4")[0]
    stored = cloud.s3.get_object(Bucket="results", Key="film.mp4")
    assert len(stored["Body"].read()) == record.output["bytes"]
    assert stored["Metadata"]["job"] == record.job_id
    assert list((cloud.folder / "scratch").rglob("*.*")) == []
    assert cloud.unfinished_uploads() == []

    again = cloud.upscale(source, "film.mp4")
    assert again["skipped"]
    assert cloud.versions("film.mp4") == [record.output["version_id"]]


def test_metrics_are_the_sums_of_the_record(cloud: Cloud) -> None:
    began = datetime.now(UTC)
    record = cloud.record(cloud.upscale(cloud.put("in/measured.mp4"), "measured.mp4", model="compact-x4", scale=4))
    assert record.metrics["Frames.upscale"] == 2 * GROUP
    assert record.metrics["Seconds.encode"] > 0
    watch = aws_client("cloudwatch", cloud.aws)
    for name, total in record.metrics.items():
        metric, _, phase = name.partition(".")
        pool = "gpu" if phase == "upscale" else "cpu"
        dimensions = {"phase": phase, "model": "compact-x4", "pool": pool}
        points = watch.get_metric_statistics(
            Namespace=NAMESPACE,
            MetricName=metric,
            Dimensions=[{"Name": key, "Value": value} for key, value in dimensions.items()],
            StartTime=began - timedelta(minutes=2),
            EndTime=datetime.now(UTC) + timedelta(minutes=2),
            Period=3600,
            Statistics=["Sum"],
        )["Datapoints"]
        assert sum(point["Sum"] for point in points) == pytest.approx(total, rel=1e-6, abs=1e-9), name
    assert record.phase_seconds["upscale"] == pytest.approx(record.metrics["Seconds.upscale"], abs=0.01)


def test_a_changed_source_is_another_job_and_needs_another_name(cloud: Cloud, tmp_path: Path) -> None:
    first = cloud.upscale(cloud.put("in/changing.mp4"), "changing.mp4")
    other = make_film(tmp_path / "other.mp4", GROUP, "64x48")
    source = cloud.put("in/changing.mp4", other)
    with pytest.raises(DestinationError, match=r"s3://results/changing\.mp4 exists already"):
        cloud.upscale(source, "changing.mp4")
    assert len(cloud.versions("changing.mp4")) == 1
    second = cloud.upscale(source, "changing.mp4", overwrite=True)
    assert second["job_id"] != first["job_id"]
    assert (second["frames_out"], second["width"]) == (GROUP, 128)
    assert len(cloud.versions("changing.mp4")) == 2


def test_only_the_owner_gets_record_and_link(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    result = cloud.upscale(cloud.put("in/private.mp4"), "private.mp4")
    with pytest.raises(AccessError) as refusal:
        cloud.ledger.get(result["job_id"], "bob")
    with pytest.raises(AccessError) as missing:
        cloud.ledger.get("0" * 16, "bob")
    assert str(refusal.value).replace(result["job_id"], "0" * 16) == str(missing.value)

    assert cloud.command("bob", "share", result["job_id"]) == AccessError.exit_code
    assert cloud.command("bob", "jobs", result["job_id"]) == AccessError.exit_code
    said = capsys.readouterr()
    assert "X-Amz" not in said.out + said.err
    assert "private" not in said.out + said.err

    assert cloud.command("ann", "share", result["job_id"]) == 0
    link = capsys.readouterr().out.strip()
    with urllib.request.urlopen(link) as answer:
        content = answer.read()
    assert len(content) == cloud.record(result).output["bytes"]  # type: ignore[index]
    assert parse_qs(urlsplit(link).query)["X-Amz-Expires"] == ["900"]

    assert cloud.command("ann", "jobs") == 0
    assert result["job_id"] in capsys.readouterr().out
    assert cloud.command("bob", "jobs") == 0
    assert result["job_id"] not in capsys.readouterr().out


def test_a_ticket_lets_somebody_upload_one_video(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud.command("ann", "upload-ticket", "s3://videos/uploads/ann/new.mp4", "--largest", "0.001") == 0
    ticket = json.loads(capsys.readouterr().out)
    with cloud.film.open("rb") as film:
        answer = requests.post(ticket["url"], data=ticket["fields"], files={"file": film}, timeout=30)
    assert answer.status_code in (200, 204)
    stored = cloud.s3.get_object(Bucket="videos", Key="uploads/ann/new.mp4")
    assert stored["Body"].read() == cloud.film.read_bytes()
    policy = json.loads(base64.b64decode(ticket["fields"]["policy"]))
    assert ["content-length-range", 1, 1_000_000] in policy["conditions"]
    assert cloud.command("ann", "upload-ticket", str(cloud.film)) == SettingsError.exit_code


def test_secrets_and_links_are_kept_nowhere(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger()
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    log.addHandler(handler)
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs", "botocore"):
        logging.getLogger(name).addHandler(handler)
    result = cloud.upscale(cloud.put("in/secret.mp4"), "secret.mp4")
    with pytest.raises(SourceError):
        cloud.upscale("s3://videos/in/nothing.mp4", "nothing.mp4")
    assert cloud.command("ann", "share", result["job_id"]) == 0
    link = capsys.readouterr().out.strip()
    signature = parse_qs(urlsplit(link).query)["X-Amz-Signature"][0]
    kept: dict[str, bytes] = {}

    def everything_is_written() -> bool:
        kept.update((str(path), path.read_bytes()) for path in cloud.home.rglob("*") if path.is_file())
        return any(b"published s3://results/secret.mp4" in content for content in kept.values())

    eventually(everything_is_written)
    table = aws_client("dynamodb", cloud.aws).scan(TableName=TABLE)["Items"]
    kept |= {"log": written.getvalue().encode(), "table": repr(table).encode()}
    assert sum(map(len, kept.values())) > 100_000, "there is something to look through"
    assert any(result["job_id"].encode() in content for content in kept.values())
    for secret in (CREDENTIALS["AWS_SECRET_ACCESS_KEY"], signature, "X-Amz-Signature", "AWSAccessKeyId="):
        found = [name for name, content in kept.items() if secret.encode() in content]
        assert found == [], secret


def test_what_lustre_shows_is_not_copied(cloud: Cloud, tmp_path: Path) -> None:
    mount = tmp_path / "fsx"
    mount.mkdir()
    source = cloud.put("archive/shown.mp4")
    (mount / "shown.mp4").write_bytes(cloud.film.read_bytes())
    store = MediaStore.load("cloud")
    store.mounts = {"s3://videos/archive": str(mount)}
    store.save("mounted", overwrite=True)
    record = cloud.record(cloud.upscale(source, "shown.mp4", store="mounted"))
    assert record.state == JobState.PUBLISHED
    assert record.source == source
    assert "stage" not in record.phase_seconds

    (mount / "shown.mp4").write_bytes(b"half of it")
    record = cloud.record(cloud.upscale(source, "copied.mp4", store="mounted"))
    assert "stage" in record.phase_seconds, "another file than the object is not taken for it"


def test_what_cannot_work_is_refused_before_anything_is_copied(cloud: Cloud) -> None:
    source = cloud.put("in/refused.mp4")
    cloud.s3.put_object(Bucket="results", Key="there.mp4", Body=b"somebody's work")
    text = cloud.folder / "text.mp4"
    text.write_text("no video")
    for given, name, error, kind in [
        (source, "there.mp4", DestinationError, "destination"),
        ("s3://videos/in/missing.mp4", "missing.mp4", SourceError, "source"),
        ("s3://no-such-bucket/in/missing.mp4", "missing.mp4", SourceError, "source"),
        (source, "film.avi", SettingsError, "settings"),
        (cloud.put("in/text.mp4", text), "text.mp4", SourceError, "source"),
    ]:
        with pytest.raises(error):
            cloud.upscale(given, name)
        failed = [record for record in cloud.ledger.by_owner("ann", limit=1) if record.source == given]
        assert [(record.state, record.error and record.error.kind) for record in failed] == [(JobState.FAILED, kind)]
    assert cloud.s3.get_object(Bucket="results", Key="there.mp4")["Body"].read() == b"somebody's work"
    assert [path for path in (cloud.folder / "scratch").rglob("*") if path.is_file()] == []
    assert cloud.unfinished_uploads() == []


@pytest.mark.skipif(not CLIP.exists(), reason="needs the clip bbb-10s.mp4")
def test_a_real_clip(cloud: Cloud) -> None:
    source = cloud.put("in/bbb-10s.mp4", CLIP)
    result = cloud.upscale(source, "bbb-10s.mp4")
    record = cloud.record(result)
    assert (result["frames_out"], record.frames_done, record.state) == (302, 302, JobState.PUBLISHED)
    filled = {name for name, value in record.to_dict().items() if value not in (None, "", {}, [], 0)}
    assert set(record.to_dict()) - filled == {"error", "cost", "slurm_jobs"}, "there is no error, price nor Slurm here"
    path = cloud.folder / "real.mp4"
    cloud.s3.download_file("results", "bbb-10s.mp4", str(path))
    assert len(packets(path, 0)) == 302
    assert cloud.upscale(source, "bbb-10s.mp4")["skipped"]
