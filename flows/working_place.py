"""Where commands run flows: a Prefect API, and open pools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def working_place(name: str) -> Iterator[None]:
    """A Prefect API and open pools.

    For the pools of this machine both start in the background while the flow's modules load, which takes as long.
    Other pools are described by blocks, which only an API that answers can give.
    """
    from infra.prefect_server import ensure_api

    with ExitStack() as stack:
        api = ensure_api().start()
        stack.callback(api.stop)
        if name == "local":
            from flows.pools import pools_of_this_machine
            from infra.pools import open_pools

            pools = open_pools(pools_of_this_machine()).start()
            stack.callback(pools.close)
            import flows.upscale_video

            stack.enter_context(api)
        else:
            from blocks.pools import load_pools

            reach = stack.enter_context(ExitStack())
            reach.enter_context(api)
            block = load_pools(name)
            block.check()
            host = block.scheduler_host
            if api.private and host != "127.0.0.1":
                reach.close()  # Workers on other machines need a server that they can reach.
                stack.enter_context(ensure_api(host=host))
            pools = block.open(warm=False)
            import flows.upscale_video  # noqa: F401
        stack.enter_context(pools)
        yield
