"""The one error that means: the input is wrong, and here is what to do; and words that several such errors share."""

from __future__ import annotations

import re
import shlex
import textwrap
from typing import Any

from sinkmodel.secrets import redacted


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, in which file or key, and the remedy.

    Commands print it and exit with `exit_code` (2 unless said otherwise); as a library it is an ordinary exception.
    Of several processes the first one speaks; `heard` is for what another may be the only witness of.
    """

    def __init__(self, message: str, exit_code: int = 2, heard: bool = False):
        # A process that reads ahead hands an error over as the text of its traceback, whose end is the message.
        message = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2]
        message = re.sub(r"\s*[\r\n]+\s*", " ", message.strip())  # blanks in a file's name stay as they are
        super().__init__(redacted(message))
        self.exit_code, self.heard = exit_code, heard


def shell(*words: object) -> str:
    """A command to copy, or a part of one: quoted for a shell where a word needs it."""
    return shlex.join(map(str, words))


def not_finite(model: Any, what: str = "logits") -> UserError:
    """The error to raise for a transformers model whose numbers are NaN or beyond its dtype."""
    dtype = str(model.dtype).removeprefix("torch.")
    remedy = "its weights are damaged: export or copy it again" if dtype == "float32" else "try float32"
    return UserError(f"{model.config.model_type} in {dtype} gives {what} that are not finite; {remedy}")


def first_line(error: BaseException) -> str:
    """What an error of a library says, to stand in a message of ours: its first line, cut at a word."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[0], 200, placeholder=" …").rstrip(".;: ")
