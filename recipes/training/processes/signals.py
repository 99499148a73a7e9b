"""Signals that ask a run to stop. The handlers are set before torch is loaded, and only record the signal.

SIGTERM (preemption, `scancel`) and SIGUSR1 (the time limit is near) save, and return the job to SLURM's queue. SIGINT
(Ctrl-C) saves and ends. `callbacks.preemption` reads `received` at every step boundary. A handler that saved by itself
would do so in the middle of a step, on one rank, while the others wait in a collective.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUES = (signal.SIGTERM, signal.SIGUSR1)

received: int | None = None
"""The first signal received; None if there was none."""
training = False
"""Whether training has begun. Before that a Ctrl-C ends the process at once, as there is nothing to save."""


class StoppedAtOnce(BaseException):
    """A second Ctrl-C, or one before training. Not a KeyboardInterrupt, which Lightning turns into exit code 1."""


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """In the block, the three signals are only recorded; after it, their old handlers are restored.

    A second Ctrl-C, or one before training, ends the block and raises KeyboardInterrupt after it.
    """
    global received, training
    received, training = None, False
    before = {number: signal.signal(number, _note) for number in NUMBERS}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)  # our launcher has blocked them until here
        yield
    except StoppedAtOnce:
        raise KeyboardInterrupt from None
    finally:
        received, training = None, False
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    global received
    if number == signal.SIGINT and (received is not None or not training):
        raise StoppedAtOnce
    if received is None:
        received = number
        if os.environ.get("RANK", "0") == "0":
            once_more = "; a second Ctrl-C stops without saving" if number == signal.SIGINT else ""
            line = f"{signal.Signals(number).name}: saving at the end of this step{once_more}\n"
            with contextlib.suppress(OSError):  # stderr may be closed: save all the same
                os.write(2, line.encode())  # the handler may have interrupted a print()
