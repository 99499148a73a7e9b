"""Guards: a tokenizer is trained on a sample that is bounded, however many files there are and whatever is in them."""

import os

import pytest

from recipes.data import preparation
from recipes.data.local_files import LocalFiles
from recipes.data.preparation import Source
from tests.recipes.corpus import make_text, make_texts


class Strands:
    """A corpus in memory, a strand a text."""

    def __init__(self, texts):
        self.texts = texts

    def strands(self):
        def strand(text):
            yield 0, (text,)

        return [strand(text) for text in self.texts]


def sample(corpus):
    return list(preparation._sample(Source(corpus, None, lambda head: "train")))


def test_a_file_is_closed_before_the_next_is_opened(tmp_path, monkeypatch):
    """Risk: 1,100 books under `ulimit -n 1024` end in EMFILE, as those that the sample takes a part of stay open."""
    for number, text in enumerate(make_texts(50, 40_000)):
        (tmp_path / f"{number:03}.txt").write_text(text)
    monkeypatch.setattr(preparation, "SAMPLE", 50 * 20_000)
    before = len(os.listdir("/proc/self/fd"))
    begun = 0
    for piece in preparation._sample(Source(LocalFiles([str(tmp_path)], "text"), None, lambda head: "train")):
        begun += piece.startswith(f"{begun} ")
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert begun == 50  # there is something of each


@pytest.mark.parametrize("count", [1, 3, 20, 5000])
@pytest.mark.parametrize("text", [make_text(70_000), "ACGT" * 50_000], ids=["text", "DNA"])
def test_the_sample_is_no_larger_than_it_should_be(count, text, monkeypatch):
    """Risk: a million files, or documents without a space, give more than a machine can train on."""
    monkeypatch.setattr(preparation, "SAMPLE", 1 << 17)
    taken = sum(map(len, sample(Strands([text] * count))))
    assert min(count * len(text), 1 << 17) * 0.9 < taken <= (1 << 17) + preparation.PIECE * (count <= 4) * count


def test_of_many_files_the_sample_is_spread_over_all(monkeypatch):
    monkeypatch.setattr(preparation, "SAMPLE", 1 << 16)
    pieces = sample(Strands(make_texts(1600, 9000)))
    numbers = [int(piece.split()[0]) for piece in pieces]
    assert numbers == list(range(0, 1600, 100))
    assert {len(piece) for piece in pieces} == {preparation.PREFIX}
