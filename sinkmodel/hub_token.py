"""The user's token for the Hugging Face Hub, checked before a request is made with it."""

from __future__ import annotations

import re

from sinkmodel.errors import UserError


def hub_token() -> str | None:
    """The user's token for the Hub; None if there is none.

    Raises UserError, without the token in its message, if no HTTP header can hold the token, and if HF_ENDPOINT is not
    a web address.
    """
    from huggingface_hub import constants, get_token

    if not re.match(r"https?://[^/\s]", constants.ENDPOINT):
        raise UserError(
            f"HF_ENDPOINT must begin with http:// or https:// and is {constants.ENDPOINT!r}; set or unset it"
        )
    try:
        token = get_token()
    except UnicodeDecodeError:  # in the file that a login wrote
        token = "\0"
    if token and not re.fullmatch("[!-~]+", token):
        raise UserError(
            "the token for the Hub, from HF_TOKEN or from the login, has a character that no token has (a blank, or "
            "one that is not ASCII); copy it again, or run: hf auth login"
        )
    return token
