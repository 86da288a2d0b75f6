"""Links: they allow what they should, no more and not for longer."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from tasks.errors import SettingsError
from tasks.store.objects import head
from tasks.store.presign import Ticket, download_url, upload_ticket
from tests.store.conftest import Store


def test_a_link_gives_the_version_it_names(store: Store) -> None:
    store.keep_versions()
    address = store.put(b"first")
    version = head(store.settings, address).version_id
    store.put(b"second")
    answer = requests.get(download_url(store.settings, address, version), timeout=30)
    assert (answer.status_code, answer.content) == (200, b"first")
    assert requests.get(download_url(store.settings, address, ""), timeout=30).content == b"second"


def test_a_link_is_signed_with_version_4_and_ends(store: Store) -> None:
    query = parse_qs(urlsplit(download_url(store.settings, store.address(), "", seconds=60)).query)
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-Expires"] == ["60"]


@pytest.mark.parametrize("name", ['a "b"; c.mp4', "Düne\r\nX: y.mp4", "100 %.mp4", None])
def test_a_link_says_under_which_name_to_save(store: Store, name: str | None) -> None:
    address = store.put(b"content")
    answer = requests.get(download_url(store.settings, address, "", file_name=name), timeout=30)
    told = answer.headers["content-disposition"]
    plain, _, extended = told.removeprefix('attachment; filename="').partition("\"; filename*=UTF-8''")
    assert requests.utils.unquote(extended) == (name or "film.mp4")
    assert not set(plain) & set('"\\;%\r\n')


def _policy(ticket: Ticket) -> dict[str, object]:
    policy = json.loads(base64.b64decode(ticket.fields["policy"]))
    assert isinstance(policy, dict)
    return policy


def test_a_ticket_allows_one_object_of_one_kind_and_size(store: Store) -> None:
    store.settings = replace(store.settings, kms_key="key")
    ticket = upload_ticket(
        store.settings, store.address("in/1.mp4"), largest_bytes=1000, content_type="video/mp4", seconds=600
    )
    conditions = _policy(ticket)["conditions"]
    assert isinstance(conditions, list)
    for condition in (
        {"bucket": store.bucket},
        {"key": "in/1.mp4"},
        {"Content-Type": "video/mp4"},
        {"x-amz-server-side-encryption": "aws:kms"},
        {"x-amz-server-side-encryption-aws-kms-key-id": "key"},
        ["content-length-range", 1, 1000],
    ):
        assert condition in conditions
    assert ticket.fields["x-amz-algorithm"] == "AWS4-HMAC-SHA256"
    left = datetime.fromisoformat(str(_policy(ticket)["expiration"])) - datetime.now(UTC)
    assert timedelta(seconds=590) < left <= timedelta(seconds=600)
    assert abs(ticket.expires - datetime.now(UTC) - left) < timedelta(seconds=5)


def test_a_form_with_a_ticket_brings_the_object(store: Store) -> None:
    ticket = upload_ticket(store.settings, store.address("in/1.mp4"), largest_bytes=1000, content_type="video/mp4")
    answer = requests.post(ticket.url, data=ticket.fields, files={"file": b"content"}, timeout=30)
    assert answer.status_code in (200, 204)
    assert store.get(store.address("in/1.mp4")) == b"content"


def test_a_ticket_does_not_show_what_it_allows(store: Store) -> None:
    ticket = upload_ticket(store.settings, store.address(), largest_bytes=10, content_type="video/mp4")
    for hidden in (ticket.url, "policy", ticket.fields["x-amz-signature"]):
        assert hidden not in repr(ticket)
        assert hidden not in str(ticket)


def test_links_without_bounds_are_refused(store: Store) -> None:
    for seconds in (0, -1, 3601):
        with pytest.raises(SettingsError, match="cannot be valid"):
            download_url(store.settings, store.address(), "", seconds=seconds)
    download_url(store.settings, store.address(), "", seconds=3600)
    for seconds, largest, key in (
        (12 * 3600 + 1, 1, "a"),
        (0, 1, "a"),
        (1, 0, "a"),
        (1, (5 << 30) + 1, "a"),
        (1, 1, "${filename}"),
    ):
        with pytest.raises(SettingsError):
            upload_ticket(
                store.settings, store.address(key), largest_bytes=largest, content_type="video/mp4", seconds=seconds
            )
