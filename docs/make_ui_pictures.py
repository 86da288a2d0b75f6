"""The pictures of the Prefect UI in the docs: what the browser test saw, from an empty machine on, cut and made small.

python docs/make_ui_pictures.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from PIL import Image

FOLDER: Final = Path(__file__).resolve().parent

#: Of each picture: the screen it is made of, and how many of its rows are shown.
PICTURES: Final = {"ui-form.png": ("form", 1000), "ui-run.png": ("run", 1000), "ui-report.png": ("report", 1300)}


def main() -> None:
    """Run the test and keep its screens."""
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "SUPERRES_SCREENSHOTS": name, "PYTHONPATH": str(FOLDER.parent)}
        # Paths that readers see.
        command = [sys.executable, "-m", "pytest", "-q", f"--basetemp={tempfile.gettempdir()}/media", "tests/browser"]
        command += ["-k", "from_the_form_to_the_report"]
        subprocess.run(command, cwd=FOLDER.parent, env=environment, check=True)
        for picture, (screen, rows) in PICTURES.items():
            with Image.open(Path(name, f"{screen}.png")) as image:
                shown = image.convert("RGB").crop((0, 0, image.width, min(rows, image.height)))
            # The UI has few colours: a palette keeps them, at a third of the size.
            shown.quantize(128, dither=Image.Dither.NONE).save(FOLDER / picture, optimize=True)


if __name__ == "__main__":
    main()
