"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.cores import _cgroup_quota, usable_cores


def test_quota_of_control_group_counts(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/job/step\n")
    folder = tmp_path / "cgroup" / "job" / "step"
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("max 100000\n")
    assert _cgroup_quota(tmp_path / "self", tmp_path / "cgroup") is None
    (folder.parent / "cpu.max").write_text("150000 100000\n")
    assert _cgroup_quota(tmp_path / "self", tmp_path / "cgroup") == 1.5


def test_usable_cores_within_affinity() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
