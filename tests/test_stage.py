"""Staged sources: shared by jobs, kept for another attempt, removed when nobody needs them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tasks.aws import AwsSettings, aws_client
from tasks.errors import PoolError, SettingsError, SourceError
from tasks.stage import Source, held, look_at, on_mount, stage, staged_path, staging_note
from tasks.store.settings import StoreSettings
from tests.aws import running_aws

CONTENT = os.urandom(300_000)


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsSettings]:
    """A cloud with one video."""
    with running_aws() as aws:
        s3 = aws_client("s3", aws)
        s3.create_bucket(Bucket="videos", CreateBucketConfiguration={"LocationConstraint": aws.region})
        s3.put_object(Bucket="videos", Key="in/Film.MP4", Body=CONTENT)
        yield aws


@pytest.fixture
def source(aws: AwsSettings) -> Source:
    """The video, as a job sees it."""
    return look_at("s3://videos/in/Film.MP4", StoreSettings(aws))


def test_an_object_is_seen_with_its_version(source: Source, aws: AwsSettings) -> None:
    assert (source.uri, source.bytes, source.is_stored) == ("s3://videos/in/Film.MP4", len(CONTENT), True)
    aws_client("s3", aws).put_object(Bucket="videos", Key="in/other.mp4", Body=CONTENT[1:])
    other = look_at("s3://videos/in/other.mp4", StoreSettings(aws))
    assert other.version != source.version


def test_a_file_is_seen_with_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"1234")
    (tmp_path / "link.mp4").symlink_to(path)
    seen = look_at(str(tmp_path / "link.mp4"), StoreSettings())
    assert (seen.uri, seen.bytes, seen.is_stored) == (str(path), 4, False)
    assert look_at(path.as_uri(), StoreSettings()) == seen
    os.utime(path, ns=(1, 1))
    assert look_at(str(path), StoreSettings()).version != seen.version
    with pytest.raises(SourceError, match=r"nothing\.mp4 cannot be read \(No such file"):
        look_at(str(tmp_path / "nothing.mp4"), StoreSettings())
    with pytest.raises(SettingsError, match="of no known kind"):
        look_at("ftp://host/film.mp4", StoreSettings())


def test_a_source_is_staged_once_and_removed_at_the_end(source: Source, aws: AwsSettings, tmp_path: Path) -> None:
    with held(source, tmp_path, "job-1"):
        path = Path(stage.fn(source, str(tmp_path), StoreSettings(aws)))
        assert path == staged_path(source, tmp_path)
        assert (path.name, path.read_bytes()) == ("source.mp4", CONTENT), "nothing of its own name but the ending"
        assert staging_note(source, tmp_path).read_text() == f"{len(CONTENT)} {len(CONTENT)}"
        assert (path.parent / "jobs").read_text() == "job-1\n"
        before = path.stat()
        stage.fn(source, str(tmp_path), StoreSettings(aws))
        assert path.stat() == before
    assert not path.parent.exists()


@pytest.mark.parametrize("error", [SourceError("no video"), PoolError("no worker"), KeyboardInterrupt()])
def test_it_is_kept_for_errors_that_another_attempt_may_mend(
    source: Source, aws: AwsSettings, tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)), held(source, tmp_path, "job"):
        path = Path(stage.fn(source, str(tmp_path), StoreSettings(aws)))
        raise error
    assert path.exists() == (not isinstance(error, SourceError))


def _hold(source: Source, scratch: Path, holds: Event, end: Event) -> None:
    with held(source, scratch, "other"):
        holds.set()
        end.wait(60)


def test_it_stays_while_another_job_holds_it(source: Source, aws: AwsSettings, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    holds, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(replace(source, facts=0), tmp_path, holds, end))
    other.start()
    try:
        assert holds.wait(60)
        with held(source, tmp_path, "job"):
            path = Path(stage.fn(source, str(tmp_path), StoreSettings(aws)))
        assert path.exists()
    finally:
        end.set()
        other.join()
    assert other.exitcode == 0
    assert not path.exists(), "the last one removes it"


def test_a_mount_counts_only_where_it_shows_this_object(source: Source, aws: AwsSettings, tmp_path: Path) -> None:
    store = StoreSettings(aws, mounts=(("s3://videos/in", str(tmp_path)), ("s3://elsewhere", "/nowhere")))
    assert on_mount(source, store) is None
    (tmp_path / "Film.MP4").write_bytes(CONTENT)
    assert on_mount(source, store) == tmp_path / "Film.MP4"
    (tmp_path / "Film.MP4").write_bytes(CONTENT[1:])
    assert on_mount(source, store) is None
    assert on_mount(source, StoreSettings(aws)) is None
