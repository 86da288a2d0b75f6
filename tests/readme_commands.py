"""`make docs-check`: runs the README's shell commands as written, in a fresh clone of this checkout.

    python -m tests.readme_commands

`make test` is left out: it takes long and is run by itself. `clip.mp4` in a command is the sample clip. What serves
until Ctrl-C gets one when it is up.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks.media.sample import write_sample

CHECKOUT = Path(__file__).resolve().parent.parent

#: Commands that serve until Ctrl-C, and what they print when they are up.
SERVING = {"make ui": "Prefect UI "}


def shell_commands(text: str) -> list[str]:
    """The lines of all `sh` blocks of a Markdown text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, folder: Path) -> int:
    return subprocess.run(command, shell=True, cwd=folder).returncode


def serve(command: str, folder: Path) -> int:
    """Run a command until it is up, and end it as somebody at the terminal does; 0 if both went well."""
    # A group of its own, which gets the Ctrl-C as a terminal gives it.
    process = subprocess.Popen(
        command, shell=True, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    is_up = False
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith(SERVING[command]):
            is_up = True
            os.killpg(process.pid, signal.SIGINT)
    process.wait()
    return not is_up


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
            if (serve if command in SERVING else run)(command, clone):
                print(f"failed: {command}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
