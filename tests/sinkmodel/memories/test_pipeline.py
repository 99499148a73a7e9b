"""Guards `memory.on(model)` around transformers' own pipeline, which takes no cache."""

from __future__ import annotations

import pytest
from transformers import pipeline

from sinkmodel.export import export
from sinkmodel.memories import make_memory
from sinkmodel.sinks import SinkConfig
from tests import tiny

BUDGET, AFTER = 12, 6


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    return pipeline(
        "text-generation",
        model=str(export(tiny.checkpoint(place / "run", "llama", SinkConfig("token")), place / "model")),
    )


@pytest.mark.parametrize("name", ["snapkv", "h2o", "gemfilter"])
def test_every_text_is_read_by_an_empty_memory(pipe, name):
    """A prompt alone, several in turn, and a batch of unequal lengths; afterwards the pipeline has its own cache."""

    def new():
        return make_memory(name, pipe.model, BUDGET, window=4)

    arguments = {"max_new_tokens": AFTER, "do_sample": False}
    texts = [tiny.words(40, seed=0), tiny.words(25, seed=1)]

    def said(*given, **more):
        answers = pipe(*given, **arguments, **more, return_tensors=True)
        return [(row[0] if isinstance(row, list) else row)["generated_token_ids"] for row in answers]

    dense = [said(text)[0] for text in texts]
    expected, kept = [], []
    for text in texts:
        memory, batch = new(), pipe.tokenizer(text, return_tensors="pt")
        expected.append(pipe.model.generate(**batch, past_key_values=memory, **arguments)[0].tolist())
        kept.append(memory.kept_positions(1))
    assert expected != dense, "the budget matters"
    memory = new()
    with memory.on(pipe.model):
        for text, ids, positions in zip(texts, expected, kept):
            assert said(text) == [ids]
            assert memory.kept_positions(1) == positions
        rows = said(texts, batch_size=2)
        assert [row[-AFTER:] for row in rows] == [ids[-AFTER:] for ids in expected]
        assert [memory.kept_positions(1, row) for row in (0, 1)] == kept
    assert [said(text)[0] for text in texts] == dense
