"""`make docs-check`: runs the README's shell commands as written, in a fresh clone of this checkout.

    python -m tests.readme_commands

`make test` is left out: it takes long and is run by itself. `clip.mp4` in a command is the sample clip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks.media.sample import write_sample

CHECKOUT = Path(__file__).resolve().parent.parent


def shell_commands(text: str) -> list[str]:
    """The lines of all `sh` blocks of a Markdown text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def main() -> int:
    commands = shell_commands((CHECKOUT / "README.md").read_text())
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "media-super-resolution"
        subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(clone)], check=True)
        write_sample(clone / "clip.mp4", frames=48)
        for command in commands:
            if command == "make test":
                continue
            print(f"$ {command}", flush=True)
            if subprocess.run(command, shell=True, cwd=clone).returncode:
                print(f"failed: {command}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
