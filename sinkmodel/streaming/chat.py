"""Apply a chat template turn by turn. Templates expect all messages so far, which an endless stream no longer has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.streaming.intake import Intake

MESSAGE, REPLY = "\ue000", "\ue001"  # from Unicode's private use area: no template contains them
BLANKS = [chr(code) for code in range(0x3001) if chr(code).isspace()]  # all characters that `trim` removes
INNER = "a  B\n\n\tc"  # a template that keeps this inside a message changes at most its ends


class Chat:
    """The text around a message, rendered once with placeholders, so that every turn costs the same.

        stream = Stream(model, tokenizer, pinned=chat.pinned)
        stream.feed([*chat.opening, *chat.message(["Hello"]), *chat.closing])      # then stream.text()
        stream.feed([*chat.between, *chat.message(["And now?"]), *chat.closing])   # begins with the end of the reply

    The ids are those of `apply_chat_template` for the whole conversation: blanks that the template trims are left out,
    and text of the template is encoded together with the message next to it. A message is fed as text, so that it
    cannot contain special tokens. `pinned` is the system message as the template renders it. `notes` lists changes that
    the template makes to earlier messages and a stream cannot. Raises UserError if there is no chat template, or one
    that cannot be split.

    Args:
        sinks: ids that the stream itself prepends, and perhaps also the template.
        system: the system message; None for none.
    """

    def __init__(self, tokenizer: Any, sinks: Sequence[int] = (), system: str | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template; leave --chat out, and the model continues your text")
        self._tokenizer, self._sinks = tokenizer, list(sinks)
        self._special = {str(token): token for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._before: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": MESSAGE}]
        head = self._render(self._before) if self._before else ""
        first = self._turns(MESSAGE)
        later = self._turns(MESSAGE, REPLY, MESSAGE)
        after_reply = later.partition(REPLY)[2]
        rest = first[len(head) :]
        counts = [text.count(MESSAGE) for text in (head, rest, after_reply)]
        if not first.startswith(head) or counts != [len(self._before), 1, 1]:
            raise UserError("the chat template cannot be split into turns; leave --chat out")
        self.pinned = self._system_ids(head, system or "")
        self.opening, self.closing = self._around(rest)
        self.between, _ = self._around(after_reply)
        self._left = "".join(blank for blank in BLANKS if self._turns(blank + MESSAGE) == first)
        self._right = "".join(blank for blank in BLANKS if self._turns(MESSAGE + blank) == first)
        self.held: str | None = None  # blanks at the end of the message so far; None: the message is still empty
        self.notes = list(self._differences(first, later))

    def message(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield the pieces of a user's message without the blanks that the template trims.

        The message may be continued by further calls until `held` is set to None.
        """
        for piece in pieces:
            if self.held is None:
                piece = piece.lstrip(self._left)
            if not piece:
                continue
            piece = (self.held or "") + piece
            kept = piece.rstrip(self._right)
            self.held = piece[len(kept) :]
            if kept:
                yield kept

    def _differences(self, first: str, later: str) -> Iterator[str]:
        """Changes that the template makes to earlier messages, and that are impossible once these are in the stream."""
        if self._turns(MESSAGE + INNER) != first.replace(MESSAGE, MESSAGE + INNER):
            yield "the chat template changes the text of messages; the stream keeps it unchanged"
        before_reply = later.partition(REPLY)[0]
        if before_reply.removesuffix(" ") != first:
            yield "the chat template omits the text that prompts a reply from earlier turns; the stream keeps it"
        if self._turns(MESSAGE, f" {REPLY}\n", MESSAGE) == later:
            yield "the chat template trims earlier replies; the stream keeps them as the model wrote them"
        if self._turns(MESSAGE, f"<think>\n{REPLY}\n</think>\n\n{REPLY}", MESSAGE).count(REPLY) == 1:
            yield "the chat template removes the thoughts from earlier replies; the stream keeps them"

    def _system_ids(self, head: str, system: str) -> list[int]:
        if not head:
            return []
        before, after = head.split(MESSAGE)
        whole = self._render([{"role": "system", "content": system}])  # the template may change it, for example trim it
        if whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before + after):
            system = whole[len(before) : len(whole) - len(after)]
        else:
            raise UserError("the chat template does not render this system message; give another --system")
        pieces = [*self._pieces(before), system, *self._pieces(after)]
        intake = Intake(self._tokenizer, len(self._tokenizer))
        return [token for block in intake.blocks(pieces) for token in block]

    def _around(self, rendered: str) -> tuple[list[int | str], list[int | str]]:
        """The pieces to feed before a message and after it."""
        before, after = rendered.split(MESSAGE)
        return self._pieces(before), self._pieces(after)

    def _pieces(self, text: str) -> list[int | str]:
        """Split text of the template into ids of special tokens and the text between them.

        The text stays text, because a tokenizer may merge it with the message next to it.
        """
        names = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        parts = re.split(f"({names})", text) if names else [text]
        for place in range(1, len(parts), 2):
            token = self._special[parts[place]]
            if token.lstrip:
                parts[place - 1] = parts[place - 1].rstrip()
            if token.rstrip:
                parts[place + 1] = parts[place + 1].lstrip()
        ids = self._tokenizer.convert_tokens_to_ids
        pieces = [ids(part) if place % 2 else part for place, part in enumerate(parts) if part]
        own = len(self._sinks)
        return pieces[own:] if own and pieces[:own] == self._sinks else pieces

    def _turns(self, *contents: str) -> str:
        """Render messages of user and model in alternation, and the prompt for the model's next reply."""
        roles = ("user", "assistant")
        turns = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
        return self._render([*self._before, *turns], add_generation_prompt=True)

    def _render(self, messages: list[dict[str, str]], **settings: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except Exception as error:  # errors of jinja2, and those that a template raises
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template refuses the messages {roles}: {error}") from None
