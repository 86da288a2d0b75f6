"""What can go wrong with a local Slurm."""

from __future__ import annotations

from tasks.errors import SuperResolutionError


class SlurmError(SuperResolutionError):
    """A daemon of the local Slurm did not start, or one of its commands was refused."""

    kind = "slurm"
    exit_code = 13


class SlurmMissingError(SlurmError):
    """The programs of Slurm are neither on this machine nor to be had."""

    kind = "slurm-missing"
