"""Guards: with a sink in the softmax a stream keeps no token: it is the window and a column more, in every command."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import warnings

import pytest
import torch

from eval.cli import main as evaluate
from sinkmodel.cache import StreamingCache
from sinkmodel.export import export
from sinkmodel.scoring import dense_nll, streaming_nll
from sinkmodel.sinks import SinkConfig
from sinkmodel.streaming import Stream
from sinkmodel.streaming.command import main as stream_command
from tests import reference, tiny
from tests.models import IN_SOFTMAX, build, model_of, tokens
from tests.sinkmodel.cache.test_cache import LENGTHS, close, fed_batch, padded
from tests.sinkmodel.cache.test_endless import leap_far
from tests.streams import fed, held

BUDGET, LENGTH = 12, 64
POLICIES = ["dense", "window", "sink", "recompute"]
KEYS = [family for family in IN_SOFTMAX if family.endswith("kv_bias")]  # of which the place of the query matters


@functools.lru_cache
def slowly(model, ids: tuple[int, ...], sinks: int = 0, positions: str = "cache", start: int = 0) -> torch.Tensor:
    return reference.streaming_logits(model, [*ids, 0], BUDGET, sinks, positions, start)


def truth(model, ids, sinks: int = 0, positions: str = "cache", start: int = 0) -> torch.Tensor:
    """Logits [T, V] token by token, every rotation and the sink's score from their definitions."""
    return slowly(model, tuple(ids), sinks, positions, start)


def new(model, positions: str = "cache") -> StreamingCache:
    return StreamingCache(model.config, BUDGET, positions=positions)


