"""Guards: a stream is what its cache makes of it, token by token, for ever, and keeps nothing else."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
from collections import deque

import pytest
import torch
from torch import Tensor

from sinkmodel import StreamingCache
from sinkmodel.errors import UserError
from sinkmodel.scoring import streaming_nll
from sinkmodel.sinks import SinkConfig, write_sink
from sinkmodel.streaming import Stream
from sinkmodel.streaming.intake import BLOCK
from sinkmodel.streaming.sampling import Sampler
from sinkmodel.tokenizer import load_tokenizer
from tests.models import VOCABULARY, build, model_of, tokens
from tests.sinkmodel.streaming.test_text_codec import spaces_first
from tests.streams import greedy_ids
from tests.tiny import tokenizer, words

BUDGET = 16
TEXT = words(400)


def sink_model(**changes):
    """A model with a sink of its own, id 300, and the tokenizer that belongs to it."""
    model = build("llama", vocab_size=320, max_position_embeddings=128, **changes)
    write_sink(model.config, SinkConfig("token"), [300])
    return model, load_tokenizer(tokenizer(), SinkConfig("token"), 128)


def spoken(text, ids) -> str:
    return text.decode(ids, skip_special_tokens=True)


def step(model, cache, token):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]


# ------------------------------------------------------------------------------------------- the same as token by token


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_tokens_are_those_of_a_loop_over_the_cache_and_of_the_reference(family):
    model, ids = model_of(family), tokens(40)
    stream = Stream(model, budget=BUDGET, sinks=2)
    stream.feed(ids)
    given = list(stream.tokens(max_tokens=30, stop=()))

    cache, expected = StreamingCache(model.config, BUDGET, 2), []
    for token in ids:
        logits = step(model, cache, token)
    while len(expected) < 30:
        expected.append(int(logits.argmax()))
        logits = step(model, cache, expected[-1])
    assert given == expected == greedy_ids(model, ids, BUDGET, 2, 30)
    assert stream.seen == 40 + 29, "the last one has not been needed yet"
    stream.feed([])
    torch.testing.assert_close(stream.logits[0], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_strangers_model_streams_behind_what_its_tokenizer_puts_in_front(count):
    """Risk: a Llama streams without its `<s>`. The same model without our record: the same losses."""
    sink = SinkConfig("token", count)
    model, text = build("llama", vocab_size=320, max_position_embeddings=128), load_tokenizer(tokenizer(), sink, 128)
    theirs = list(Stream(model, text, BUDGET).score(TEXT))
    without = list(Stream(model, budget=BUDGET).score(text(TEXT, add_special_tokens=False).input_ids))
    write_sink(model.config, sink, sink.ids(300))
    assert theirs == list(Stream(model, text, BUDGET).score(TEXT))
    assert len(theirs) == len(without) + 1
    assert theirs[1:] != without


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_scores_are_those_of_chunked_scoring_however_they_are_fed(sinks):
    model, ids = model_of("llama"), tokens(700)
    (expected,) = streaming_nll(model, [ids], BUDGET, sinks)
    with pytest.warns(UserWarning, match="plain window") if sinks == 0 else contextlib.nullcontext():
        stream = Stream(model, budget=BUDGET, sinks=sinks)
    at_once = list(stream.score(ids))
    stream.reset()
    in_parts = [
        *stream.score(ids[:1]),
        *stream.score(iter(ids[1:5])),
        *stream.score(torch.tensor(ids[5:400])),
        *stream.score([]),
        *stream.score(torch.tensor([ids[400:]])),
    ]
    for given in (at_once, in_parts):
        torch.testing.assert_close(torch.tensor(given), expected, atol=1e-4, rtol=0)


def test_scores_go_on_after_feeding_and_after_generating():
    model, ids = model_of("gpt_neox"), tokens(30)
    stream = Stream(model, budget=BUDGET)
    stream.feed(ids[:10])
    generated = list(stream.tokens(max_tokens=5, stop=()))
    given = list(stream.score(ids[10:]))
    (expected,) = streaming_nll(model, [ids[:10] + generated + ids[10:]], BUDGET, 1)
    torch.testing.assert_close(torch.tensor(given), expected[14:], atol=1e-4, rtol=0)


def test_the_sinks_of_a_model_stand_in_front_once_and_foresee_the_first_token():
    model, text = sink_model()
    stream = Stream(model, text, budget=BUDGET)
    ids = text(TEXT, add_special_tokens=False).input_ids
    given = [*stream.score(TEXT[:50]), *stream.score(TEXT[50:])]
    parts = [text(part, add_special_tokens=False).input_ids for part in (TEXT[:50], TEXT[50:])]
    (expected,) = streaming_nll(model, [[300, *parts[0], *parts[1]]], BUDGET, 1)
    torch.testing.assert_close(torch.tensor(given), expected, atol=1e-4, rtol=0)
    assert stream.cache.sinks == 1
    assert stream.seen == 1 + len(parts[0]) + len(parts[1])

    stream.reset()
    pieces = (TEXT[i : i + 7] for i in range(0, len(TEXT), 7))
    (expected,) = streaming_nll(model, [[300, *ids]], BUDGET, 1)
    torch.testing.assert_close(torch.tensor(list(stream.score(pieces))), expected, atol=1e-4, rtol=0)


def test_what_generates_from_nothing_is_the_sink():
    model, text = sink_model()
    stream = Stream(model, text, budget=BUDGET)
    cache = StreamingCache(model.config, BUDGET, 1)
    logits = step(model, cache, 300)
    logits[300] = -torch.inf
    assert next(stream.tokens(stop=())) == int(logits.argmax())


# ------------------------------------------------------------------------------------------------------ rows in a batch


def test_rows_of_a_batch_are_as_streams_of_their_own():
    """Guards ragged feeding before and after the cache is full, rows that stop early, and several turns."""
    model = model_of("llama")
    turns = [(tokens(30, seed=1), tokens(7, seed=2)), (tokens(1, seed=3), tokens(300, seed=4)), ([], tokens(3, seed=5))]
    batch = Stream(model, budget=BUDGET, sinks=2, batch=2)
    alone = [Stream(model, budget=BUDGET, sinks=2) for _ in range(2)]
    lengths = []
    for turn in turns:
        scores = list(batch.score(turn))
        generated = list(batch.tokens(max_tokens=12, stop=[5, 26]))
        for row, stream in enumerate(alone):
            expected = list(stream.score(turn[row]))
            given = [value[row] for value in scores if value[row] is not None]
            torch.testing.assert_close(torch.tensor(given), torch.tensor(expected), atol=1e-4, rtol=0)
            expected = list(stream.tokens(max_tokens=12, stop=[5, 26]))
            assert [ids[row] for ids in generated] == expected + [None] * (len(generated) - len(expected))
            lengths.append(len(expected))
            torch.testing.assert_close(batch.logits[row], stream.logits[0], atol=1e-4, rtol=0)
    assert any(lengths[2 * turn] != lengths[2 * turn + 1] for turn in range(3)), "one row stopped before the other"
    assert batch.cache.seen == [stream.seen for stream in alone]


def test_drawn_rows_are_as_streams_of_their_own_too():
    model = model_of("llama")
    batch, drawn = Stream(model, budget=BUDGET, batch=2), Sampler(temperature=1.5, seed=7)
    given = []
    for ids in (tokens(5), tokens(6, seed=9)):
        batch.feed([ids, ids])
        given.append(list(batch.tokens(max_tokens=20, stop=[5], sample=drawn)))
    for row in range(2):
        stream, drawn = Stream(model, budget=BUDGET), Sampler(temperature=1.5, seed=7 + row)
        for ids, generated in zip((tokens(5), tokens(6, seed=9)), given):
            stream.feed(ids)
            expected = list(stream.tokens(max_tokens=20, stop=[5], sample=drawn))
            assert [ids[row] for ids in generated if ids[row] is not None] == expected
    assert [x for x, _ in given[0]] != [y for _, y in given[0]]


def test_texts_of_a_batch():
    model, text = sink_model()
    texts = [TEXT[:100], TEXT[30:50]]
    batch = Stream(model, text, budget=BUDGET, batch=2)
    batch.feed(texts)
    given = list(batch.text(max_tokens=20, stop=()))
    for row in range(2):
        stream = Stream(model, text, budget=BUDGET)
        stream.feed(texts[row])
        assert "".join(pieces[row] for pieces in given) == "".join(stream.text(max_tokens=20, stop=()))


# ------------------------------------------------------------------------------------------------------ constant memory


def weight(thing, seen=None) -> tuple[int, int]:
    """Bytes of all tensors that hang on a thing, and the number of all objects; models and tokenizers left out."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0, 0
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return thing.untyped_storage().nbytes(), 1
    if isinstance(thing, str):
        return len(thing), 1
    parts = []
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, deque)):
        parts = list(thing)
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith("sinkmodel"):
        left_out = ("model", "tokenizer", "traits")
        parts = [value for name, value in vars(thing).items() if name not in left_out]
    weights = [weight(part, seen) for part in parts]
    return sum(x for x, _ in weights), 1 + sum(n for _, n in weights)


