"""Has CDK synthesize the profiles, in the environment that `environment.sh` makes, and keeps the templates.

python -m infra.aws.synthesis       writes templates/PROFILE/STACK.json anew

The templates are under version control: a change of the stacks shows what it changes on AWS, and who has no CDK can
read and deploy them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

from infra.aws.profiles import PROFILES
from tasks.errors import SettingsError

HERE: Final = Path(__file__).parent
BIN: Final = HERE / ".venv" / "bin"
TEMPLATES: Final = HERE / "templates"

_END: Final = ".template.json"


def synthesize(profile: str, folder: Path, programs: Path = BIN) -> dict[str, Any]:
    """Synthesize one profile.

    Args:
        profile: Its name.
        folder: Where the cloud assembly goes, `validation-report.json` with it.
        programs: Folder `bin` of the environment that `environment.sh` made.

    Returns:
        The templates, by the names of stacks without profile.

    Raises:
        SettingsError: The environment is not there, or the stacks cannot be synthesized; a rule that is broken and not
            acknowledged is such a case.
    """
    if not (programs / "python").exists():
        raise SettingsError(f"there is no {programs / 'python'}", "Run infra/aws/environment.sh")
    # Its own programs first: node may be among them.
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [str(programs / "python"), "-m", "infra.aws.app", profile, str(folder)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SettingsError(
            f"profile {profile} cannot be synthesized:\n{done.stderr[-4000:]}",
            "Correct it, or acknowledge the finding in infra/aws/acknowledgements.py",
        )
    return {
        path.name.removesuffix(_END).rpartition("-")[2]: json.loads(path.read_text())
        for path in sorted(folder.glob(f"*{_END}"))
    }


def kept(profile: str, templates: Path = TEMPLATES) -> dict[str, Any]:
    """The templates under version control, by the names of stacks without profile."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((templates / profile).glob("*.json"))}


def imports(template: dict[str, Any]) -> set[str]:
    """Stacks from which a template imports something, by their names without profile."""
    return set(re.findall(r'"Fn::ImportValue": "[^":]*-(\w+):', json.dumps(template)))


def main() -> None:
    """Write the templates of all profiles anew."""
    for profile in PROFILES:
        with tempfile.TemporaryDirectory() as folder:
            templates = synthesize(profile, Path(folder))
        place = TEMPLATES / profile
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("*.json"):
            if old.stem not in templates:
                old.unlink()
        for name, template in templates.items():
            (place / f"{name}.json").write_text(json.dumps(template, indent=1) + "\n")


if __name__ == "__main__":
    main()
