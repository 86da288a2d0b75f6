"""What is wrong is told soon, with its remedy: by `superres doctor`, and by runs before they fetch anything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from blocks.media_store import MediaStore
from blocks.pools import SlurmGpuNodes, SlurmNodes, SlurmPools
from flows.doctor import Check, examine
from flows.parameters import UpscaleOptions
from flows.upscale_video import upscale_video
from infra.pools.slurm import _gres
from tasks.aws import AwsSettings, aws_client
from tasks.errors import SuperResolutionError
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.dynamodb import create_table
from tasks.ledger.record import JobState
from tests.aws import running_aws
from tests.fault_proxy import FaultProxy, internal_error, refused, running_proxy
from tests.flows.clouds import TABLE, save_blocks
from tests.flows.jobs import make_film
from tests.infra.slurm_cluster import slurm  # noqa: F401
from tests.mounts import small_disk

#: Seconds in which somebody hears what is wrong, also on a busy machine.
_SOON: Final = 15.0


@dataclass
class Site:
    """An AWS behind a proxy, blocks called `cloud` that name it, and a film in the bucket `videos`."""

    aws: AwsSettings
    proxy: FaultProxy
    scratch: Path

    def examine(self, *readable: str, **given: Any) -> dict[str, Check]:
        wanted = {"writable": (), "pools": "local", "scratch": str(self.scratch), "store": "cloud", "ledger": "cloud"}
        began = time.monotonic()
        checks = examine(readable, **{**wanted, **given})
        assert time.monotonic() - began < _SOON
        assert all(bool(check.remedy) != check.good for check in checks)
        return {check.name: check for check in checks}

    def left(self) -> list[Any]:
        """Objects and uploads in the bucket for results."""
        s3 = aws_client("s3", self.aws)
        listed = s3.list_objects_v2(Bucket="results").get("Contents", [])
        return [*listed, *s3.list_multipart_uploads(Bucket="results").get("Uploads", [])]


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory, prefect_api: object) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("doctor")
    film = make_film(folder / "film.mp4", 24, "32x32", sound=())
    with running_aws() as aws, running_proxy(aws.endpoint_url) as proxy:
        s3 = aws_client("s3", aws)
        for bucket in ("videos", "results"):
            s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": aws.region})
        s3.upload_file(str(film), "videos", "film.mp4")
        create_table(aws, TABLE)
        save_blocks(replace(aws, endpoint_url=proxy.url))
        yield Site(aws, proxy, folder / "scratch")


@pytest.fixture
def site(cloud: Site) -> Iterator[Site]:
    cloud.proxy.clear()
    yield cloud
    cloud.proxy.clear()


def superres(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Run the command in a process of its own, without a Prefect API; gives its exit code, its JSON and its stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SUPERRES_"))}
    command = [str(Path(sys.executable).with_name("superres")), *arguments, "--json"]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_all_is_good_where_all_is_there_and_nothing_is_left_behind(site: Site) -> None:
    found = site.examine("s3://videos/film.mp4", writable=["s3://results/out"])
    assert [check.name for check in found.values() if not check.good] == []
    assert list(found) == [
        *("ffmpeg", "models", "scratch", "pools local", "ledger cloud", "store cloud"),
        *("s3://videos/film.mp4", "s3://results/out"),
    ]
    assert found["store cloud"].said == "accepts the credentials of block cloud"
    assert found["ledger cloud"].said == f"table {TABLE} can be written"
    assert "GB free" in found["scratch"].said
    assert site.left() == []
    ledger = open_ledger(LedgerSettings(table=TABLE, aws=site.aws))
    assert [record for state in JobState for record in ledger.by_state(state)] == []
    assert not site.scratch.exists()


@pytest.mark.parametrize(
    ("operation", "code", "row", "said", "remedy"),
    [
        ("CreateMultipartUpload", "AccessDenied", "s3://results/out", "access is denied", "s3:PutObject"),
        ("CreateMultipartUpload", "KMS.NotFoundException", "s3://results/out", "encryption key", "kms:GenerateDataKey"),
        ("UploadPart", "KMS.DisabledException", "s3://results/out", "encryption key", "Enable the KMS key"),
        ("HeadObject", "403", "s3://videos/film.mp4", "access is denied", "s3:GetObject"),
        ("GetItem", "AccessDeniedException", "ledger cloud", "refuses access", "Check the credentials"),
        ("PutItem", "AccessDeniedException", "ledger cloud", "refuses access", "Check the credentials"),
        ("GetItem", "ResourceNotFoundException", "ledger cloud", "does not exist", "create it"),
        ("ListObjectsV2", "InvalidAccessKeyId", "store cloud", "not accepted", "Renew them"),
        ("ListObjectsV2", "ExpiredToken", "store cloud", "not accepted", "Renew them"),
    ],
)
def test_what_is_refused_is_told_with_its_remedy(
    site: Site, operation: str, code: str, row: str, said: str, remedy: str
) -> None:
    site.proxy.inject(operation, refused(403, code), times=10)
    found = site.examine("s3://videos/film.mp4", writable=["s3://results/out"])
    assert said in found[row].said
    assert remedy in found[row].remedy
    assert row in [name for name, check in found.items() if not check.good]
    site.proxy.clear()
    assert site.left() == []


def test_credentials_that_may_not_list_buckets_are_accepted_all_the_same(site: Site) -> None:
    site.proxy.inject("ListObjectsV2", refused(403, "AccessDenied"), times=10)
    assert site.examine()["store cloud"].good


def test_one_bad_answer_is_no_bad_news(site: Site) -> None:
    site.proxy.inject("CreateMultipartUpload", internal_error)
    site.proxy.inject("HeadObject", internal_error)
    checks = site.examine("s3://videos/film.mp4", writable=["s3://results/"]).values()
    assert [check for check in checks if not check.good] == []


def test_names_that_stand_for_nothing_are_told(site: Site) -> None:
    MediaStore(credentials=None).save("own", overwrite=True)
    places = ("s3://nowhere-at-all/film.mp4", "s3://videos/nothing.mp4")
    found = site.examine(*places, writable=["s3://nowhere-at-all/out"], ledger="nobody", pools="nobody")
    assert found["s3://nowhere-at-all/film.mp4"].said == "there is no bucket nowhere-at-all"
    assert "no such object" in found["s3://videos/nothing.mp4"].said
    assert "no bucket nowhere-at-all" in found["s3://nowhere-at-all/out"].said
    assert "no block of type Job ledger called 'nobody'" in found["ledger nobody"].said
    assert "no pools called 'nobody'" in found["pools nobody"].said
    assert found["store cloud"].good
    assert "no block of type Media store called 'nobody'" in site.examine(store="nobody")["store nobody"].said


@pytest.fixture(params=["closed", "silent"])
def dead_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL where nobody listens, and one where nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_service_that_is_away_takes_seconds(site: Site, dead_end: str) -> None:
    save_blocks(replace(site.aws, endpoint_url=dead_end))
    try:
        found = site.examine("s3://videos/film.mp4", writable=["s3://results/out"])
    finally:
        save_blocks(replace(site.aws, endpoint_url=site.proxy.url))
    bad = [name for name, check in found.items() if not check.good]
    assert bad == ["ledger cloud", "store cloud", "s3://videos/film.mp4", "s3://results/out"]
    for name in bad:
        assert "cannot be reached" in found[name].said
        assert "endpoint" in found[name].remedy


def test_the_command_ends_with_the_last_check_whatever_hangs(tmp_path: Path, dead_end: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "a-secret-that-must-not-show"}
    began = time.monotonic()
    code, record, said = superres(
        *("doctor", "s3://videos/film.mp4", "--scratch", str(tmp_path)),
        **keys,
        SUPERRES_HOME=str(tmp_path / "home"),
        AWS_ENDPOINT_URL=dead_end,
    )
    assert time.monotonic() - began < 2 * _SOON
    assert (code, record["status"], record["kind"]) == (2, "failed", "settings")
    assert record["error"].startswith("not ready: store, s3://videos/film.mp4.")
    assert [check["name"] for check in record["checks"] if not check["good"]] == ["store", "s3://videos/film.mp4"]
    assert said == ""
    assert "a-secret" not in json.dumps(record)


def test_an_ffmpeg_that_does_not_run_is_told(tmp_path: Path) -> None:
    code, record, _ = superres("doctor", SUPERRES_HOME=str(tmp_path), SUPERRES_FFMPEG="/bin/false")
    assert code == 2
    (bad,) = (check for check in record["checks"] if not check["good"])
    assert (bad["name"], "does not run" in bad["said"]) == ("ffmpeg", True)
    assert "SUPERRES_FFMPEG" in bad["remedy"]


def test_people_read_one_line_for_each_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import main

    (tmp_path / "file").write_text("")
    assert main(["doctor", "--scratch", str(tmp_path / "file")]) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["good", "ffmpeg"],
        ["good", "models"],
        ["BAD", "scratch"],
        ["->", "Make"],
        ["good", "pools"],
        ["good", "ledger"],
    ]
    assert "Not a directory" in lines[2]
    assert said.err == "superres: error: not ready: scratch. See what is said about each.\n"


def fill(disk: Path) -> None:
    with pytest.raises(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.mark.parametrize(
    ("options", "full", "said"),
    [
        ("size=1m", True, "No space left"),
        ("size=1m", False, "GB free"),
        ("size=40g,nr_inodes=50", False, "room for only"),
    ],
)
def test_a_scratch_without_room_is_told(site: Site, tmp_path: Path, options: str, full: bool, said: str) -> None:
    with small_disk(tmp_path / "disk", options) as disk:
        if full:
            fill(disk)
        scratch = site.examine(scratch=str(disk / "scratch"))["scratch"]
    assert not scratch.good
    assert said in scratch.said


def test_generic_resources_are_counted_by_name() -> None:
    assert _gres("gpu:2") == _gres("gpu:a100:2(S:0-1)") == _gres("gres/gpu:2") == {"gpu": 2}
    assert _gres("gpu:a100:4(S:0-1,2),gpu:v100:1,shard:8(S:0)") == {"gpu": 5, "shard": 8}
    assert _gres("gpu") == {"gpu": 1}
    assert _gres("") == _gres("(null)") == {}


def slurm_pools(folder: Path, **gpu: Any) -> SlurmPools:
    return SlurmPools(
        cpu=SlurmNodes(partition="cpu", cores=2, memory="500MB", maximum=4),
        gpu=SlurmGpuNodes(**{"partition": "gpu", "cores": 1, "memory": "500MB", "maximum": 9, **gpu}),
        interface="lo",
        shared_directory=str(folder),
        log_directory=str(folder / "logs"),
    )


@pytest.mark.slurm
def test_a_maximum_that_the_partition_can_never_reach_is_told(site: Site, slurm: Any, tmp_path: Path) -> None:  # noqa: F811
    slurm_pools(tmp_path).save("many", overwrite=True)
    found = site.examine(pools="many")["pools many"]
    assert found.good
    assert found.said == "cpu: up to 4 workers; gpu: up to 9 workers, but partition gpu has room for 4"
    slurm_pools(tmp_path, partition="gup").save("wrong", overwrite=True)
    found = site.examine(pools="wrong")["pools wrong"]
    assert not found.good
    assert "invalid partition" in found.said
    slurm_pools(tmp_path, gres="gpu:3").save("large", overwrite=True)
    assert not site.examine(pools="large")["pools large"].good


def away_from_slurm(site: Site, patch: pytest.MonkeyPatch, stack: ExitStack, folder: Path) -> dict[str, Any]:
    patch.setenv("PATH", "/nowhere")
    return {"pools": "slurm"}


def on_a_full_disk(site: Site, patch: pytest.MonkeyPatch, stack: ExitStack, folder: Path) -> dict[str, Any]:
    disk = stack.enter_context(small_disk(folder / "disk", "size=1m"))
    fill(disk)
    return {"scratch": str(disk / "scratch")}


def refusing(operation: str, code: str) -> Callable[..., dict[str, Any]]:
    def prepare(site: Site, patch: pytest.MonkeyPatch, stack: ExitStack, folder: Path) -> dict[str, Any]:
        site.proxy.inject(operation, refused(403, code), times=10)
        return {}

    return prepare


denied = refusing("CreateMultipartUpload", "AccessDenied")
without_key = refusing("UploadPart", "KMS.NotFoundException")


def untouched(site: Site, patch: pytest.MonkeyPatch, stack: ExitStack, folder: Path) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("prepare", "source", "destination", "kind", "said"),
    [
        (untouched, "s3://nowhere-at-all/film.mp4", "s3://results/a.mp4", "source", "no bucket nowhere-at-all"),
        (untouched, "s3://videos/nothing.mp4", "s3://results/b.mp4", "source", "no such object"),
        (untouched, "s3://videos/film.mp4", "s3://nowhere-at-all/c.mp4", "destination", "no bucket nowhere-at-all"),
        (untouched, "s3://videos/film.mp4", "/nowhere/at/all/d.mp4", "destination", "does not exist"),
        (denied, "s3://videos/film.mp4", "s3://results/e.mp4", "destination", "access is denied"),
        (without_key, "s3://videos/film.mp4", "s3://results/f.mp4", "destination", "encryption key"),
        (on_a_full_disk, "s3://videos/film.mp4", "s3://results/g.mp4", "scratch", "No space left"),
        (away_from_slurm, "s3://videos/film.mp4", "s3://results/h.mp4", "pool", "sbatch is not on the PATH"),
    ],
)  # fmt: skip
def test_a_run_refuses_what_cannot_work_before_it_fetches_anything(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[..., dict[str, Any]],
    source: str,
    destination: str,
    kind: str,
    said: str,
) -> None:
    with ExitStack() as stack:
        given = {"scratch": str(tmp_path / "scratch"), "store": "cloud", "ledger": "cloud", "owner": "ann"}
        given |= prepare(site, monkeypatch, stack, tmp_path)
        began = time.monotonic()
        with pytest.raises(SuperResolutionError, match=said) as refusal:
            upscale_video(source, destination, UpscaleOptions(**given))
        assert time.monotonic() - began < _SOON
        assert refusal.value.kind == kind
        assert refusal.value.remedy
    assert site.proxy.count("GetObject") == 0
    records = open_ledger(LedgerSettings(table=TABLE, aws=site.aws)).by_owner("ann")
    (record,) = (record for record in records if record.destination == destination)
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert (record.error.kind, said in record.error.message) == (kind, True)