def test_nothing_grows_with_the_stream():
    model, text = sink_model(num_hidden_layers=1)
    # Untied from the text: a random model soon repeats itself, and a drawn one does not.
    drawn = Sampler(temperature=1.0)
    stream = Stream(model, text, budget=BUDGET, pinned="Be kind.", on_evict=lambda *evicted: None)
    forever = itertools.cycle(words(100) + " ")

    def live() -> int:
        gc.collect()
        return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor)

    def go_on(count: int) -> None:
        start = stream.seen
        while stream.seen < start + count:
            stream.feed(itertools.islice(forever, 150))
            for _ in stream.score("".join(itertools.islice(forever, 150))):
                pass
            for _ in stream.text(max_tokens=15, stop=(), sample=drawn):
                pass
            for _ in stream.tokens(max_tokens=5, stop=(), sample=drawn):
                pass

    go_on(50)
    early, early_live = weight(stream), live()
    assert 50 < stream.seen < 500
    go_on(5000)
    assert stream.seen > 5000
    (size, count), (early_size, early_count) = weight(stream), early
    assert size <= early_size + 300, "but for a few characters of text"
    assert count <= early_count + 20
    assert live() <= early_live + 1000
    assert stream.cache.layers[0].keys.shape[2] == BUDGET


def test_an_endless_iterator_is_read_as_it_is_needed():
    taken = 0

    def endless():
        nonlocal taken
        for taken in itertools.count(1):
            yield taken % VOCABULARY

    scores = Stream(model_of("llama"), budget=BUDGET).score(endless())
    for _ in range(300):
        next(scores)
    assert 301 <= taken <= 300 + BLOCK
    scores.close()


