"""Runs a sample flow, for tests that interrupt or kill it: `python -m tests.infra.driver HOME FLOW JSON`."""

from __future__ import annotations

import json
import os
import sys

import psutil

from infra.pools import open_pools
from infra.prefect_server import ensure_api


def main() -> int:
    """Run one flow on pools of its own and a private server in `HOME`; report process ids before it starts."""
    home, name, arguments = sys.argv[1:]
    api = ensure_api(home=home).start()
    pools = open_pools().start()
    try:
        with api, pools as cluster:
            from tests.infra import sample_flows

            server = api._process.pid if api._process else 0
            print(json.dumps({"pid": os.getpid(), "server": server, "api": api.url}), flush=True)
            result = getattr(sample_flows, name)(**json.loads(arguments))
            assert cluster.scheduler.tasks == {}
            print(json.dumps({"result": result}), flush=True)
    except KeyboardInterrupt:
        # Python's own tracker of shared memory stays until the interpreter ends.
        children = psutil.Process().children(recursive=True)
        left = [" ".join(child.cmdline()) for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        print(json.dumps({"interrupted": True, "children": left}), flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
