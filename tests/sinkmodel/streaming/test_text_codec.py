"""Guards: text cut anywhere gives the tokens of the whole text, and tokens piece by piece the text of all of them."""

from __future__ import annotations

import functools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sinkmodel.sinks import SinkConfig
from sinkmodel.streaming.text_codec import LONGEST_BROKEN, LONGEST_WORD, StopStrings, TextDecoder, TextEncoder
from sinkmodel.tokenizer import load_tokenizer
from tests.tiny import tokenizer, words

TEXT = words(60) + " naïve  café\n\n  日本語のテキスト, 🙂🙃 don't!\nA  line.\n" + words(40, seed=3)


def byte_level():
    return load_tokenizer(tokenizer(), SinkConfig("none"), 128)


@functools.lru_cache
def spaces_first():
    """As SentencePiece does it: ▁ for a space, one put before every text, and stripped at the start of a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator([words(3000), TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def byte_fallback():
    """As Llama 2: a character that is no token is spelled in bytes, each a token."""
    bytes_of = {f"<0x{i:02X}>": i for i in range(256)}
    backend = Tokenizer(models.BPE(vocab={**bytes_of, "a": 256}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


KINDS = {"byte-level": byte_level, "spaces first": spaces_first}


def encoded(tokens, text):
    return tokens(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_text_give_the_tokens_of_the_whole(kind):
    tokens = KINDS[kind]()
    whole = encoded(tokens, TEXT)
    assert tokens.decode([*whole[:5]]) == TEXT[: len(tokens.decode(whole[:5]))]
    for seed, longest in ((0, 1), (1, 3), (2, 9), (3, 40), (4, 10_000)):
        encoder, rng, ids, rest, early = TextEncoder(tokens), random.Random(seed), [], TEXT, 0
        while rest:
            length = rng.randint(1, longest)
            ids += encoder.push(rest[:length])
            rest = rest[length:]
            early = max(early, len(ids))
        assert early > len(whole) * 0.8, "tokens come while the text does"
        assert ids + encoder.flush() == whole, (kind, longest)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_after_another_is_a_text_of_its_own(kind):
    encoder = TextEncoder(KINDS[kind]())
    for text in ("some words here", "and others"):
        assert encoder.push(text) + encoder.flush() == encoded(encoder.tokenizer, text)


def test_text_that_spells_a_special_token_stays_text():
    encoder = TextEncoder(load_tokenizer(tokenizer(), SinkConfig("token"), 128))
    ids = encoder.push("a <|sink|> b <|endoftext|>") + encoder.flush()
    assert not {0, encoder.tokenizer.convert_tokens_to_ids("<|sink|>")} & set(ids)
    assert encoder.tokenizer.decode(ids) == "a <|sink|> b <|endoftext|>"


def test_a_word_without_end_is_not_held_without_end():
    encoder, ids, longest = TextEncoder(byte_level()), [], 0
    for _ in range(40):
        ids += encoder.push("ab" * 1000)
        longest = max(longest, len(encoder.pending) + len(encoder.context))
    assert longest < LONGEST_WORD + 2100
    assert encoder.tokenizer.decode(ids + encoder.flush()) == "ab" * 40_000


# ------------------------------------------------------------------------------------------------------- and back again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begun", [0, 7])
def test_pieces_joined_are_the_text_and_none_ends_within_a_character(kind, begun):
    tokens = KINDS[kind]()
    ids = encoded(tokens, TEXT)
    decoder = TextDecoder(tokens, ids[max(0, begun - 3) : begun])
    pieces = [decoder.push(token) for token in ids[begun:]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(ids) / 2
    assert tokens.decode(ids[:begun]) + "".join(pieces) + decoder.flush() == tokens.decode(ids)


def test_bytes_that_are_no_text_come_out_as_when_all_are_decoded_at_once():
    """A random model says such things, and a stop in the middle of a character leaves one."""
    tokens, rng = byte_level(), random.Random(0)
    for _ in range(30):
        ids = [rng.choice([*range(2, 258), *encoded(tokens, "🙂é")]) for _ in range(50)]
        decoder = TextDecoder(tokens)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokens.decode(ids)


def test_characters_that_are_spelled_in_bytes_are_whole():
    tokens = byte_fallback()
    text = "aé日🙂a🙂"
    decoder, ids = TextDecoder(tokens), encoded(tokens, text)
    assert len(ids) == len(text.encode())
    assert [piece for piece in map(decoder.push, ids) if piece] == list(text)
    broken = encoded(tokens, "日")[:2]
    assert "".join(map(decoder.push, [*encoded(tokens, "日"), *broken, 256, 256])) == "日��aa"


def test_broken_bytes_without_end_are_not_held_without_end():
    tokens = byte_level()
    (broken,) = encoded(tokens, "é")[:1]
    decoder, text = TextDecoder(tokens), ""
    for _ in range(1000):
        text += decoder.push(broken)
        assert len(decoder.known) + len(decoder.new) <= LONGEST_BROKEN + 1
    assert set(text) == {"\ufffd"}
    assert len(text) > 900


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_ids_that_mean_nothing_have_no_text(kind):
    """Nor may they be all the context of a word with a space in front."""
    tokens = KINDS[kind]()
    begun, end = encoded(tokens, "hi"), encoded(tokens, "hi you")
    decoder, text = TextDecoder(tokens, [*begun, 0, 1]), ""
    for token in [0, 5000, *[5000] * 99, 1, *end[len(begun) :], 0, 5000]:
        text += decoder.push(token)
        assert len(decoder.known) + len(decoder.new) < 10
    assert text == " you"


def test_a_stop_string_is_found_across_pieces_and_nothing_of_it_is_given():
    for text, strings, given in (
        ("ab STOP cd", ["STOP"], "ab "),
        ("ab STO STOP", ["STOP", "zzz"], "ab STO "),
        ("aaab", ["aab"], "a"),
        ("one\n\ntwo", ["\n\n", "two"], "one"),
        ("nothing here ST", ["STOP"], "nothing here ST"),
    ):
        for length in (1, 2, 3, 100):
            stops, out, met = StopStrings(strings), "", False
            for start in range(0, len(text), length):
                piece, met = stops.push(text[start : start + length])
                out += piece
                if met:
                    break
            assert met == any(string in text for string in strings)
            assert out + ("" if met else stops.flush()) == given, (text, length)


def test_text_is_held_back_only_as_long_as_it_may_become_a_stop_string():
    stops = StopStrings(["abc"])
    assert [stops.push(piece)[0] for piece in ("x", "a", "b", "d", "a")] == ["x", "", "", "abd", ""]
    assert stops.flush() == "a"
