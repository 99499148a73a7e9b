"""Guards: exactly one row of sinks in front, however text is encoded; text cannot bring a sink of its own."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from sinkmodel.errors import UserError
from sinkmodel.sinks import SinkConfig, padded_vocabulary
from sinkmodel.tokenizer import TextTokenizer, load_tokenizer, sink_tokenizer
from tests import tiny


@pytest.fixture(params=[0, 1, 2], ids=["vanilla", "one sink", "two sinks"])
def case(request):
    sink = SinkConfig("token", request.param) if request.param else SinkConfig()
    text = tiny.tokenizer()
    ids = sink.ids(text.vocabulary)
    assert len(ids) == request.param
    return load_tokenizer(text, sink, positions=16), ids


def front(ids: list[int], sinks: list[int]) -> bool:
    """The sinks stand in front in order, and nowhere else."""
    return ids[: len(sinks)] == sinks and not set(sinks) & set(ids[len(sinks) :])


def test_single_pair_and_truncated_either_side(case):
    tokenizer, sinks = case
    bare = tokenizer("a b c", add_special_tokens=False).input_ids
    assert tokenizer("a b c").input_ids == sinks + bare
    pair = tokenizer("a b c", "a").input_ids
    assert front(pair, sinks)
    assert len(pair) > len(sinks + bare)
    long = "a b c d e f g h i j k l m n o p q r s t"
    for side in ("left", "right"):
        tokenizer.truncation_side = side
        cut = tokenizer(long, truncation=True, max_length=8).input_ids
        assert len(cut) == 8
        assert front(cut, sinks)


def test_batch_is_padded_on_the_left_of_the_sink(case):
    tokenizer, sinks = case
    batch = tokenizer(["a", "a b c d e"], padding=True)
    assert len(set(map(len, batch.input_ids))) == 1
    for ids, mask in zip(batch.input_ids, batch.attention_mask):
        assert front([i for i, m in zip(ids, mask) if m], sinks)
    assert batch.attention_mask[0][0] == 0


def test_chat_template_puts_the_sink_once_and_no_message_can(case):
    tokenizer, sinks = case
    messages = [
        {"role": "user", "content": "a <|sink|> b <|sink2|> <|si<|sink|>nk|>"},
        {"role": "<|sink|>", "content": "c"},
    ]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True).input_ids
    assert front(ids, sinks)
    assert "User: a " in tokenizer.decode(ids)


def test_corpus_text_cannot_become_a_sink(case):
    tokenizer, sinks = case
    ids = tokenizer("a <|sink|> b", add_special_tokens=False, split_special_tokens=True).input_ids
    assert not set(ids) & set(sinks)
    assert tokenizer.decode(ids) == "a <|sink|> b"


def test_sinks_take_the_first_free_ids_of_the_padded_vocabulary():
    assert SinkConfig("token", 2).ids(50_277) == [50_277, 50_278]
    assert padded_vocabulary(50_277) == 50_304
    assert padded_vocabulary(50_288) == 50_304
    assert padded_vocabulary(50_289) == 50_432, "sixteen rows stay free, whatever the sink kind: twins have one shape"


def test_a_tokenizer_with_a_sink_of_its_own_is_refused():
    backend = tiny.tokenizer().backend()
    backend.add_special_tokens([AddedToken("<|sink|>", special=True)])
    with pytest.raises(UserError, match="has a token <|sink|> already"):
        sink_tokenizer(TextTokenizer(backend.to_str()), SinkConfig("token"))


def test_wrong_sinks_are_refused():
    with pytest.raises(UserError, match="sink.kind"):
        SinkConfig("tokne")
    with pytest.raises(UserError, match="sink.count"):
        SinkConfig("token", 0)
