"""Starts one process per device on this machine, if neither SLURM nor torchrun has: the same command, once per rank.

torchrun's agent would do it too. But it ends every run that stops early with exit code 1 and a traceback of its own,
and gives a rank only 30 seconds for saving. This launcher passes on the ranks' exit code and output unchanged.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from recipes.training.processes import signals
from sinkmodel.console import say

GRACE = 10.0  # seconds that the other ranks have to end by themselves after one has failed


def several() -> bool:
    """Whether torchrun, srun or our own launcher started this process as one of several."""
    return max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) > 1


def run_to_end(run: Callable[[list[str] | None], int], argv: list[str] | None) -> int:
    """Run a command and return its exit code. One of several processes exits with that code instead (`ranks.leave`)."""
    if not several():
        return run(argv)
    code = 1
    try:
        code = run(argv)
    except SystemExit as end:  # --help
        code = int(end.code or 0)
    except BaseException:  # a bug, a device that is out of memory …
        traceback.print_exc()
    from recipes.training.processes.ranks import leave

    leave(code)
    return code


def launch(module: str, argv: list[str], processes: int) -> int:
    """Run `python -m module *argv` as ranks 0 … processes - 1, pass signals on, and return the run's exit code.

    When a rank fails, the others are killed after GRACE seconds. When this process dies, all ranks die with it.
    """
    ranks: list[subprocess.Popen] = []
    early = [] if signals.received is None else [signals.received]

    def pass_on(number: int, frame: FrameType | None) -> None:
        if len(ranks) < processes:
            early.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in signals.NUMBERS}
    try:
        common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = str(free_port())
        for rank in range(processes):
            # In a new session, so that a terminal's Ctrl-C reaches each rank once, through `pass_on` only.
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *argv],
                    env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,
                    preexec_fn=_before_it_starts,
                )
            )
        for number in list(early):  # signals that came before all ranks were started
            pass_on(number, None)
        return _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    """The run's exit code: that of the first rank that failed, or 0 if none did."""
    failed: int | None = None
    deadline = 0.0
    while True:
        running = any(process.poll() is None for process in ranks)
        if failed is None:
            failed = next((rank for rank, process in enumerate(ranks) if process.poll()), None)
            deadline = time.monotonic() + GRACE
        if not running:
            break
        if failed is not None and time.monotonic() > deadline:
            say(f"rank {failed} has failed; stopping the ranks that are still running")
            break
        time.sleep(0.02)
    return 0 if failed is None else _exit_code(ranks[failed], failed)


def _exit_code(process: subprocess.Popen, rank: int) -> int:
    code = process.returncode
    if code < 0:
        say(f"rank {rank} was ended by {signal.Signals(-code).name}; resume with the same command")
        return 128 - code
    return code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _before_it_starts() -> None:
    """Runs in the new rank. Blocks signals until its handlers are set (`signals.noted`): by default they would end it.

    On Linux the kernel kills a rank if its launcher dies for any reason.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
