"""Guards: cutting and splitting text changes no token and depends on nothing but the text."""

import random

import pytest

from recipes.data.pipeline import PREFIX, Piece, Place, beginning, cut, make_units, split_of
from recipes.data.tokenization import cuts_exactly, train_vocabulary
from sinkmodel.text_tokenizer import text_encoder
from tests.recipes.corpus import make_text, make_texts


@pytest.fixture(scope="module")
def definition():
    return train_vocabulary([make_text(50_000, seed=7)], 400).definition


def in_chunks(text, draw):
    place = 0
    while place < len(text):
        length = draw.randint(1, 300)
        yield text[place : place + length]
        place += length


@pytest.mark.parametrize("limit", [10, 57, 1000])
def test_pieces_encode_as_the_whole_text_does(definition, limit):
    encoder = text_encoder(definition)
    text = make_text(20_000, seed=1)
    pieces = list(cut([text], limit))
    assert "".join(pieces) == text
    assert len(pieces) > 15
    whole = encoder.encode(text, add_special_tokens=False).ids
    assert [i for piece in pieces for i in encoder.encode(piece, add_special_tokens=False).ids] == whole
    # and the place of the cut matters: the same text cut at every `limit` characters encodes otherwise
    blunt = [text[i : i + limit] for i in range(0, len(text), limit)]
    assert [i for piece in blunt for i in encoder.encode(piece, add_special_tokens=False).ids] != whole


@pytest.mark.parametrize("limit", [10, 57, 1000])
@pytest.mark.parametrize("kind", ["words", "no space", "blanks", "few spaces"])
def test_pieces_do_not_depend_on_how_the_text_comes(limit, kind, monkeypatch):
    monkeypatch.setattr("recipes.data.pipeline.NO_SPACE", 2000)
    text = {
        "words": make_text(5000, seed=2),
        "no space": "x" * 5000,
        "blanks": " \n " * 1500 + "a b" + "  " * 700,
        "few spaces": ("y" * 900 + " ") * 5,
    }[kind]
    expected = list(cut([text], limit))
    assert "".join(expected) == text
    assert max(map(len, expected)) <= max(limit, 2000)
    for seed in range(20):
        assert list(cut(in_chunks(text, random.Random(seed)), limit)) == expected


def test_a_tokenizer_that_adds_a_space_is_never_cut():
    from tokenizers import Tokenizer, models, normalizers, trainers

    plain = train_vocabulary([make_text(50_000)], 400).definition
    assert cuts_exactly(plain)
    prepending = Tokenizer.from_str(plain)
    prepending.normalizer = normalizers.Prepend("_")  # as Llama 2's
    assert not cuts_exactly(prepending.to_str())
    across = Tokenizer(models.BPE())  # no pre-tokenizer: its merges run across spaces
    across.train_from_iterator(
        ["one of the best of the "] * 50, trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    assert not cuts_exactly(across.to_str())


def test_split_shares_are_right_and_equal_documents_stay_together():
    texts = make_texts(4000, 40)
    splits = [split_of(text, 3, 0.1, 0.05) for text in texts]
    assert 320 < splits.count("validation") < 480
    assert 140 < splits.count("test") < 260
    assert [split_of(text, 3, 0.1, 0.05) for text in texts] == splits
    assert [split_of(text, 4, 0.1, 0.05) for text in texts] != splits
    assert {split_of(text, 3, 0, 0) for text in texts} == {"train"}


def test_the_beginning_of_a_text_is_the_same_however_it_comes_and_no_more_is_read():
    for text in ("", "short", make_text(3 * PREFIX, seed=3)):
        for seed in range(5):
            head, whole = beginning(in_chunks(text, random.Random(seed)))
            assert head[:PREFIX] == text[:PREFIX]
            assert len(head) < PREFIX + 300
            assert "".join(whole) == text
    text = make_text(3 * PREFIX, seed=3)
    for seed in range(20):
        assert split_of(text[:PREFIX] + "other", seed, 0.4, 0.4) == split_of(text, seed, 0.4, 0.4)


class Lists:
    """A corpus in memory."""

    skipped = 0

    def __init__(self, texts):
        self.texts = texts

    def documents(self, cursor=None):
        for number in range(cursor or 0, len(self.texts)):
            yield number, (self.texts[number],)


def test_reading_goes_on_from_the_end_of_any_unit():
    sources = [(Lists(make_texts(6, 900, seed)), lambda piece: "train") for seed in (1, 2)]
    units = list(make_units(sources, Place(), limit=100, size=250))
    pieces = [piece for unit in units for piece in unit.pieces]
    assert len(units) > 20
    assert any(not unit.pieces[-1].last for unit in units)  # some end within a document
    assert sum(piece.first for piece in pieces) == sum(piece.last for piece in pieces) == 12
    for number, unit in enumerate(units):
        assert list(make_units(sources, unit.end, limit=100, size=250)) == units[number + 1 :]
    assert units[-1].end == Place(2)


def test_a_document_is_one_split_from_end_to_end():
    texts = make_texts(50, 500)
    sources = [(Lists(texts), lambda piece: split_of(piece, 0, 0.3, 0.3))]
    splits: dict[int, set[str]] = {}
    number = -1
    for unit in make_units(sources, Place(), limit=60, size=200):
        for piece in unit.pieces:
            assert isinstance(piece, Piece)
            number += piece.first
            splits.setdefault(number, set()).add(piece.split)
    assert len(splits) == 50
    assert all(len(names) == 1 for names in splits.values())
    assert len(set.union(*splits.values())) == 3
