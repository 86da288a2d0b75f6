"""Finding videos: the same of a folder and of a prefix, and nothing that is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tasks.aws
from tasks.errors import SettingsError, SourceError, StoreError
from tasks.store.listing import Found, find_videos
from tasks.store.objects import head
from tasks.store.settings import StoreSettings
from tests.fault_proxy import internal_error, refused
from tests.store.conftest import Store

NAMES = [
    *("b.mp4", "a/Film.MKV", "a/ü #?%20.mov", "a/b/c/deep.ts", "z.mp4/inner.avi"),
    *(
        "notes.txt",
        "mp4",
        "a/.hidden.mp4",
        ".hidden/film.mp4",
        "film.partial.mp4",
        ".film.mp4.job.partial",
        "a/x.mp4.download",
    ),
]
VIDEOS = ["a/Film.MKV", "a/b/c/deep.ts", "a/ü #?%20.mov", "b.mp4", "z.mp4/inner.avi"]


def _names(settings: StoreSettings, where: str | Path) -> list[str]:
    return [video.name for video in find_videos(settings, str(where))]


def _fill(folder: Path) -> Path:
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_videos_of_a_folder_are_found_sorted(tmp_path: Path) -> None:
    folder = _fill(tmp_path / "films")
    found = list(find_videos(StoreSettings(), str(folder)))
    assert [video.name for video in found] == VIDEOS
    assert found[3] == Found(str(folder / "b.mp4"), 5, f"5-{(folder / 'b.mp4').stat().st_mtime_ns}", "b.mp4")
    assert _names(StoreSettings(), folder.as_uri()) == VIDEOS
    assert _names(StoreSettings(), folder / "b.mp4") == ["b.mp4"]
    assert _names(StoreSettings(), folder / ".hidden") == ["film.mp4"], "what is asked for by name is not hidden"


def test_videos_of_a_prefix_are_found_sorted(store: Store) -> None:
    for name in NAMES:
        store.put(name.encode(), f"films/{name}")
    store.put(b"", "films/folder.mp4/")
    store.put(b"x", "films/../up.mp4")
    store.put(b"x", "films2/other.mp4")
    where = f"s3://{store.bucket}/films"
    found = list(find_videos(store.settings, where))
    assert [video.name for video in found] == VIDEOS
    assert found == list(find_videos(store.settings, where + "/"))
    facts = head(store.settings, store.address("films/b.mp4"))
    assert found[3] == Found(f"{where}/b.mp4", 5, facts.etag, "b.mp4")
    assert _names(store.settings, where + "/b.mp4") == ["b.mp4"]
    assert _names(store.settings, where + "/none") == []
    assert "films2/other.mp4" in _names(store.settings, f"s3://{store.bucket}")


def test_what_changed_has_another_version(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"1")
    (before,) = find_videos(StoreSettings(), str(tmp_path))
    path.write_bytes(b"12")
    assert next(find_videos(StoreSettings(), str(tmp_path))).version != before.version
    store.put(b"1")
    (before,) = find_videos(store.settings, f"s3://{store.bucket}")
    store.put(b"2")
    assert next(find_videos(store.settings, f"s3://{store.bucket}")).version != before.version


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = _fill(tmp_path / "outside")
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "film.mp4").write_bytes(b"film")
    (folder / "folder").symlink_to(outside)
    (folder / "link.mp4").symlink_to(outside / "b.mp4")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.mp4").symlink_to("nowhere")
    assert _names(StoreSettings(), folder) == ["film.mp4"]
    assert "b.mp4" in _names(StoreSettings(), folder / "folder"), "unless it is what was asked for"


def test_where_nothing_can_be_found_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        find_videos(StoreSettings(), str(tmp_path / "missing"))
    with pytest.raises(SourceError, match="there is no bucket nowhere-at-all"):
        find_videos(store.settings, "s3://nowhere-at-all/films")
    with pytest.raises(SettingsError, match="no known kind"):
        find_videos(store.settings, "http://archive/films")
    store.proxy.inject("ListObjectsV2", refused(403, "AccessDenied"), times=99)
    with pytest.raises(SourceError, match=r"cannot list s3://.*denied.*s3:ListBucket"):
        find_videos(store.settings, f"s3://{store.bucket}/films")
    monkeypatch.setattr(tasks.aws, "_ATTEMPTS", 1)
    nowhere = replace(store.settings, aws=replace(store.settings.aws, endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StoreError, match="cannot be reached"):
        find_videos(nowhere, "s3://archive/films")


def test_a_listing_outlives_a_fault(store: Store) -> None:
    store.put(b"1")
    store.proxy.inject("ListObjectsV2", internal_error, times=2)
    assert _names(store.settings, f"s3://{store.bucket}") == ["films/film.mp4"]
