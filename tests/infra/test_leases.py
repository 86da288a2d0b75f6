"""How long workers held their nodes."""

from __future__ import annotations

import socket
import time
from itertools import pairwise

import pytest

from infra.pools.leases import Lease, Leases


class TestSeconds:
    @pytest.mark.parametrize(
        ("since", "until", "seconds"),
        [
            (100.0, 200.0, 100.0),  # The same time.
            (0.0, 300.0, 100.0),  # All of it.
            (120.0, 150.0, 30.0),  # A part in the middle.
            (0.0, 150.0, 50.0),  # The beginning.
            (150.0, 300.0, 50.0),  # The end.
            (0.0, 100.0, 0.0),  # Before.
            (0.0, 50.0, 0.0),
            (200.0, 300.0, 0.0),  # After.
            (250.0, 300.0, 0.0),
            (150.0, 150.0, 0.0),  # No time at all.
            (180.0, 120.0, 0.0),  # Backwards.
        ],
    )
    def test_of_an_ended_lease(self, since: float, until: float, seconds: float) -> None:
        assert Lease("gpu", "gpu-0", 100.0, 200.0).seconds(since, until) == seconds

    @pytest.mark.parametrize(
        ("since", "until", "seconds"),
        [(0.0, 300.0, 200.0), (150.0, 300.0, 150.0), (0.0, 100.0, 0.0), (0.0, 50.0, 0.0), (400.0, 500.0, 100.0)],
    )
    def test_of_one_that_is_held(self, since: float, until: float, seconds: float) -> None:
        assert Lease("gpu", "gpu-0", 100.0).seconds(since, until) == seconds


def ended(leases: Leases, pool: str, worker: str, started: float, end: float | None) -> Lease:
    """A lease with given times."""
    lease = leases.begin(pool, worker)
    lease.started, lease.ended = started, end
    return lease


class TestNodeSeconds:
    def test_are_added_up_by_pool(self) -> None:
        leases = Leases()
        ended(leases, "gpu", "gpu-0", 100.0, 200.0)
        ended(leases, "gpu", "gpu-1", 150.0, None)
        ended(leases, "cpu", "cpu-0", 90.0, 110.0)
        assert leases.node_seconds(100.0, 180.0) == {"cpu": 10.0, "gpu": 110.0}
        assert list(leases.node_seconds(0.0, 1.0)) == ["cpu", "gpu"]

    def test_of_a_name_used_again(self) -> None:
        leases = Leases()
        ended(leases, "gpu", "gpu-0", 100.0, 200.0)
        ended(leases, "gpu", "gpu-0", 300.0, 350.0)
        ended(leases, "gpu", "gpu-0", 400.0, None)
        assert leases.node_seconds(150.0, 410.0) == {"gpu": 110.0}
        assert leases.node_seconds(200.0, 300.0) == {"gpu": 0.0}

    def test_of_neighbouring_times_add_up(self) -> None:
        leases = Leases()
        ended(leases, "gpu", "gpu-0", 100.0, 200.0)
        ended(leases, "gpu", "gpu-0", 220.0, None)
        ended(leases, "gpu", "gpu-1", 0.0, 1000.0)
        borders = (0.0, 100.0, 130.5, 200.0, 210.0, 500.0)
        parts = [leases.node_seconds(*pair)["gpu"] for pair in pairwise(borders)]
        assert sum(parts) == leases.node_seconds(borders[0], borders[-1])["gpu"] == 880.0

    def test_until_now_by_default(self) -> None:
        leases = Leases()
        ended(leases, "gpu", "gpu-0", time.time() - 50, None)
        assert leases.node_seconds(time.time() - 20)["gpu"] == pytest.approx(20.0, abs=1)
        assert leases.node_seconds(0.0)["gpu"] == pytest.approx(50.0, abs=1)

    def test_of_no_leases(self) -> None:
        assert Leases().node_seconds(0.0, 100.0) == {}


class TestBeginAndEnd:
    def test_open_lease_is_begun_once(self) -> None:
        leases = Leases()
        lease = leases.begin("gpu", "gpu-0", "node-3")
        assert leases.begin("gpu", "gpu-0", "node-4") is lease
        assert (lease.node, lease.ended) == ("node-3", None)
        assert lease.started == pytest.approx(time.time(), abs=5)
        assert list(leases) == [lease]

    def test_ended_lease_is_followed_by_another(self) -> None:
        leases = Leases()
        first = leases.begin("gpu", "gpu-0")
        leases.end("gpu-0")
        second = leases.begin("gpu", "gpu-0")
        assert second is not first
        assert first.ended is not None and first.started <= first.ended <= second.started
        assert leases.latest("gpu-0") is second
        assert list(leases) == [first, second]

    def test_end_counts_once(self) -> None:
        leases = Leases()
        lease = leases.begin("gpu", "gpu-0")
        leases.end("gpu-0")
        lease.ended = 123.0
        leases.end("gpu-0")
        assert lease.ended == 123.0

    def test_end_of_a_worker_that_never_began(self) -> None:
        leases = Leases()
        leases.end("gpu-0")
        assert leases.latest("gpu-0") is None
        assert list(leases) == []

    def test_leases_may_begin_while_others_are_counted(self) -> None:
        leases = Leases()
        leases.begin("gpu", "gpu-0")
        seen = []
        for lease in leases:
            seen.append(lease.worker)
            leases.begin("gpu", "gpu-1")
        assert seen == ["gpu-0"]

    def test_node_is_this_machine_by_default(self) -> None:
        assert Leases().begin("gpu", "gpu-0").node == socket.gethostname()


@pytest.mark.parametrize(
    ("lease", "text"),
    [
        (Lease("gpu", "gpu-0", 0.0, node="n1", job="77", log="/l/77.log"), "gpu-0 on n1, Slurm job 77, log /l/77.log"),
        (Lease("gpu", "gpu-0", 0.0, node="n1"), "gpu-0 on n1"),
        (Lease("gpu", "gpu-0", 0.0), "gpu-0 on an unknown node"),
    ],
)
def test_place_in_words(lease: Lease, text: str) -> None:
    assert str(lease) == text
