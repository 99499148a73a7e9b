"""Worker processes of a command. Only the command handles Ctrl-C, and no worker outlives it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from recipes.data.tokenization import Vocabulary, train_vocabulary
from sinkmodel.errors import UserError

SPAWN = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A process started in this block never receives a Ctrl-C; this process receives it when the block ends.

    A terminal sends SIGINT to all processes of a command. The signal mask is inherited, so a worker is protected
    before its first line of Python runs.
    """
    resource_tracker.ensure_running()  # else starting the first process would start it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(*stops: Connection) -> None:
    """Called by a worker as it starts. The worker ends when its parent ends, or closes its end of a `stop` connection.

    A parent that is killed with SIGKILL cannot stop its workers, which would wait for work for ever. A thread ends the
    worker, because its main thread may be in a call into Rust that takes minutes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel, *stops])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_apart(texts: Iterable[str], size: int) -> Vocabulary:
    """`train_vocabulary` in another process: in this one, Ctrl-C would have no effect until the training ends.

    Raises UserError if that process was killed from outside.
    """
    ours, theirs = SPAWN.Pipe()
    trainer = SPAWN.Process(target=_train, args=(theirs, size), daemon=True)
    with interrupts_held_back():
        trainer.start()
    theirs.close()
    try:
        for text in texts:
            ours.send(text)
        ours.send(None)
        return ours.recv()
    except (EOFError, ConnectionError):
        raise UserError(
            "the process that trains the tokenizer was killed, most likely for lack of memory; free some memory, or "
            "give a --tokenizer"
        ) from None
    finally:
        trainer.kill()
        trainer.join()
        ours.close()


def _train(connection: Connection, size: int) -> None:
    end_with_parent()
    connection.send(train_vocabulary(iter(connection.recv, None), size))