def test_a_piece_of_text_is_used_before_the_next_is_asked_for():
    """Else a pipe in which little comes would be scored hours late."""
    model, text = sink_model()
    stream, seen = Stream(model, text, budget=BUDGET), []

    def pieces():
        for word in ("one two", " three", " four", " five"):
            yield word
            seen.append(stream.seen)

    stream.feed(pieces())
    assert seen == sorted(set(seen))
    assert stream.seen - seen[-1] <= len(text(" five", add_special_tokens=False).input_ids)


# ---------------------------------------------------------------------------------------------------- eviction, pinning


def test_a_front_longer_than_a_block_is_fed_once_and_whole():
    model = build("llama", max_position_embeddings=1024)
    pinned, ids = tokens(2 * BLOCK + 9), tokens(60, seed=1)
    stream = Stream(model, budget=len(pinned) + 20, pinned=pinned)
    given = [*stream.score(ids[:30]), *stream.score(ids[30:])]
    (expected,) = streaming_nll(model, [pinned + ids], len(pinned) + 20, len(pinned))
    torch.testing.assert_close(torch.tensor(given), expected[len(pinned) - 1 :], atol=1e-4, rtol=0)


def test_evictions_are_told_in_order_with_place_and_id():
    evicted = []
    ids = tokens(700)
    stream = Stream(model_of("llama"), budget=8, sinks=2, on_evict=lambda *what: evicted.append(what))
    stream.feed(ids[:8])
    assert evicted == []
    stream.feed(ids[8:10])
    assert evicted == [(0, 2, ids[2]), (0, 3, ids[3])]
    stream.feed(ids[10:])
    generated = list(stream.tokens(max_tokens=5, stop=()))
    stream.feed([1])
    everything = [*ids, *generated, 1]
    assert evicted == [(0, place, everything[place]) for place in range(2, len(everything) - 6)]


