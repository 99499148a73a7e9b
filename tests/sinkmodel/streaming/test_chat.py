"""Guards: the ids of a chat are those of the template over the whole conversation, or the difference is named."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import AddedToken

from sinkmodel.sinks import SinkConfig
from sinkmodel.streaming.chat import Chat
from sinkmodel.streaming.intake import Intake
from sinkmodel.tokenizer import load_tokenizer
from tests import tiny

HEADERS = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>\n\n{{ CONTENT }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ CONTENT }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ CONTENT }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTENTS = {
    "as it is": "message['content']",
    "trim": "message['content'] | trim",
    "strip": "message['content'].strip()",
    "left": "message['content'].lstrip()",
    "right": "message['content'].rstrip()",
    "line ends": "message['content'].strip('\n')",
}
MESSAGES = ["hello you", "  hello you \n", "\n\n  a  b\n\nc\u00a0\t", "", " \n ", " hello.", "a\n"]


def chat_tokenizer(template: str, content: str):
    tokenizer = load_tokenizer(tiny.tokenizer(), SinkConfig("token"), 128)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|eot|>"]})
    tokenizer.chat_template = template.replace("CONTENT", content)
    return tokenizer


def pieces_of(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("template", [HEADERS, CHATML, PLAIN], ids=["headers", "chatml", "plain"])
def test_blanks_that_a_template_trims_are_not_fed(template, content):
    """Guards ids that the model never saw in training: those of a message with blanks which its template removes."""
    tokenizer = chat_tokenizer(template, content)
    for message, system, size in itertools.product(MESSAGES, [None, *MESSAGES], [1, 3, 100]):
        chat = Chat(tokenizer, [300], system)
        turns = [{"role": "user", "content": message}]
        system_turn = [] if system is None else [{"role": "system", "content": system}]
        front = [300, *chat.pinned] if template is HEADERS else chat.pinned
        ids = front + blocks(tokenizer, [*chat.opening, *chat.message(pieces_of(message, size)), *chat.closing])
        whole = tokenizer.apply_chat_template([*system_turn, *turns], add_generation_prompt=True).input_ids
        if template is not PLAIN or system is None:  # without a special token the system's end may join what follows
            assert ids == whole, (message, system)
        turns += [{"role": "assistant", "content": "a reply"}, {"role": "user", "content": message}]
        chat.held = None
        later = blocks(tokenizer, [*chat.between, *chat.message(pieces_of(message, size)), *chat.closing])
        whole = tokenizer.apply_chat_template([*system_turn, *turns], add_generation_prompt=True).input_ids
        if template is not PLAIN:
            assert [*ids, *ids_of(tokenizer, "a reply"), *later] == whole, (message, system)


def test_what_a_template_does_to_earlier_messages_and_a_stream_cannot_is_named():
    """Guards a stream that silently differs from the whole conversation: the reply is in the cache as it was."""
    cases = [
        ("message['content']", CHATML, []),
        ("message['content'] | trim", CHATML, ["trims earlier replies"]),
        ("message['content'].split('</think>')[-1].lstrip('\n')", CHATML, ["removes the thoughts"]),
        ("message['content'] | upper", CHATML, ["changes the text of messages"]),
        (
            "message['content']",
            CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
            ["omits the text that prompts a reply"],
        ),
    ]
    for content, template, expected in cases:
        notes = Chat(chat_tokenizer(template, content)).notes
        assert len(notes) == len(expected), notes
        for note, words in zip(notes, expected):
            assert words in note


def test_special_tokens_that_take_in_the_blanks_around_them():
    """Phi-3's do: the template's line end after `<|end|>` has no id."""
    tokenizer = load_tokenizer(tiny.tokenizer(), SinkConfig("none"), 128)
    tokenizer.add_tokens(
        [AddedToken("<|u|>", special=True, rstrip=True), AddedToken("<|e|>", special=True, lstrip=True)]
    )
    tokenizer.chat_template = "{% for m in messages %}<|u|>\n[{{ m['content'] }}] <|e|>\n{% endfor %}"
    chat = Chat(tokenizer)
    ids = blocks(tokenizer, [*chat.opening, *chat.message(["hello"]), *chat.closing])
    assert ids == tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]).input_ids


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def blocks(tokenizer, source) -> list[int]:
    return [token for block in Intake(tokenizer, len(tokenizer)).blocks(source) for token in block]
