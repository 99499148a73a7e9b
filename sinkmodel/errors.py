"""`UserError`, which means that the input is wrong and gives the remedy, and phrases that several such errors share."""

from __future__ import annotations

import re
import shlex
import textwrap
from typing import Any

from sinkmodel.secrets import redacted


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, in which file or key, and the remedy.

    A command prints the message and exits with `exit_code` (default 2); in a library it is an ordinary exception. Of
    several processes only rank 0 prints. `any_rank=True` prints from any rank, for errors that rank 0 may not see.
    """

    def __init__(self, message: str, exit_code: int = 2, any_rank: bool = False):
        # A DataLoader worker passes an error on as the text of its traceback, which ends with the message.
        message = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2]
        message = re.sub(r"\s*[\r\n]+\s*", " ", message.strip())  # blanks inside a line may belong to a file name
        super().__init__(redacted(message))
        self.exit_code, self.any_rank = exit_code, any_rank


def shell(*words: object) -> str:
    """A command to copy, or a part of one. Words are quoted for the shell if they need it."""
    return shlex.join(map(str, words))


def not_finite(model: Any, what: str = "logits") -> UserError:
    """The error to raise if a transformers model computes NaN, or numbers beyond the range of its dtype."""
    dtype = str(model.dtype).removeprefix("torch.")
    remedy = "its weights are damaged: export or copy it again" if dtype == "float32" else "try float32"
    return UserError(f"{model.config.model_type} in {dtype} gives {what} that are not finite; {remedy}")


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, shortened at a word, for use inside a message of ours."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" …").rstrip(".;: ")
