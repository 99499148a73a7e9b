"""What must not be printed or written: credentials in an address, and tokens."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")  # of http://user:password@host
WITHOUT_SCHEME = re.compile(  # of user:password@host, where the host is a name with dots, an address or has a port
    r"(?<![\w/\\.@-])[^\s/\\@:'\"]{1,64}:[^\s/\\@]{1,256}@(?=(?:[\w-]+\.)+[\w-]|localhost\b|[\w-]+:\d{1,5}\b)"
)
IN_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|signature|password|credential)[\w.-]*=)[^&\s'\"<>]+")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
SHORTEST = 8  # letters of a token; fewer may be any word


def redacted(text: str) -> str:
    """A text without credentials: `http://***@host`."""
    in_endpoint = os.environ.get("HF_ENDPOINT", "").partition("://")[::2]
    if credentials := (in_endpoint[1] or in_endpoint[0]).rpartition("@")[0]:
        text = text.replace(f"{credentials}@", "***@")
    text = WITHOUT_SCHEME.sub("***@", CREDENTIALS.sub("***@", text))
    text = IN_QUERY.sub(r"\1***", text)
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

    Raises UserError, without the token, for one that no header can hold, and for an address of the Hub that is none.
    """
    from huggingface_hub import constants, get_token

    from sinkmodel.errors import UserError

    if not re.match(r"https?://[^/\s]", constants.ENDPOINT):
        raise UserError(
            f"HF_ENDPOINT must begin with http:// or https:// and is {constants.ENDPOINT!r}; set or unset it"
        )
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
