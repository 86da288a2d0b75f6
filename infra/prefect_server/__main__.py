"""`python -m infra.prefect_server start`: `prefect server` with its options, fit for many runs at once on SQLite."""

from __future__ import annotations

import sys

from infra.prefect_server.sqlite import repair


def main() -> None:
    """Run `prefect server` with the arguments of this program."""
    repair()
    from prefect.cli import app

    sys.argv = ["prefect", "server", *sys.argv[1:]]
    app()


if __name__ == "__main__":
    main()