def test_evictions_of_rows_are_told_row_by_row_as_they_happen():
    evicted = []
    rows = [tokens(9, seed=1), tokens(12, seed=2)]
    stream = Stream(model_of("llama"), budget=6, sinks=1, batch=2, on_evict=lambda *what: evicted.append(what))
    stream.feed(rows)
    for row in range(2):
        assert [what[1:] for what in evicted if what[0] == row] == [
            (p, rows[row][p]) for p in range(1, len(rows[row]) - 5)
        ]
    assert [what[0] for what in evicted] == [0, 1, 0, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("rows", [None, 2])
def test_a_stream_that_was_reset_is_a_new_one(rows):
    """Risk: something of the old stream lives on: evicted tokens, half a word, the last that was given out."""
    (model, text), evicted = sink_model(), []
    new, used = (
        Stream(model, text, BUDGET, pinned=[5], batch=rows, on_evict=lambda *what: evicted.append(what))
        for _ in range(2)
    )

    def of_rows(*texts):
        return texts[0] if rows is None else list(texts)

    def interrupted():
        yield from ("a stream ", "that stops wit")
        raise KeyboardInterrupt

    def run(stream) -> tuple:
        evicted.clear()
        first = list(stream.text(max_tokens=2, stop=())), stream.state_dict()["stream"]["recent"]
        scores = list(stream.score(of_rows(TEXT[:90], TEXT[100:300])))
        generated = list(stream.text(max_tokens=5, stop=()))
        beside = {name: value for name, value in stream.state_dict()["stream"].items() if name != "logits"}
        return first, scores, generated, list(evicted), beside, stream.seen, stream.logits.tolist()

    run(used)
    with pytest.raises(KeyboardInterrupt):
        used.feed(of_rows(interrupted(), "b"))
    assert list(used.tokens(max_tokens=3, stop=())), "the last one is given out and not fed"
    assert len(evicted) > 10
    used.reset()
    assert used.logits is None
    assert run(used) == run(new)


@pytest.mark.parametrize("as_text", [False, True])
def test_pinned_tokens_stay_and_are_seen(as_text):
    model, text = sink_model()
    pinned = text("be kind to me", add_special_tokens=False).input_ids
    ids, evicted = tokens(200), []
    stream = Stream(
        model, text, budget=24, pinned="be kind to me" if as_text else pinned, on_evict=lambda *x: evicted.append(x)
    )
    given = torch.tensor(list(stream.score(ids)))
    front = [300, *pinned]
    assert stream.cache.sinks == len(front) > 4
    (expected,) = streaming_nll(model, [front + ids], 24, len(front))
    torch.testing.assert_close(given, expected[len(front) - 1 :], atol=1e-4, rtol=0)
    assert min(place for _, place, _ in evicted) == len(front)

    other = Stream(model, text, budget=24, pinned=pinned[::-1])
    assert (given - torch.tensor(list(other.score(ids))))[100:].abs().max() > 1e-2, "they are seen long after"
    unpinned = Stream(model, text, budget=24)
    unpinned.feed(pinned)
    assert (given - torch.tensor(list(unpinned.score(ids))))[100:].abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------ stop and sample


def test_a_stop_id_ends_the_turn_and_never_enters_the_stream():
    model, ids = model_of("llama"), tokens(20)
    stream = Stream(model, budget=BUDGET)
    stream.feed(ids)
    free = list(stream.tokens(max_tokens=20, stop=()))
    stop = free[8]
    first = free.index(stop)
    assert first > 0
    stream.reset()
    stream.feed(ids)
    assert list(stream.tokens(stop=[stop])) == free[:first]
    assert stream.seen == 20 + first
    assert list(stream.tokens(stop=[stop])) == [], "it still would be next"
    assert list(stream.tokens(max_tokens=3, stop=())) == free[first : first + 3]


def test_without_stop_the_end_of_text_ends_a_turn():
    model = build("llama")
    model.generation_config.eos_token_id = [3, 26]
    stream = Stream(model, budget=BUDGET)
    stream.feed(tokens(20))
    assert stream.ends_of_text() == [3, 26]
    free = list(Stream.from_state(stream.state_dict(), model).tokens(max_tokens=30, stop=()))
    ends = min(free.index(token) for token in (3, 26) if token in free)
    assert list(stream.tokens(max_tokens=30)) == free[:ends]


def test_a_stop_string_is_met_across_tokens_and_nothing_of_it_is_given():
    model, text = sink_model()
    stream = Stream(model, text, budget=BUDGET)
    stream.feed(TEXT[:40])
    state = stream.state_dict()
    ids = list(stream.tokens(max_tokens=40, stop=()))
    whole = spoken(text, ids)
    spans = [len(spoken(text, ids[:n])) for n in range(len(ids))]
    border = next(place for place in spans[10:] if "\ufffd" not in whole[place - 2 : place + 2])
    string = whole[border - 2 : border + 2]
    for stop in ([string, "never"], string):
        again = Stream.from_state(state, model, text)
        given = list(again.text(max_tokens=40, stop=stop))
        assert "".join(given) == whole[: whole.index(string)]
        assert all(given)
    again = Stream.from_state(state, model, text)
    count = len(list(again.tokens(max_tokens=40, stop=[string])))
    assert string in spoken(text, ids[:count])
    assert string not in spoken(text, ids[: count - 1])
    again.feed([])
    assert again.seen == stream.seen - 40 + count + 1, "what was generated stays in the stream"


def test_pieces_of_text_are_the_text_of_the_tokens():
    """A random model says broken UTF-8: the hardest case."""
    model, text = sink_model()
    for seed in range(3):
        stream = Stream(model, text, budget=BUDGET)
        stream.feed(TEXT[:40])
        state = stream.state_dict()
        ids = list(stream.tokens(max_tokens=60, stop=(), sample=Sampler(temperature=3.0, seed=seed)))
        again = Stream.from_state(state, model, text)
        pieces = list(again.text(max_tokens=60, stop=(), sample=Sampler(temperature=3.0, seed=seed)))
        assert "".join(pieces) == spoken(text, ids)
        assert len(pieces) > 5


def test_text_goes_on_from_what_was_fed():
    """A tokenizer that strips the space in front of a text must not strip it from a continuation."""
    model, text = build("llama", vocab_size=320), spaces_first()
    stream = Stream(model, text, budget=BUDGET)
    stream.feed(TEXT[:30])
    fed, state, spaces = text(TEXT[:30]).input_ids, stream.state_dict(), 0
    for seed in range(20):
        stream = Stream.from_state(state, model, text)
        generated = list(stream.tokens(max_tokens=5, stop=(), sample=Sampler(temperature=9.0, seed=seed)))
        again = Stream.from_state(state, model, text)
        given = "".join(again.text(max_tokens=5, stop=(), sample=Sampler(temperature=9.0, seed=seed)))
        assert spoken(text, fed) + given == spoken(text, fed + generated)
        spaces += given.startswith(" ")
        more = "".join(stream.text(max_tokens=5, stop=()))
        assert spoken(text, [*fed, *generated]) + more == spoken(
            text, [*fed, *generated, *again.tokens(max_tokens=5, stop=())]
        )
    assert spaces > 2


def test_feeding_computes_the_last_logits_alone_and_scoring_all_of_them():
    model, widths = build("llama"), []
    stream = Stream(model, budget=BUDGET)
    stream.feed([1])
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    stream.feed(tokens(400))
    assert set(widths) == {1}
    widths.clear()
    list(stream.score(tokens(400)))
    hook.remove()
    assert sum(widths) == 400


def test_ids_that_a_model_must_not_say_are_never_said():
    model, text = sink_model()
    stream = Stream(model, text, budget=BUDGET)
    stream.feed(TEXT[:40])
    state = stream.state_dict()
    free = next(stream.tokens(stop=()))
    model.generation_config.suppress_tokens = [free, 10**6]
    again = Stream.from_state(state, model, text)
    assert next(again.tokens(stop=())) != free
    with torch.no_grad():
        model.lm_head.weight[300] = 100 * model.lm_head.weight[free]
    again = Stream(model, text, budget=BUDGET)
    again.feed(TEXT[:40])
    assert again.logits.argmax() == 300
    assert 300 not in list(again.tokens(max_tokens=20, stop=()))


def test_sampling():
    model = model_of("llama")
    stream = Stream(model, budget=BUDGET)
    stream.feed(tokens(20))
    state = stream.state_dict()

    def generated(**settings):
        return list(Stream.from_state(state, model).tokens(max_tokens=25, stop=(), sample=Sampler(**settings)))

    greedy = generated()
    assert generated(temperature=0) == generated(top_k=1) == generated(temperature=5.0, top_p=1e-6) == greedy
    assert (
        generated(temperature=1.0, seed=3) == generated(temperature=1.0, seed=3) != generated(temperature=1.0, seed=4)
    )
    likeliest = set(stream.logits[0].topk(3).indices.tolist())
    first = {generated(top_k=3, temperature=9.0, seed=seed)[0] for seed in range(30)}
    assert first == likeliest


# --------------------------------------------------------------------------------------------------- a stream in flight


def test_a_stream_in_flight_goes_on_as_if_nothing_had_been():
    """Guards what is between steps: text without a border, a token that was given but not fed, draws, the window."""
    model, text = sink_model()
    evicted: list = []
    pieces = [TEXT[i : i + 9] for i in range(0, len(TEXT), 9)]

    class Stopped(Exception):
        pass

    def stopping():
        yield from pieces[:20]
        raise Stopped

    def run(stop: bool):
        evicted.clear()
        on_evict = lambda *what: evicted.append(what)  # noqa: E731
        stream, drawn = Stream(model, text, BUDGET, on_evict=on_evict), Sampler(temperature=1.0)
        generated = list(itertools.islice(stream_start(stream, drawn), 6))
        if stop:
            stream = written_and_read(stream, on_evict)
            with pytest.raises(Stopped):
                stream.feed(stopping())
            assert stream._intakes[0].encoder.pending
            stream = written_and_read(stream, on_evict)
            stream.feed(pieces[20:])
        else:
            stream.feed(pieces)
        return generated, list(stream.text(max_tokens=20, stop=(), sample=drawn)), stream.seen, list(evicted)

    def stream_start(stream, drawn):
        stream.feed("begin with this")
        return stream.tokens(stop=(), sample=drawn)

    def written_and_read(stream, on_evict):
        file = io.BytesIO()
        torch.save(stream.state_dict(), file)
        file.seek(0)
        return Stream.from_state(torch.load(file, weights_only=True), model, text, on_evict)

    assert run(stop=True) == run(stop=False)


def test_a_saved_stream_is_for_its_own_model():
    model, text = sink_model()
    stream = Stream(model, text, budget=BUDGET)
    stream.feed(TEXT)
    state = stream.state_dict()
    other = build("llama", vocab_size=320, max_position_embeddings=128)
    write_sink(other.config, SinkConfig("none"), [])
    with pytest.raises(UserError, match=r"has sinks \[300\], this model \[\]"):
        Stream.from_state(state, other, text)
    write_sink(other.config, SinkConfig("token"), [300])
    other.config.hidden_size = 64
    with pytest.raises(UserError, match="'hidden': 32"):
        Stream.from_state(state, other, text)
    for broken in ({}, {"settings": {}}, {**state, "stream": {}}, 3, stream.cache.state_dict()):
        with pytest.raises(UserError, match="not the state of a Stream"):
            Stream.from_state(broken, model, text)


def test_a_stream_that_was_broken_off_within_a_step_says_so():
    model = build("llama")
    stream, calls = Stream(model, budget=BUDGET), 0

    def break_off(*_):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    stream.feed(tokens(5))
    hook = model.model.norm.register_forward_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        stream.feed(tokens(200))
    hook.remove()
    assert not stream.whole
    for use in (lambda: stream.feed([1]), lambda: list(stream.score([1]))):
        with pytest.raises(UserError, match="interrupted half way; reset"):
            use()
    with pytest.raises(UserError, match="interrupted half way"):
        Stream.from_state(stream.state_dict(), model).feed([1])
    stream.reset()
    stream.feed([1])
    assert stream.whole


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([1, 2, VOCABULARY], f"the model has no id {VOCABULARY}, its ids are 0 to {VOCABULARY - 1}"),
        ([1, -1], "no id -1"),
        ([1] * 2 * BLOCK + [VOCABULARY], f"no id {VOCABULARY}"),
        (torch.tensor([1, 99]), "no id 99"),
        ([1, 2.5], "not 2.5"),
        ([[1, 2]], r"not \[1, 2\]"),
        *((kind(b"\x01\x02"), "decode it first") for kind in (bytes, bytearray, memoryview)),
        ([1, True], "not True"),
        (torch.tensor([False, True]), "not False"),
        ("text", "no tokenizer"),
        (["text"], "no tokenizer"),
        (7, "not 7"),
    ],
)
def test_what_a_stream_cannot_be_fed_is_refused_and_nothing_of_it_is_fed(source, message):
    stream = Stream(model_of("llama"), budget=BUDGET)
    stream.feed([1, 2, 3])
    for use in (stream.feed, lambda x: list(stream.score(x))):
        with pytest.raises(UserError, match=message):
            use(source)
        assert stream.seen == 3
    stream.feed([4])
    assert stream.seen == 4


