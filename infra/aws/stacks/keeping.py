"""How long a profile keeps what stacks make: logs, and data beyond the end of its stack."""

from __future__ import annotations

from typing import Final

from aws_cdk import RemovalPolicy
from aws_cdk import aws_logs as logs

from infra.aws.profiles import Profile

#: Names that CDK has for how long CloudWatch keeps logs.
_DAYS: Final = {7: "ONE_WEEK", 30: "ONE_MONTH", 90: "THREE_MONTHS", 365: "ONE_YEAR"}


def retention(profile: Profile) -> logs.RetentionDays:
    """How long logs are kept."""
    return logs.RetentionDays[_DAYS[profile.log_days]]


def removal(profile: Profile) -> RemovalPolicy:
    """What becomes of data when its stack is removed."""
    return RemovalPolicy.RETAIN if profile.keep_data else RemovalPolicy.DESTROY
