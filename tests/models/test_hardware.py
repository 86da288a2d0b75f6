"""What an engine learns about the machine it is on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tasks.models.hardware import free_memory, memory_left_in_groups


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_job_of_a_batch_system_is_a_group_within_others(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/system.slice/slurmstepd.scope/job_7/step_0/task_0\n")
    write(root, memory__stat="anon 1\n")
    write(root / "system.slice", memory__max="max\n", memory__current="9000\n")
    job = root / "system.slice" / "slurmstepd.scope" / "job_7"
    write(job, memory__max="5000\n", memory__current="3000\n", memory__stat="anon 900\ninactive_file 1500\n")
    write(job / "step_0", memory__max="4500\n", memory__current="4600\n")
    assert list(memory_left_in_groups(membership, root)) == [0, 3500]


def test_groups_of_version_one(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("4:memory:/slurm/uid_0/job_7\n3:cpu,cpuacct:/slurm\n1:name=systemd:/\n")
    group = root / "memory" / "slurm" / "uid_0" / "job_7"
    write(
        group, memory__limit_in_bytes="800\n", memory__usage_in_bytes="500\n", memory__stat="total_inactive_file 100\n"
    )
    assert list(memory_left_in_groups(membership, root)) == [400]


@pytest.mark.parametrize("membership", ["0::/\n", "0::/not/mounted/here\n"])
def test_no_group_has_a_limit(membership: str, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text(membership)
    assert list(memory_left_in_groups(tmp_path / "membership", tmp_path / "cgroup")) == []
    assert list(memory_left_in_groups(tmp_path / "nothing", tmp_path / "cgroup")) == []


def test_no_more_than_this_machine_has() -> None:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < free_memory(torch.device("cpu")) <= int(fields["MemTotal"].split()[0]) * 512