@pytest.mark.parametrize("source", ["text", [[1, 2]], [[1], [2], [3]], torch.tensor([[1, 2]]), iter([[1], [2]]), 5])
def test_a_batch_is_fed_a_list_of_its_size(source):
    stream = Stream(model_of("llama"), budget=BUDGET, batch=2)
    with pytest.raises(UserError, match="a batch of 2 rows and was fed"):
        stream.feed(source)
    assert stream.seen == 0


def test_other_mistakes_are_named():
    model, (with_sink, text) = model_of("llama"), sink_model()
    with pytest.raises(UserError, match="does not hold 1 sinks, 20 pinned tokens and the current token.*at least 22"):
        Stream(with_sink, text, budget=21, pinned=list(range(20)))
    with pytest.raises(UserError, match="a budget of 4 does not hold 4 sinks"):
        Stream(model, budget=4, sinks=4)
    with pytest.raises(UserError, match="batch is 0"):
        Stream(model, batch=0)
    with pytest.raises(UserError, match="no id 99"):
        Stream(model, pinned=[99])
    empty = Stream(model, budget=BUDGET)
    for use in (empty.tokens, empty.text):
        with pytest.raises(UserError, match="nothing to continue: feed it"):
            next(use())
    half = Stream(model, budget=BUDGET, batch=2)
    half.feed([[1, 2], []])
    with pytest.raises(UserError, match="row 1 of the stream has nothing to continue"):
        next(half.tokens())
    empty.feed([1])
    with pytest.raises(UserError, match="no tokenizer"):
        next(empty.text())
    with pytest.raises(UserError, match="no tokenizer"):
        next(empty.tokens(stop=["a"]))
    with pytest.raises(UserError, match="stop string is empty"):
        next(empty.tokens(stop=[""]))
    for settings in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 2.0}, {"temperature": 0, "top_k": 3}):
        with pytest.raises(UserError, match="sampling|temperature 0"):
            Sampler(**settings)
    broken = build("llama")
    with torch.no_grad():
        broken.lm_head.weight[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        list(Stream(broken, budget=BUDGET).score([1, 2]))
    half = Stream(broken, budget=BUDGET)
    for message in ("NaN", "interrupted half way"):
        with pytest.raises(UserError, match=message):
            half.feed([1, 2])
