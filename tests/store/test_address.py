"""Addresses: what names an object, what a path, and what neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import SettingsError
from tasks.store.address import Address, local_path, parse
from tasks.store.settings import StoreSettings


def test_an_address_is_read_and_written() -> None:
    for text in ("s3://archive/1998/Der Film?#&%20.MP4", "s3://my.bucket-1/ä/…/x", "s3://archive/a//b"):
        address = parse(text)
        assert address is not None
        assert str(address) == text
    assert parse("S3://archive/a/b.MkV") == Address("archive", "a/b.MkV")
    assert (Address("archive", "a/b.MkV").name, Address("archive", "a/b.MkV").suffix) == ("b.MkV", ".mkv")
    assert Address("archive", "a/b.MkV").content_type == "video/x-matroska"


@pytest.mark.parametrize("text", ["film.mp4", "/a/b:c.mp4", "file:///a/b.mp4", "a://b"[1:], "~/film.mp4", ""])
def test_a_local_path_is_no_address(text: str) -> None:
    assert parse(text) is None


def test_a_file_uri_names_a_path() -> None:
    assert local_path("file:///a/b%20c.mp4") == Path("/a/b c.mp4")
    assert local_path("file://localhost/a") == Path("/a")
    assert local_path("a/b%20c.mp4") == Path("a/b%20c.mp4")
    with pytest.raises(SettingsError, match="another machine"):
        local_path("file://host/a")


@pytest.mark.parametrize(
    "text",
    [
        "http://bucket/key",
        "gs://bucket/key",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/folder/",
        "s3:///key",
        "s3://ab/key",
        "s3://Bucket/key",
        "s3://under_score/key",
        "s3://-bucket/key",
        "s3://bucket-/key",
        "s3://buc..ket/key",
        "s3://192.168.0.1/key",
        "s3://user@bucket/key",
        "s3://" + "b" * 64 + "/key",
        "s3://bucket/../key",
        "s3://bucket/a/./key",
        "s3://bucket/a/..",
        "s3://bucket/a\nb",
        "s3://bucket/a\x00",
        "s3://bucket/" + "ä" * 513,
        "s3://bucket/\udc80",
    ],
)
def test_what_no_object_can_be_called_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        parse(text)


def test_a_key_may_be_as_long_as_s3_allows() -> None:
    assert parse("s3://bucket/" + "ä" * 512) is not None


def test_an_object_is_found_in_the_innermost_mount() -> None:
    settings = StoreSettings(
        mounts=(("s3://archive", "/fsx/all"), ("s3://archive/films/", "/fsx/films"), ("s3://other/x", "/fsx/x"))
    )
    assert settings.mount_of(Address("archive", "films/a/b.mp4")) == Path("/fsx/films/a/b.mp4")
    assert settings.mount_of(Address("archive", "filmsets/b.mp4")) == Path("/fsx/all/filmsets/b.mp4")
    assert settings.mount_of(Address("other", "x/b.mp4")) == Path("/fsx/x/b.mp4")
    assert settings.mount_of(Address("other", "xy/b.mp4")) is None
    assert settings.mount_of(Address("archive", "films//b.mp4")) is None, "a path cannot name it"
    with pytest.raises(SettingsError):
        StoreSettings(mounts=(("/archive", "/fsx"),))
