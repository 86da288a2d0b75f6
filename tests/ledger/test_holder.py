"""A process counts as gone only where that is sure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tasks.ledger.holder import Holder, is_gone, this_holder
from tests.ledger.jobs import ELSEWHERE
from tests.waiting import eventually

_TELL = """
import sys
from tasks.ledger.holder import this_holder
holder = this_holder()
print(holder.host, holder.pid, holder.token, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], Holder]]:
    """Another process and who it says it is."""
    process = subprocess.Popen(
        [sys.executable, "-c", _TELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    )
    assert process.stdout is not None
    host, pid, token = process.stdout.readline().split()
    yield process, Holder(host, int(pid), token)
    process.kill()
    process.communicate()


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_running_process_is_not_gone(other: tuple[subprocess.Popen[str], Holder]) -> None:
    assert not is_gone(this_holder())
    assert not is_gone(other[1])
    assert this_holder() == this_holder() != other[1]


def test_a_killed_process_is_gone_even_before_its_parent_has_noticed(
    other: tuple[subprocess.Popen[str], Holder],
) -> None:
    process, holder = other
    process.kill()
    eventually(lambda: is_gone(holder), 5)
    process.wait()
    assert is_gone(holder)


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it() -> None:
    here = this_holder()
    assert is_gone(replace(here, token=f"{here.token}1"))


@pytest.mark.parametrize(
    "unknown", [ELSEWHERE, Holder(), Holder("here", 2**22), replace(this_holder(), pid=2**22, token="a boot/a space/1")]
)
def test_a_process_that_cannot_be_looked_at_is_not_gone(unknown: Holder) -> None:
    assert not is_gone(unknown)
