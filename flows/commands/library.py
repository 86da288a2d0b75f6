"""`superres library`, `housekeeping` and `doctor`: an archive at a time, and the installation itself."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from typing import Any, Final

from flows.commands.common import TREATMENT, Commands, add_site, add_treatment, print_json, refused
from tasks.errors import SettingsError
from tasks.store.address import parse, split

#: What housekeeping does, and how it says that it did.
_DONE: Final = {"end": "ended", "cancel": "cancelled", "remove": "removed"}


def add_to(commands: Commands) -> None:
    """Add the commands to those of the program."""
    library = commands.add_parser(
        "library",
        help="upscale all new videos of a folder or S3 prefix",
        description="Upscale all videos under a folder or S3 prefix that were not upscaled with these settings yet.",
    )
    library.add_argument("source", help="folder or s3://bucket/prefix")
    library.add_argument("destination", help="folder or s3://bucket/prefix for the results")
    size = library.add_mutually_exclusive_group()
    size.add_argument("--scale", type=int, default=2, metavar="2..4", help="how many times larger (default 2)")
    size.add_argument("--height", type=int, default=0, metavar="ROWS", help="rows of the results")
    library.add_argument("--model", default="compact", help="model card or weight file")
    add_treatment(library)
    library.add_argument("--container", default="mp4", choices=("mp4", "mov", "mkv"), help="of the results")
    library.add_argument("--parallel", type=int, default=2, metavar="N", help="videos at a time (default 2)")
    library.add_argument("--limit", type=int, default=0, metavar="N", help="videos per sweep (default: all)")
    library.add_argument("--retry-failed", action="store_true", help="also what failed because of the video itself")
    library.add_argument("--pools", default="local", metavar="NAME", help="where to work (default local)")
    library.add_argument("--scratch", default="", metavar="DIR", help="folder for chunk files")
    library.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    library.add_argument("--verbose", action="store_true", help="show the log of the flows")
    add_site(library)
    library.set_defaults(run=_library)

    keeping = commands.add_parser(
        "housekeeping",
        help="end lost jobs and clear scratch",
        description="Say which jobs are lost and which folders in scratch nobody needs; with --delete, act on it.",
    )
    keeping.add_argument("--delete", action="store_true", help="act instead of only saying")
    keeping.add_argument("--keep-finished", type=float, default=24, metavar="HOURS", help="of published jobs' files")
    keeping.add_argument("--keep-failed", type=float, default=7, metavar="DAYS", help="of failed jobs' files")
    keeping.add_argument("--pools", default="local", metavar="NAME", help="whose scratch (default local)")
    keeping.add_argument("--scratch", default="", metavar="DIR", help="folder for chunk files")
    keeping.add_argument("--json", action="store_true", help="print JSON")
    add_site(keeping)
    keeping.set_defaults(run=_housekeeping)

    doctor = commands.add_parser(
        "doctor",
        help="check that everything a job needs is there",
        description="Check programs, scratch, pools, ledger and, for the places that are named, S3.",
    )
    doctor.add_argument("places", nargs="*", metavar="VIDEO", help="s3:// URIs or paths that must be readable")
    doctor.add_argument("--write", action="append", default=[], metavar="s3://...", help="prefix that must be writable")
    doctor.add_argument("--pools", default="local", metavar="NAME", help="pools to check (default local)")
    doctor.add_argument("--scratch", default="", metavar="DIR", help="folder for chunk files")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    add_site(doctor)
    doctor.set_defaults(run=_doctor)


def _library(arguments: argparse.Namespace) -> None:
    from tasks.errors import LibraryError

    if not arguments.verbose:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from flows.working_place import working_place

    with working_place(arguments.pools):
        from flows.parameters import UpscaleOptions, model_fields
        from flows.upscale_library import LibraryOptions, upscale_library

        names = ("scale", "height", "container", "pools", "scratch", "store", "ledger", *TREATMENT)
        given: dict[str, Any] = {
            name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
        }
        with refused("superres library"):
            options = LibraryOptions(
                upscale=UpscaleOptions(**given, **model_fields(arguments.model)),
                **{name: getattr(arguments, name) for name in ("parallel", "limit", "retry_failed")},
            )
        failure, rows = None, []
        try:
            rows = upscale_library(arguments.source, arguments.destination, options)["rows"]
        except LibraryError as error:
            failure, rows = error, error.rows
    for row in rows:
        print(f"{row['outcome']:15} {row['video']}  {row['reason'] or row['output']}")
    if failure is not None:
        raise failure
    if arguments.json:
        print_json({"status": "published", "rows": rows})


def _housekeeping(arguments: argparse.Namespace) -> None:
    if not (arguments.keep_finished >= 0 and arguments.keep_failed >= 0):
        raise SettingsError("files cannot be kept for less than no time", "Give numbers from 0 on")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from infra.prefect_server import ensure_api

    with ensure_api():
        from flows.housekeeping import HousekeepingOptions, housekeeping

        options = HousekeepingOptions(
            finished_hours=arguments.keep_finished,
            failed_days=arguments.keep_failed,
            dry_run=not arguments.delete,
            **{name: getattr(arguments, name) for name in ("scratch", "pools", "store", "ledger")},
        )
        done = housekeeping(options)
    if arguments.json:
        print_json(done)
        return
    word = {name: name if done["dry_run"] else past for name, past in _DONE.items()}
    for job in done["jobs_ended"]:
        print(f"{word['end']} as {job['state']}: job {job['job']} of {job['source']}: {job['why']}")
    for job in done["slurm_jobs_cancelled"]:
        print(f"{word['cancel']} Slurm job {job}")
    for each in done["folders_removed"]:
        print(f"{word['remove']} {each['folder']}, {each['bytes'] / 1e6:.1f} MB")
    says = f"{done['bytes_freed'] / 1e6:.1f} MB"
    print(f"nothing was done yet; --delete does it, and frees {says}" if done["dry_run"] else f"{says} freed")


def _doctor(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from infra.prefect_server import ensure_api

    for place in arguments.places:
        parse(place)
    for prefix in arguments.write:
        split(prefix)
    with ExitStack() as stack:
        if arguments.store or arguments.ledger or arguments.pools != "local":
            stack.enter_context(ensure_api())  # It knows the blocks.
        from flows.doctor import examine

        checks = examine(
            arguments.places, arguments.write, arguments.pools, arguments.scratch, arguments.store, arguments.ledger
        )
    bad = [check.name for check in checks if not check.good]
    refusal = SettingsError(f"not ready: {', '.join(bad)}", "See what is said about each")
    if arguments.json:
        rows: list[dict[str, Any]] = [vars(check) for check in checks]
        failed = {"status": "failed", "kind": refusal.kind, "error": str(refusal)}
        print_json({**(failed if bad else {"status": "ready"}), "checks": rows})
        if bad:
            sys.exit(refusal.exit_code)
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'good' if check.good else 'BAD ':4}  {check.name:{width}}  {check.said}")
        if check.remedy:
            print(f"{'':6}{'':{width}}  -> {check.remedy}")
    if bad:
        raise refusal
    print("ready")
