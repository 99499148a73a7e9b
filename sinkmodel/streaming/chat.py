"""A chat template, turn by turn: it wants all messages so far, and an endless stream has forgotten them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.streaming.intake import Intake

MESSAGE, REPLY = "\ue000", "\ue001"  # of Unicode's private use: no template has them


class Chat:
    """What stands around a message: rendered once on placeholders, so that turn after turn costs the same.

        stream = Stream(model, tokenizer, pinned=chat.pinned)
        stream.feed([*chat.opening, "Hello", *chat.closing])       # then stream.text()
        stream.feed([*chat.between, "And now?", *chat.closing])    # begins with the end of the reply

    A message is fed as text, so that one which spells a special token does not get it. `pinned` is the system message
    as the template puts it. Raises UserError where there is no chat template, or one that cannot be taken apart.

    Args:
        sinks: ids that the stream puts in front by itself, and the template perhaps too.
    """

    def __init__(self, tokenizer: Any, sinks: Sequence[int] = (), system: str | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template; leave --chat out, and the model continues your text")
        self._tokenizer, self._sinks = tokenizer, list(sinks)
        told = [] if system is None else [{"role": "system", "content": MESSAGE}]
        user, reply = {"role": "user", "content": MESSAGE}, {"role": "assistant", "content": REPLY}
        head = self._render(told) if told else ""
        first = self._render([*told, user], add_generation_prompt=True)
        later = self._render([*told, user, reply, user], add_generation_prompt=True)
        behind = later.partition(REPLY)[2]
        rest = first[len(head) :]
        if not first.startswith(head) or [text.count(MESSAGE) for text in (head, rest, behind)] != [len(told), 1, 1]:
            raise UserError("the chat template cannot be taken apart turn by turn; leave --chat out")
        self.pinned = self._system_ids(head, system or "")
        self.opening, self.closing = self._around(rest)
        self.between, _ = self._around(behind)

    def _system_ids(self, head: str, system: str) -> list[int]:
        if not head:
            return []
        before, after = self._around(head)
        vocabulary = len(self._tokenizer)
        return [
            token for block in Intake(self._tokenizer, vocabulary).blocks([*before, system, *after]) for token in block
        ]

    def _around(self, rendered: str) -> tuple[list[int | str], list[int]]:
        """What is fed before a message and behind it. A space before it belongs to its first word."""
        before, after = rendered.split(MESSAGE)
        bare = before.rstrip(" ")
        ids: list[int | str] = [*self._ids(bare)]
        return [*ids, before[len(bare) :]] if bare != before else ids, self._ids(after)

    def _ids(self, text: str) -> list[int]:
        """Of the template's own text, in which special tokens are meant."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []
        own = len(self._sinks)
        return ids[own:] if own and ids[:own] == self._sinks else ids

    def _render(self, messages: list[dict[str, str]], **settings: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except Exception as error:  # jinja2's own, and what a template raises by itself
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template refuses the messages {roles}: {error}") from None
