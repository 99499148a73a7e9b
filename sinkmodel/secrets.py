"""What must not be printed or written: credentials in an address, and tokens."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")  # of http://user:password@host
IN_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|signature|password|credential)[\w.-]*=)[^&\s'\"<>]+")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
SHORTEST = 8  # letters of a token; fewer may be any word


def redacted(text: str) -> str:
    """A text without credentials: `http://***@host`."""
    text = IN_QUERY.sub(r"\1***", CREDENTIALS.sub("***@", text))
    for token in (os.environ.get(name, "").strip() for name in TOKENS):
        if len(token) >= SHORTEST:
            text = text.replace(token, "***")
    return text


def all_redacted(value: Any) -> Any:
    """The same of every text in a JSON value."""
    if isinstance(value, dict):
        return {key: all_redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(all_redacted(inner) for inner in value)
    return redacted(value) if isinstance(value, str) else value


class RedactedRecord(logging.LogRecord):
    """What a library logs, as huggingface_hub does with every address that it asks again."""

    def getMessage(self) -> str:
        return redacted(super().getMessage())


def hub_token() -> str | None:
    """The token with which the Hub is asked, None without one.

    Raises UserError, without the token, for one that no header can hold.
    """
    from huggingface_hub import get_token

    from sinkmodel.errors import UserError

    try:
        token = get_token()
    except UnicodeDecodeError:  # of the file that a login wrote
        token = "\0"
    if token and not re.fullmatch("[!-~]+", token):
        raise UserError(
            "the token for the Hub, of HF_TOKEN or of the login, has a letter that no token has (a blank, or none of "
            "ASCII); copy it again, or run: hf auth login"
        )
    return token
