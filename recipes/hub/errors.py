"""Errors of the Hub as one line each: what failed, where, and what to do."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from sinkmodel.errors import UserError, first_line


class HubAway(UserError):
    """The Hub does not answer, or fails; a later try may succeed."""


class Conflict(UserError):
    """Somebody else changed the same files in the meantime."""


@contextlib.contextmanager
def as_user_errors(repository: str) -> Iterator[None]:
    """In the block, turn errors of huggingface_hub into UserErrors that name `repository`, ORG/NAME."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing reaches the Hub; unset it to push") from None
    except HTTPError as error:
        raise worded(error, repository) from None
    except json.JSONDecodeError as error:  # for example the page of a proxy
        raise HubAway(f"{constants.ENDPOINT} does not answer as the Hub does ({first_line(error)})") from None
    except ValueError as error:
        if not str(error).startswith(("Invalid metadata in README.md", "LFS batch API")):
            raise
        raise UserError(f"the Hub refuses what is pushed to {repository}: {' '.join(str(error).split())}") from None


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of huggingface_hub; None if there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def may_pass(error: BaseException) -> bool:
    """Whether the cause is the network or the server, not the request."""
    status = status_of(error)
    return isinstance(error, HTTPError) and (status is None or status == 429 or status >= 500)


def of_upload(error: BaseException, repository: str) -> BaseException:
    """The error to raise if sending a large file fails; these errors differ from those of other requests.

    LFS wraps the reason in a RuntimeError. Xet raises ConnectionError, PermissionError and RuntimeError with messages
    of its own: `Network error: … HTTP status client error (403 Forbidden) …`.
    """
    reason = error if isinstance(error, HTTPError) else error.__cause__ or error
    if isinstance(reason, HTTPError | OfflineModeIsEnabled) or getattr(reason, "filename", None):  # a file of ours
        return reason
    message = first_line(reason)
    if isinstance(reason, PermissionError) or re.search(r"\b40[13]\b", message):
        return UserError(f"your token may not write to {repository} ({message}); use one that may, or another --repo")
    return HubAway(f"{constants.ENDPOINT} did not take a file ({message})")


def worded(error: HTTPError, repository: str) -> UserError:
    status, owner = status_of(error), repository.partition("/")[0]
    message = getattr(error, "server_message", None) or first_line(error)
    message = first_line(Exception(message))
    if isinstance(error, RepositoryNotFoundError) and not (status == 401 and get_token()):
        return UserError(f"{repository} is not on the Hub, or your token may not see it; see {constants.ENDPOINT}")
    if status == 401:
        return UserError(
            f"the Hub refuses the token of HF_TOKEN or of the login ({message}); make one that may write to {owner} at "
            f"{constants.ENDPOINT}/settings/tokens, then: hf auth login"
        )
    if status == 403:
        return UserError(
            f"your token may not write to {repository} ({message}); use one that may write to {owner}, or "
            "another --repo"
        )
    if status == 412:
        return Conflict(
            f"somebody else commits to {repository} at the same time ({message}); run the same command again"
        )
    if status == 429:
        return HubAway(f"the Hub has had too many requests from you ({message}); wait a little")
    if may_pass(error):
        what = "cannot be reached" if status is None else "fails"
        return HubAway(f"{constants.ENDPOINT} {what} ({message})")
    if isinstance(error, BadRequestError):
        return UserError(f"the Hub refuses what is pushed to {repository} ({message})")
    return UserError(f"the Hub refuses {repository} ({message})")
