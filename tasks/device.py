"""What a task tells the pool about the device of its worker: that it has it now, and that it will leave it soon.

So the pool can send the next task a moment early, which then finds everything ready when the device is free. A task
that tells nothing has its slot until it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal

Word = Literal["taken", "leaving"]

_listener: ContextVar[Callable[[Word], None] | None] = ContextVar("listener", default=None)

#: Seconds before its end at which a task says that it leaves: enough for a task run to start through Slurm and Prefect
#: and to read its first frames from a shared folder. The next chunk is bound to this worker for so long, though another
#: one might become idle meanwhile.
LEAVING_SECONDS: Final = 2.0


@contextmanager
def listening(listener: Callable[[Word], None]) -> Iterator[None]:
    """Hear what the code in the block says about the device."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(word: Word) -> None:
    """Say `taken` when the device begins with this task, and once `leaving` when it is nearly through."""
    if (listener := _listener.get()) is not None:
        listener(word)
