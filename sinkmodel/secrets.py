"""Remove what must not be printed or written: credentials in addresses, and tokens."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")  # in http://user:password@host
WITHOUT_SCHEME = re.compile(  # user:password@host, if the host is a name with dots or an address, or has a port
    r"(?<![\w/\\.@-])[^\s/\\@:'\"]{1,64}:[^\s/\\@]{1,256}@(?=(?:[\w-]+\.)+[\w-]|localhost\b|[\w-]+:\d{1,5}\b)"
)
IN_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|signature|password|credential)[\w.-]*=)[^&\s'\"<>]+")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
SHORTEST = 8  # characters; a shorter token could be an ordinary word


def redacted(text: str) -> str:
    """The text without credentials: `http://***@host`."""
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
    """Apply `redacted` to every string in a JSON value."""
    if isinstance(value, dict):
        return {key: all_redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(all_redacted(inner) for inner in value)
    return redacted(value) if isinstance(value, str) else value


class RedactedRecord(logging.LogRecord):
    """A redacted log record. Libraries log addresses; huggingface_hub logs each one that it retries."""

    def getMessage(self) -> str:
        return redacted(super().getMessage())
