"""The stacks give the templates that are kept, no rule is broken but those acknowledged, and scripts are sound.

Needs the environment that `infra/aws/environment.sh` makes once: a minute, and 1 GB. Where its packages cannot be had,
this is skipped; what the kept templates promise is in `test_templates`, which needs nothing.
"""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from infra.aws.acknowledgements import FINDINGS
from infra.aws.profiles import PROFILES
from infra.aws.synthesis import BIN, TEMPLATES, kept, synthesize
from tasks.errors import SettingsError
from tests.infra.aws.environments import environment, make

pytestmark = pytest.mark.infra

ROOT: Final = Path(__file__).parents[3]
SCRIPTS: Final = [
    path
    for folder in ("infra", "deployments")
    for path in sorted((ROOT / folder).rglob("*.sh"))
    if ".venv" not in path.parts
]

#: Packs of rules, as reports call them.
PACKS: Final = ("AwsSolutions", "NIST.800.53.R5")

#: Findings of checkov that stay: logs of the bucket of logs would be logs of themselves; to connect a function to a
#: network takes no resource.
CHECKOV_SKIPS: Final = {
    ("CKV_AWS_18", "AWS::S3::Bucket.Logs"),
    ("CKV_AWS_111", "AWS::IAM::ManagedPolicy.HandlerRolePolicy"),
}

#: Warnings that CDK's own way of writing templates gives: dependencies said twice, zones by name, imports in outputs.
LINT_SKIPS: Final = {"W3005", "W3010", "W6001"}


@pytest.fixture(scope="module")
def programs() -> Path:
    """Folder `bin` of the environment of CDK."""
    return environment("cdk", "requirements.lock", BIN.parent)


@pytest.fixture(scope="module")
def assemblies(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one cloud assembly for each profile."""
    folder = tmp_path_factory.mktemp("assemblies")
    for profile in PROFILES:
        synthesize(profile, folder / profile, programs)
    return folder


@cache
def _report(path: Path) -> dict[str, Any]:
    return {each["pluginName"]: each for each in json.loads(path.read_text())["pluginReports"]}


@pytest.mark.parametrize("profile", PROFILES)
def test_kept_templates_are_current(assemblies: Path, profile: str) -> None:
    made = {
        path.name.removesuffix(".template.json").rpartition("-")[2]: json.loads(path.read_text())
        for path in (assemblies / profile).glob("*.template.json")
    }
    kept_ones = kept(profile)
    assert set(made) == set(kept_ones)
    stale = [name for name in made if made[name] != kept_ones[name]]
    assert not stale, f"make infra renews {TEMPLATES / profile}"


@pytest.mark.parametrize("profile", PROFILES)
def test_no_rule_is_broken_that_is_not_acknowledged(assemblies: Path, profile: str) -> None:
    report = _report(assemblies / profile / "validation-report.json")
    assert set(PACKS) <= set(report)
    for pack, found in report.items():
        assert found["violations"] == [], pack
    stays = [each for pack in PACKS for each in report[pack]["suppressedViolations"]]
    assert stays and all(len(each["reason"]) > 20 for each in stays)
    assert len({each["ruleName"] for each in report["NIST.800.53.R5"]["suppressedViolations"]}) <= 10


def test_every_acknowledgement_is_about_something(assemblies: Path) -> None:
    found = set()
    for profile in PROFILES:
        report = _report(assemblies / profile / "validation-report.json")
        for pack in PACKS:
            for each in report[pack]["suppressedViolations"]:
                stack, _, path = each["acknowledgedAt"].partition("/")
                found.add((stack.rpartition("-")[2], path, each["ruleName"].partition("[")[0]))
    assert found == {(each.stack, each.path, each.rule.partition("[")[0]) for each in FINDINGS}


def test_a_broken_rule_that_nobody_acknowledged_fails_the_synthesis(programs: Path, tmp_path: Path) -> None:
    # With the acknowledgements taken away, as if they had never been written.
    program = (
        "import sys, infra.aws.acknowledgements as a; a.FINDINGS = ()\n"
        "from infra.aws.app import main; main(['dev', sys.argv[1]])"
    )
    done = subprocess.run(
        [str(programs / "python"), "-c", program, str(tmp_path)],
        cwd=ROOT,
        env={"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "AwsSolutions-IAM5" in done.stderr + done.stdout


def test_templates_are_what_cloudformation_takes(programs: Path) -> None:
    templates = [str(path) for path in sorted(TEMPLATES.rglob("*.json"))]
    done = subprocess.run([str(programs / "cfn-lint"), "--format", "json", *templates], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert not [each for each in found if each["Level"] == "Error"]
    assert {each["Rule"]["Id"] for each in found} <= LINT_SKIPS


@pytest.mark.parametrize("profile", PROFILES)
def test_templates_follow_the_policies_of_checkov(programs: Path, profile: str) -> None:
    done = subprocess.run(
        [
            *(str(programs / "checkov"), "-d", str(TEMPLATES / profile), "--framework", "cloudformation"),
            *("--compact", "--quiet", "--skip-download", "-o", "json"),
        ],
        capture_output=True,
        text=True,
    )
    results = json.loads(done.stdout)
    assert results["summary"]["passed"] > 200 and results["summary"]["parsing_errors"] == 0
    failed = {(each["check_id"], each["resource"][:-8]) for each in results["results"]["failed_checks"]}
    assert failed == CHECKOV_SKIPS


def test_scripts_are_sound(programs: Path) -> None:
    assert len(SCRIPTS) >= 3
    done = subprocess.run([str(programs / "shellcheck"), *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_environment_is_made_once(programs: Path) -> None:
    made = programs.parent / ".made-from"
    before = made.stat().st_mtime_ns
    done = make(programs.parent, "requirements.lock")
    assert (done.returncode, done.stderr) == (0, "")
    assert made.stat().st_mtime_ns == before


def test_without_the_environment_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"environment\.sh"):
        synthesize("dev", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
