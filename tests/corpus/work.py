"""A job without flows, pools and a server: the tasks' own functions, one after another, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.assemble import assemble_result
from tasks.encode import encode_upscaled
from tasks.extract import extract_chunk
from tasks.models.weights import content_hash
from tasks.plan import Plan, load_plan, make_plan, save_plan
from tasks.request import UpscaleRequest, check_content, check_request
from tasks.upscale import upscale_chunk
from tasks.verify import verify_result


def upscaled(source: Path, destination: Path, chunk_seconds: float, **settings: Any) -> Plan:
    """Upscale a video twice as large; the verified result is `plan.result`."""
    folder = destination.parent / f"scratch-{destination.name}-{chunk_seconds}"
    request = UpscaleRequest(
        str(source), str(destination), scale=2, scratch=str(folder), chunk_seconds=chunk_seconds, **settings
    )
    checked = check_request(request)
    check_content(checked)
    plan = make_plan(checked, content_hash(checked.card))
    plan.folder.mkdir(parents=True)
    plan = load_plan(save_plan(plan))
    for chunk in plan.chunks:
        extract_chunk(plan, chunk)
        upscale_chunk(plan, chunk)
        encode_upscaled(plan, chunk)
    verify_result(plan, assemble_result(plan))
    return plan
