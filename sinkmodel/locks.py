"""A lock that lets one process at a time write to a folder, on one or many machines. A dead holder's lock expires."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sinkmodel.console import say
from sinkmodel.errors import UserError

LOCK = ".lock"
BEAT = 20.0  # seconds between two heartbeats
DEAD = 9 * BEAT  # seconds without a heartbeat after which a holder on another machine counts as dead


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock during the block. Raises UserError if another process holds it.

    The file `.lock` carries two locks. The first is a POSIX record lock: it ends with the process that took it, however
    that ends, and no child inherits it. Some file systems do not share record locks between machines. So the file also
    names its holder, and its modification time is the holder's heartbeat. If a process on another machine holds the
    lock, wait: if its heartbeat moves, raise UserError; if it stays silent for DEAD seconds, take over the folder. If
    the holder was this same SLURM job before it was requeued, take over at once.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    for _ in range(10):
        if (file := _take(folder)) is not None:
            break
    else:
        raise _taken(folder, {})
    with file:
        mine = _describe()
        file.truncate(0)
        file.write(json.dumps(mine))
        file.flush()
        ended = threading.Event()
        threading.Thread(target=_beat, args=(folder, file, mine, ended), name="lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            if _holder(file) == mine:
                path.unlink(missing_ok=True)


def _take(folder: Path) -> TextIO | None:
    """Take and open the lock file; None if its last holder has removed it meanwhile, so that the caller retries."""
    with contextlib.ExitStack() as opened:
        file = opened.enter_context((folder / LOCK).open("a+", encoding="utf-8"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _taken(folder, _holder(file)) from None
        except OSError:  # a file system without record locks
            pass
        if not _in_place(folder, file) or not _outlived(folder, file):
            return None
        opened.pop_all()
        return file


def _in_place(folder: Path, file: TextIO) -> bool:
    """Whether the path of the lock still leads to this open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat())
    return False


def _outlived(folder: Path, file: TextIO) -> bool:
    """Wait until no process on another machine holds the folder; False if the holder releases it itself.

    Raises UserError at the holder's next heartbeat. If a job's node has died, a job that is submitted in its place
    therefore waits for the folder instead of failing at once.
    """
    holder, here = _holder(file), _describe()
    if not holder or holder.get("host") == here["host"] or (here["job"] and holder.get("job") == here["job"]):
        return True
    last, waiting = os.fstat(file.fileno()).st_mtime, False
    while (silent := _now(folder) - last) < DEAD:
        if not waiting:
            waiting = True
            say(
                f"{folder} is held by {_name(holder)}, silent for {silent:.0f} s: waiting for a sign of life, "
                f"{DEAD - silent:.0f} s at most"
            )
        time.sleep(BEAT / 20)
        if not _in_place(folder, file):
            return False
        if os.fstat(file.fileno()).st_mtime != last:
            raise _taken(folder, holder)
    say(f"{folder} was held by {_name(holder)}, silent for {silent / 60:.0f} minutes: taking it over")
    return True


def _beat(folder: Path, file: TextIO, mine: dict[str, Any], ended: threading.Event) -> None:
    """Send heartbeats. If another process has taken the lock over, exit: there must not be two writers."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # the file system may be unreachable for a moment
            if (holder := _holder(file)) != mine and not ended.is_set():
                say(f"{folder} was taken over by {_name(holder)} while this process was silent; it ends here")
                os._exit(1)
            os.utime(file.fileno())


def _describe() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _holder(file: TextIO) -> dict[str, Any]:
    """The holder that the lock file names; empty if the file is empty or half written.

    Reads through the open file: if another handle to it were closed, the record lock would be dropped (POSIX).
    """
    try:
        holder = json.loads(os.pread(file.fileno(), 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['host']}{job}" if "pid" in holder else "another process"


def _taken(folder: Path, holder: dict[str, Any]) -> UserError:
    return UserError(f"{_name(holder)} is writing to {folder}; wait for it or take another folder")


def _now(folder: Path) -> float:
    """The time by the file system's own clock, since the clocks of two machines may differ."""
    probe = folder / f"{LOCK}.{os.getpid()}.part"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