# ------------------------------------------------------------------------------------------------- the cache itself


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_it_keeps_no_token_by_default_and_takes_no_slot(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = new(model_of(family))
        StreamingCache(model_of(family).config, BUDGET, sinks=0)
        assert Stream(model_of(family), budget=BUDGET).cache.sinks == 0
    assert (cache.sinks, cache.window) == (0, BUDGET)
    fed(model_of(family), cache, tokens(40), 7)
    assert {x.shape[2] for x in held(cache)} == {BUDGET}
    assert StreamingCache(model_of(family).config, BUDGET, sinks=2).sinks == 2, "it may keep tokens too"


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("sizes", [(1,), (LENGTH,), (3, 17, 1), (12, 5)], ids=str)
@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_a_stream_is_the_reference_in_pieces_of_any_size(family, sizes, positions):
    model, ids = model_of(family), tokens(LENGTH)
    close(fed(model, new(model, positions), ids, *sizes), truth(model, ids, positions=positions))


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_tokens_that_are_kept_as_well_are_kept(family, positions):
    model, ids = model_of(family), tokens(LENGTH)
    for sizes in ((1,), (3, 17, 1)):
        cache = StreamingCache(model.config, BUDGET, 3, positions)
        close(fed(model, cache, ids, *sizes), truth(model, ids, 3, positions))


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_the_reference_would_notice(family):
    """Guards all that is compared with it: no sink, a key more, and the query of a learned key elsewhere are others."""
    model, ids = model_of(family), tokens(LENGTH)
    exact, none = truth(model, ids), build(family)
    none.config.sink = {"kind": "none"}
    others = {"no sink": reference.streaming_logits(none, [*ids, 0], BUDGET, 0)}
    others["a key more"] = reference.streaming_logits(model, [*ids, 0], BUDGET + 1, 0)
    if family in KEYS:
        others["places"] = truth(model, ids, positions="text")
    for what, other in others.items():
        difference = (exact - other)[BUDGET + 1 :].abs().amax(-1)
        assert (difference.max() if what == "places" else difference.min()) > 1e-2, what


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("sizes", [[1], [51], [3, 17, 1]], ids=str)
@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_rows_of_a_padded_batch_are_streams_of_their_own(family, sizes, positions):
    model, rows = model_of(family), [tokens(length + 21, seed=length) for length in LENGTHS]
    ids, mask = padded(rows)
    for row, logits in zip(rows, fed_batch(model, new(model, positions), ids, sizes, mask)):
        close(logits[-len(row) :], truth(model, row, positions=positions))


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_generate_goes_on_past_the_budget(family):
    model, rows = model_of(family), [tokens(length, seed=length) for length in LENGTHS]
    ids, mask = padded(rows)
    made = model.generate(ids, attention_mask=mask, past_key_values=new(model), do_sample=False, max_new_tokens=20)
    for row, new_ids in zip(rows, made[:, ids.shape[1] :].tolist()):
        logits = truth(model, [*row, *new_ids])
        assert logits[len(row) - 1 : -1].argmax(-1).tolist() == new_ids


@pytest.mark.parametrize("family", KEYS)
def test_beams_and_reordered_rows_go_on_past_the_budget(family):
    model, ids = model_of(family), tokens(9)
    asked = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "do_sample": False, "length_penalty": 0.0}
    asked |= {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(torch.tensor([ids]), past_key_values=new(model), **asked)
    assert len(set(map(tuple, out.sequences.tolist()))) == 3
    for made, score in zip(out.sequences.tolist(), out.sequences_scores):
        log_p = truth(model, made).log_softmax(-1)[8:-1]
        close(score, log_p[torch.arange(20), made[9:]].sum())


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("family", KEYS)
def test_a_stream_that_was_put_aside_goes_on(family, positions, tmp_path):
    model, ids, cache = model_of(family), tokens(LENGTH), new(model_of(family), positions)
    fed(model, cache, ids[:35], 6)
    cache.save(tmp_path / "stream.pt")
    others = (
        StreamingCache.load(tmp_path / "stream.pt", model.config),
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
    )
    expected = truth(model, ids, positions=positions)[35:]
    for each in (cache, *others):
        close(fed(model, each, ids[35:], 3, 17, 1), expected)


@pytest.mark.parametrize("family", IN_SOFTMAX)
@pytest.mark.parametrize("sizes", [(64,), (1,)], ids=str)
def test_after_hundreds_of_tokens_and_many_moves_of_the_origin(family, sizes):
    """The last hundred tokens say all: nothing else is still seen, by any layer, at the end."""
    model, ids, cache = model_of(family), tokens(700), new(model_of(family))
    logits = fed(model, cache, ids, *sizes)
    assert cache.state.origin[0] > 600, "positions have got a new origin"
    close(logits[-20:], truth(model, ids[-100:])[-20:])


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("family", KEYS)
def test_after_four_million_positions(family, positions):
    """Guards the place of the query in the text, which a learned key gets however far it is."""
    model, ids, cache = model_of(family), tokens(90), new(model_of(family), positions)
    fed(model, cache, ids[:40], 7)
    far = leap_far(cache)
    logits = torch.cat([fed(model, cache, ids[40:70], 1), fed(model, cache, ids[70:], 20)])
    # The same tokens at the same places, fed from the start: what the first forty saw before the leap is gone by then.
    start = far if positions == "text" else 0
    close(logits[-20:], truth(model, ids, positions=positions, start=start)[-20:])


@pytest.mark.parametrize(
    ("family", "positions"),
    [("gpt_neox-zero", "cache"), ("gpt_neox-logit", "cache"), ("gpt_neox-kv_bias", "cache"), ("llama-kv_bias", "text")],
)
def test_the_compiled_step_is_compiled_once(family, positions):
    torch._dynamo.reset()
    model, ids, cache = build(family), tokens(70), new(model_of(family), positions)
    compiled = torch.compile(model, backend="aot_eager")
    start = fed(compiled, cache, ids[:3], 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        went_on = fed(compiled, cache, ids[3:], 1)
    close(torch.cat([start, went_on]), truth(model_of(family), ids, positions=positions))


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_a_stream_in_bf16_does_not_drift(family):
    exact, ids = build(family, initializer_range=0.1).bfloat16().float(), tokens(300)
    half = build(family, initializer_range=0.1).bfloat16()
    error = (fed(half, new(half), ids, 1) - fed(exact, new(exact), ids, 1)).abs().mean(-1)
    assert error[200:].mean() < 1.5 * error[BUDGET:100].mean() + 1e-3
    assert error.mean() < 0.03


# --------------------------------------------------------------------------------------------- scored in chunks


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_chunked_scores_are_those_of_the_reference(family, sinks):
    model, ids = model_of(family), tokens(150)
    exact = truth(model, ids, sinks).log_softmax(-1)
    expected = -exact[torch.arange(149), ids[1:]]
    for chunk in (1, 7, 64, 100):  # with blocks of queries, the origin moved, and all in one
        (nll,) = streaming_nll(model, [ids], BUDGET, sinks, chunk)
        torch.testing.assert_close(nll, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_documents_of_a_batch_and_the_dense_memory(family):
    model, documents = model_of(family), [tokens(length, seed=length) for length in (40, 90, 3)]
    for ids, nll in zip(documents, streaming_nll(model, documents, BUDGET, 0, 23)):
        torch.testing.assert_close(nll, streaming_nll(model, [ids], BUDGET, 0, 7)[0], atol=1e-4, rtol=0)
    (dense,), (whole,) = dense_nll(model, documents[:1], chunk=9), streaming_nll(model, documents[:1], 40, 0)
    torch.testing.assert_close(dense, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", IN_SOFTMAX)
def test_a_stream_scores_as_the_chunks_do(family):
    model, ids = model_of(family), tokens(LENGTH)
    stream = Stream(model, budget=BUDGET)
    scores = torch.tensor(list(stream.score(ids)))
    torch.testing.assert_close(scores, streaming_nll(model, [ids], BUDGET, 0)[0], atol=1e-4, rtol=0)
    expected = truth(model, ids)[-1].argmax()
    assert next(iter(stream.tokens(max_tokens=1))) == expected


# ----------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module", params=["gpt_neox-zero", "llama-logit", "gpt_neox-kv_bias"])
def exported(request, tmp_path_factory):
    """A run folder and its export."""
    folder = tmp_path_factory.mktemp("sinks")
    architecture, kind = request.param.split("-")
    tiny.checkpoint(folder / "run", architecture, SinkConfig(kind))
    return folder / "run", export(folder / "run", folder / "model")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(tiny.words(200))
    return path


def rows_of(tmp_path, *words) -> list[dict]:
    assert evaluate([*map(str, words), "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())["rows"]


def test_sink_eval_ppl_reads_run_and_export_alike(exported, book, tmp_path):
    options = ["--text", book, "--tokens", 60, "--budget", 24, "--sinks", 0, 2, "--policies", *POLICIES]
    by_run, by_export = (rows_of(tmp_path, "ppl", "--model", model, *options) for model in exported)
    assert [(row["policy"], row["sinks"], row["window"]) for row in by_run[1:3]] == [("window", 0, 24), ("sink", 2, 22)]
    losses = [row["nll"] for row in by_run]
    assert losses == pytest.approx([row["nll"] for row in by_export], abs=1e-6)
    assert len(set(losses)) == len(losses)


def test_sink_eval_latency_times_such_a_model(exported, tmp_path):
    options = ["--budgets", 8, "--tokens", 8, "--policies", *POLICIES]
    rows = rows_of(tmp_path, "latency", "--model", exported[1], *options)
    assert [(row["label"], row["keys_seen"]) for row in rows] == [
        ("dense", 8),
        ("window 0+8", 8),  # with no token to keep, the sink policy is the window
        ("recompute 0+8", 8),
    ]


def test_sink_stream_scores_a_text(exported, book, monkeypatch, capsys):
    with book.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert stream_command(["--model", str(exported[1]), "--budget", "24", "--score"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tokens ")
    assert "sinks=0" not in err
