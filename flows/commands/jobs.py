"""`superres jobs`, `share` and `upload-ticket`: one's own jobs, their results, and leave to upload a video."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from flows.commands.common import Commands, add_site, print_json

if TYPE_CHECKING:
    from tasks.ledger.ledger import Ledger
    from tasks.ledger.record import JobRecord
    from tasks.store.settings import StoreSettings


def add_to(commands: Commands) -> None:
    """Add the commands to those of the program."""
    jobs = commands.add_parser("jobs", help="list or show your jobs", description="Your jobs, newest first, or one.")
    jobs.add_argument("job", nargs="?", help="id of one job")
    jobs.add_argument("--last", type=int, default=20, metavar="N", help="how many are listed (default 20)")
    jobs.add_argument("--json", action="store_true", help="print JSON")
    add_site(jobs)
    jobs.set_defaults(run=_jobs)

    share = commands.add_parser(
        "share",
        help="a link to the result of your job, for a short time",
        description="Print a link under which anybody can fetch the result of your job, for a short time.",
    )
    share.add_argument("job", help="id of the job")
    share.add_argument("--minutes", type=float, default=15, help="how long the link works (default 15, at most 60)")
    add_site(share)
    share.set_defaults(run=_share)

    ticket = commands.add_parser(
        "upload-ticket",
        help="leave to upload one video, for somebody without credentials",
        description="Print a form with which anybody can upload one video of a limited size, for a limited time.",
    )
    ticket.add_argument("destination", help="s3:// URI of the video")
    ticket.add_argument(
        "--largest", type=float, default=5, metavar="GB", help="largest size (default 50; at most 5000)"
    )
    ticket.add_argument("--hours", type=float, default=1, help="how long it may be used (default 1, at most 12)")
    ticket.add_argument("--content-type", metavar="TYPE", help="such as video/mp4 (default: by the ending)")
    add_site(ticket)
    ticket.set_defaults(run=_upload_ticket)


def _site(arguments: argparse.Namespace, stack: ExitStack) -> tuple[Ledger, StoreSettings]:
    """The ledger and the store that the command line names; only named ones need a Prefect API."""
    from blocks.site import load_store, load_tracking
    from tasks.ledger import open_ledger

    if arguments.ledger or arguments.store:
        from infra.prefect_server import ensure_api

        stack.enter_context(ensure_api())
    return open_ledger(load_tracking(arguments.ledger).ledger), load_store(arguments.store)


def _jobs(arguments: argparse.Namespace) -> None:
    from tasks.owner import this_user

    with ExitStack() as stack:
        ledger, _ = _site(arguments, stack)
        if arguments.job:
            _show(ledger.get(arguments.job, this_user()), arguments.json)
            return
        records = ledger.by_owner(this_user(), limit=arguments.last)
    if arguments.json:
        print_json({"jobs": [record.to_dict() for record in records]})
    for record in [] if arguments.json else records:
        frames = f"{record.frames_done}/{record.frames_total}" if record.frames_total else ""
        print(f"{record.job_id}  {record.state:10} {_when(record.created_at)}  {frames:>13}  {record.source}")


def _show(record: JobRecord, as_json: bool) -> None:
    if as_json:
        print_json(record.to_dict())
        return
    facts: dict[str, Any] = {
        "job": record.job_id,
        "state": record.state,
        "owner": record.owner,
        "source": f"{record.source} ({record.source_bytes} bytes, version {record.source_version})",
        "destination": record.destination,
        "settings": ", ".join(f"{name} {value}" for name, value in record.settings.items() if value not in (None, "")),
        "model": f"{record.model} {record.model_hash[:16]}" if record.model else "",
        "frames": f"{record.frames_done} of {record.frames_total}" if record.frames_total else "",
        "seconds": ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in record.phase_seconds.items()),
        "node seconds": ", ".join(f"{pool} {seconds:.0f}" for pool, seconds in record.node_seconds.items()),
        "cost": record.cost,
        "Slurm jobs": ", ".join(record.slurm_jobs),
        "flow run": record.flow_run_id,
    }
    for name, value in facts.items():
        if value not in (None, ""):
            print(f"{name:13} {value}")
    for step in record.history:
        print(f"{'':13} {_when(step.at)}  attempt {step.attempt}  {step.state} {step.node}".rstrip())
    if record.error is not None:
        for name, value in asdict(record.error).items():
            if value not in (None, ""):
                print(f"{'error':13} {name.replace('_', ' ')}: {value}")


def _share(arguments: argparse.Namespace) -> None:
    from tasks.errors import AccessError, SettingsError
    from tasks.owner import this_user
    from tasks.store.address import parse
    from tasks.store.presign import download_url

    if not 0 < arguments.minutes <= 60:
        raise SettingsError(f"a link of {arguments.minutes:g} minutes is not made", "Ask for up to 60")
    with ExitStack() as stack:
        ledger, store = _site(arguments, stack)
        record = ledger.get(arguments.job, this_user())
        if not record.output:
            raise AccessError(f"job {record.job_id} has no result yet, it is {record.state}", "Ask again later")
        address = parse(record.output["uri"])
        if address is None:
            raise SettingsError(f"the result is a file: {record.output['uri']}", "Links are made to results in S3")
        print(
            download_url(
                store,
                address,
                record.output["version_id"],
                seconds=int(60 * arguments.minutes),
                file_name=address.name,
            )
        )


def _upload_ticket(arguments: argparse.Namespace) -> None:
    from tasks.errors import SettingsError
    from tasks.store.address import parse
    from tasks.store.presign import upload_ticket

    address = parse(arguments.destination)
    if address is None:
        raise SettingsError(f"{arguments.destination} is a path", "Tickets are for s3:// URIs")
    with ExitStack() as stack:
        _, store = _site(arguments, stack)
        ticket = upload_ticket(
            store,
            address,
            largest_bytes=int(arguments.largest * 1e9),
            content_type=arguments.content_type or address.content_type,
            seconds=int(3600 * arguments.hours),
        )
    print_json({"url": ticket.url, "fields": ticket.fields, "until": time.time() + 3600 * arguments.hours})


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
