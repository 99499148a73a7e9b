"""One writer a folder, on one machine or many, and no lock that outlives a dead one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sinkmodel.console import say
from sinkmodel.errors import UserError

LOCK = ".lock"
BEAT = 20.0  # seconds between two signs of life
DEAD = 9 * BEAT  # without one for so long, a holder on another machine is taken for dead


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep it for this process. Raises UserError where another process has it.

    Two locks in the one file `.lock`. A record lock, which goes with the process that took it, however that ends, and
    which no child inherits. And, as such locks do not reach other machines on every file system, who holds it, with the
    file's time as a sign of life: of a holder elsewhere that gives none, the folder is taken over, and at once where
    that was this same SLURM job, before it was put back into the queue.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _taken(folder, _holder(file)) from None
        except OSError:  # a file system without record locks
            pass
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise _taken(folder, {})  # its last holder removed the file between our opening and our locking it
        _refuse_the_living(folder, file)
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


def _refuse_the_living(folder: Path, file: TextIO) -> None:
    """Raises UserError where a process on another machine holds the folder, and lives."""
    holder, here = _holder(file), _describe()
    if not holder or holder.get("host") == here["host"] or (here["job"] and holder.get("job") == here["job"]):
        return
    silent = _now(folder) - os.fstat(file.fileno()).st_mtime
    if silent < DEAD:
        raise _taken(folder, holder, f"; should it be dead, the folder is free in {DEAD - silent:.0f} s")
    say(f"{folder} was held by {_name(holder)}, silent for {silent / 60:.0f} minutes: taking it over")


def _beat(folder: Path, file: TextIO, mine: dict[str, Any], ended: threading.Event) -> None:
    """Give signs of life; end the process where the lock has become another's: there must not be two writers."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # a file system that is away for a moment
            if (holder := _holder(file)) != mine and not ended.is_set():
                say(f"{folder} was taken over by {_name(holder)} while this process was silent; it ends here")
                os._exit(1)
            os.utime(file.fileno())


def _describe() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}


def _holder(file: TextIO) -> dict[str, Any]:
    """Who wrote the lock; nothing where it is empty or half written.

    Through the file that is open already: to close another one on it would drop the record lock (POSIX).
    """
    try:
        holder = json.loads(os.pread(file.fileno(), 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['host']}{job}" if "pid" in holder else "another process"


def _taken(folder: Path, holder: dict[str, Any], more: str = "") -> UserError:
    return UserError(f"{_name(holder)} is writing to {folder}; wait for it or take another folder{more}")


def _now(folder: Path) -> float:
    """The file system's own clock: that of another machine may differ from ours."""
    probe = folder / f"{LOCK}.{os.getpid()}.part"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
