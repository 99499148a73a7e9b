"""Signals that ask a run to stop: noted from the first moment on, before torch is loaded, and never acted on here.

SIGTERM (preemption, `scancel`) and SIGUSR1 (the time limit comes) save, and give the job back to SLURM's queue; SIGINT
(Ctrl-C) saves and ends. `callbacks.preemption` looks here at every step boundary. A handler that saved by itself
would do so in the middle of a step, on one rank, with the others waiting in a collective.
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
"""The first signal that came, None before."""
training = False
"""Whether steps are being done: before that a Ctrl-C ends at once, as there is nothing to save."""


class StoppedAtOnce(BaseException):
    """Ctrl-C once more, or before training. Not a KeyboardInterrupt, of which Lightning would make exit code 1."""


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within the block the three signals are noted only; behind it they do what they did before.

    A Ctrl-C that cannot wait raises KeyboardInterrupt behind the block.
    """
    global received, training
    received, training = None, False
    before = {number: signal.signal(number, _note) for number in NUMBERS}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)  # our launcher has them wait until here
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
            once_more = "; once more stops without saving" if number == signal.SIGINT else ""
            line = f"{signal.Signals(number).name}: saving at the end of this step{once_more}\n"
            with contextlib.suppress(OSError):  # nobody reads stderr any more: save all the same
                os.write(2, line.encode())  # print() may be in the middle of a line of its own
