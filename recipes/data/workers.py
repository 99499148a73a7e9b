"""Processes that work for a command. Ctrl-C is the command's to answer, and no worker outlives it."""

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
    """A process that starts in this block never gets a Ctrl-C; this process gets it when the block ends.

    A terminal sends SIGINT to all processes of a command. The signal mask is inherited, so a worker is protected
    before its first line of Python runs.
    """
    resource_tracker.ensure_running()  # the first process would start it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(*stops: Connection) -> None:
    """Called by a worker as it starts. It ends when its parent does, or when the parent closes its end of a `stop`.

    A parent that is killed with SIGKILL cannot stop its workers, and they would wait for work for ever. And a worker
    may be in the middle of a call into Rust that takes minutes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel, *stops])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_apart(texts: Iterable[str], size: int) -> Vocabulary:
    """`train_vocabulary` in a process of its own: in this one, Ctrl-C would have no effect until the training ends.

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
            "the process that trains the tokenizer was killed, most likely for want of memory; free some memory, or "
            "give a --tokenizer"
        ) from None
    finally:
        trainer.kill()
        trainer.join()
        ours.close()


def _train(connection: Connection, size: int) -> None:
    end_with_parent()
    connection.send(train_vocabulary(iter(connection.recv, None), size))
