"""Guards: what a user does with a cache besides feeding it: batches, padding, turns, rollback, beams."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

from sinkmodel.cache import StreamingCache
from sinkmodel.errors import UserError
from tests.models import POSITIONS, build, model_of, tokens
from tests.streams import Stream, fed, greedy_ids, stream_logits

BUDGET, SINKS = 12, 3
FAMILIES = ["llama", "gpt_neox", "gptj", "mpt"]  # half-split and grouped, partial, interleaved, ALiBi
LENGTHS = (30, 4, 17)  # of the rows of a ragged batch: one is far over the budget, one far under, one is between
reference = functools.lru_cache(stream_logits)


def truth(model, ids, positions="cache") -> torch.Tensor:
    return reference(model, tuple(ids), BUDGET, SINKS, positions)


def new(model, positions="cache", budget=BUDGET) -> StreamingCache:
    return StreamingCache(model.config, budget, SINKS, positions)


def close(logits, expected) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, N], padding on the left; pads are id 9, a word like any other."""
    longest = max(map(len, rows))
    ids = torch.tensor([[9] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def fed_batch(model, cache, ids, sizes, mask=None) -> torch.Tensor:
    """Logits [B, N, V] of a batch fed in pieces of these sizes in turn; the mask covers all columns so far."""
    pieces, at = [], 0
    while at < ids.shape[1]:
        end = at + sizes[len(pieces) % len(sizes)]
        seen = {} if mask is None else {"attention_mask": mask[:, :end]}
        pieces.append(model(ids[:, at:end], past_key_values=cache, **seen).logits)
        at = end
    return torch.cat(pieces, dim=1)


# ------------------------------------------------------------------------------------------------ batches, padding


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[1], [40], [3, 17, 1]])
def test_rows_of_a_batch_do_not_touch_each_other(family, sizes):
    model, rows = model_of(family), [tokens(40, seed=seed) for seed in range(3)]
    cache = new(model)
    for row, logits in zip(rows, fed_batch(model, cache, torch.tensor(rows), sizes)):
        close(logits, truth(model, row))
    assert cache.seen == [40, 40, 40]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("sizes", [[1], [51], [3, 17, 1], [26, 1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_padded_batch_has_its_own_sinks(family, sizes, positions, implementation):
    """Guards pads that become sinks, rows that overflow at different times, and pieces that are all padding."""
    if implementation == "sdpa" and family in ("gptj", "mpt"):
        implementation = "eager"
    model = model_of(family, attn_implementation=implementation)
    positions = "cache" if family == "mpt" else positions
    rows = [tokens(length + 21, seed=length) for length in LENGTHS]
    ids, mask = padded(rows)
    cache = new(model, positions)
    batch = fed_batch(model, cache, ids, sizes, mask)
    for row, logits in zip(rows, batch):
        close(logits[-len(row) :], truth(model, row, positions))
    assert cache.seen == [len(row) for row in rows]
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("sizes", [[1], [60], [3, 17, 1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_may_stand_anywhere(family, sizes):
    """Guards chats in a batch, in which answers of unequal length leave pads in mid-stream."""
    model, columns = model_of(family), torch.rand(3, 60, generator=torch.Generator().manual_seed(1))
    mask = (columns > torch.tensor([[0.1], [0.4], [0.8]])).long()
    ids = torch.tensor([tokens(60, seed=seed) for seed in range(3)])
    cache = new(model)
    batch = fed_batch(model, cache, ids, sizes, mask)
    for row, real, logits in zip(ids, mask.bool(), batch):
        close(logits[real], truth(model, row[real].tolist()))
    assert cache.seen == mask.sum(1).tolist()


def test_a_mask_is_needed_only_where_there_is_padding():
    """Guards decoding loops that pass the mask of the prompt once, as long as nobody is padded any more."""
    model, rows = model_of("llama"), [tokens(length + 21, seed=length) for length in LENGTHS]
    ids, mask = padded(rows)
    cache, masked = new(model), new(model)
    for each in (cache, masked):
        fed_batch(model, each, ids[:, :30], [30], mask)
    rest = fed_batch(model, cache, ids[:, 30:], [1])
    with torch.no_grad():
        for at in range(30, 51):
            masked_logits = model(ids[:, at : at + 1], past_key_values=masked, attention_mask=mask[:, : at + 1]).logits
            close(rest[:, at - 30], masked_logits[:, 0])
    for row, logits in zip(rows, rest):
        close(logits, truth(model, row)[-21:])


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj"])
def test_generate_on_a_padded_batch(family, positions):
    model, rows = model_of(family), [tokens(length, seed=length) for length in LENGTHS]
    ids, mask = padded(rows)
    cache = new(model, positions)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=15)
    for row, made in zip(rows, out.tolist()):
        assert made[30:] == greedy_ids(model, row, BUDGET, SINKS, 15, positions)
    assert cache.seen == [length + 14 for length in LENGTHS]


# ------------------------------------------------------------------------------------------------------ many turns


@pytest.mark.parametrize("family", FAMILIES)
def test_many_turns_with_one_cache(family):
    """Guards chats: each turn calls `generate` with the whole history, and only what is new is fed."""
    model, history, cache = model_of(family), [], new(model_of(family))
    for turn, (asked, answered) in enumerate([(5, 3), (20, 9), (1, 1), (7, 20)]):
        history += tokens(asked, seed=turn)
        out = model.generate(torch.tensor([history]), past_key_values=cache, do_sample=False, max_new_tokens=answered)
        assert out[0].tolist() == history + greedy_ids(model, history, BUDGET, SINKS, answered)
        history = out[0].tolist()
        assert cache.get_seq_length() == len(history) - 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[1], [3], [17], [1, 3, 17], [17, 1, 1, 3], [11, 12, 13]], ids=str)
def test_pieces_of_any_size_give_the_same(family, sizes):
    model, ids = model_of(family), tokens(60)
    close(fed(model, new(model), ids, *sizes), truth(model, ids))


@pytest.mark.parametrize("keep", [1, 3, 20, torch.tensor([2, 40, 59])], ids=str)
def test_logits_that_were_not_asked_for_are_not_made(keep):
    model, ids = model_of("llama"), tokens(60)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), past_key_values=new(model), logits_to_keep=keep).logits[0]
    close(logits, truth(model, ids)[keep if isinstance(keep, torch.Tensor) else slice(-keep, None)])


@pytest.mark.parametrize("length", [1, 5, 60])
def test_a_tuple_and_hidden_states_are_given_as_without_a_cache(length):
    model, ids = model_of("llama"), tokens(length)
    with torch.no_grad():
        logits, cache, hidden = model(
            torch.tensor([ids]), past_key_values=new(model), return_dict=False, output_hidden_states=True
        )
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        again = model(inputs_embeds=embedded, past_key_values=new(model)).logits[0]
    close(logits[0], truth(model, ids))
    close(again, truth(model, ids))
    assert cache.seen == [length]
    close(hidden[0], embedded)
    close(model.lm_head(hidden[-1])[0], truth(model, ids))


def test_a_forward_that_was_interrupted_is_not_built_on():
    """Guards Ctrl-C between two layers: half of the cache has the token. What comes next is refused, or right."""
    model, ids = build("llama"), tokens(40)
    cache = new(model)
    fed(model, cache, ids[:30], 30)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fed(model, cache, ids[30:31], 1)
    hook.remove()
    try:
        logits = fed(model, cache, ids[30:], 1)
    except UserError:
        cache.reset()
        close(fed(model, cache, ids, 9), truth(model, ids))
    else:
        close(logits, truth(model, ids)[30:])


def test_reset_is_a_new_cache():
    model, cache = model_of("llama"), new(model_of("llama"))
    fed(model, cache, tokens(40, seed=1), 40)
    cache.reset()
    assert cache.get_seq_length() == sum(cache.seen) == 0
    close(fed(model, cache, tokens(40), 7), truth(model, tokens(40)))
    cache.reset()
    rows = [tokens(40, seed=seed) for seed in range(2)]  # another batch size is welcome after a reset
    for row, logits in zip(rows, fed_batch(model, cache, torch.tensor(rows), [40])):
        close(logits, truth(model, row))


# ---------------------------------------------------------------------------------------- rollback, beams, sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_crop_takes_back_what_was_fed(family):
    model, ids = model_of(family), tokens(40)
    cache = new(model)
    fed(model, cache, [*ids[:7], *tokens(5, seed=8)], 12)
    cache.crop(-5)
    assert cache.seen == [7]
    assert cache.get_seq_length() == 7
    close(fed(model, cache, ids[7:], 1), truth(model, ids)[7:])


def test_crop_down_to_within_the_sinks_and_to_nothing():
    model, ids = model_of("llama"), tokens(40)
    for left in (2, 0):
        cache = new(model)
        fed(model, cache, [*ids[:left], *tokens(6, seed=8)], 3)
        cache.crop(-6)
        close(fed(model, cache, ids[left:], 9), truth(model, ids)[left:])


@pytest.mark.parametrize("fed_so_far", [BUDGET + 1, 40])
def test_crop_is_refused_once_something_was_evicted(fed_so_far):
    """Guards a rollback that would silently continue without the tokens that it needs back."""
    model, ids, cache = model_of("llama"), tokens(60), new(model_of("llama"))
    fed(model, cache, ids[:fed_so_far], 5)
    with pytest.raises(UserError):
        cache.crop(-1)
    assert cache.seen == [fed_so_far]
    close(fed(model, cache, ids[fed_so_far:], 5), truth(model, ids)[fed_so_far:])


@pytest.mark.parametrize("pieces", [[8], [3, 5], [4, 4]])
def test_crop_does_not_reach_back_to_a_pad(pieces):
    """Risk: a row loses one token too many, if it had a pad when others had a token; also in a later forward."""
    model, ids = model_of("llama"), torch.tensor([tokens(8), tokens(8, seed=1)])
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 4] = 0  # the fifth column
    cache = new(model)
    fed_batch(model, cache, ids, pieces, mask)
    with pytest.raises(UserError, match="pad"):
        cache.crop(-4)
    cache.crop(-3)
    assert cache.seen == [5, 4]
    rest = torch.tensor([tokens(9, seed=2), tokens(9, seed=3)])
    for row, real, more, logits in zip(ids, mask.bool(), rest, fed_batch(model, cache, rest, [9])):
        close(logits, truth(model, row[:5][real[:5]].tolist() + more.tolist())[-9:])


@pytest.mark.parametrize("positions", ["cache", "text"])
def test_reordered_rows_go_on_as_the_rows_they_were(positions):
    model, rows = model_of("llama"), [tokens(length + 21, seed=length) for length in LENGTHS]
    ids, mask = padded(rows)
    cache, order = new(model, positions), torch.tensor([2, 0, 0])
    fed_batch(model, cache, ids[:, :30], [30], mask)
    cache.reorder_cache(order)
    assert cache.seen == [LENGTHS[i] for i in order.tolist()]
    suffixes = [tokens(20, seed=50 + row) for row in range(3)]
    columns = torch.cat([mask[order][:, :30], torch.ones(3, 20, dtype=torch.long)], dim=1)
    with torch.no_grad():
        for at in range(20):
            token = torch.tensor([[suffix[at]] for suffix in suffixes])
            logits = model(token, past_key_values=cache, attention_mask=columns[:, : 31 + at]).logits
            for b, source in enumerate(order.tolist()):
                row = rows[source][: LENGTHS[source]] + suffixes[b]
                close(logits[b, 0], truth(model, row, positions)[LENGTHS[source] + at])


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_those_of_a_dynamic_cache_while_nothing_is_lost(family):
    model, ids = model_of(family), torch.tensor([tokens(9), tokens(9, seed=1)])
    asked = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "do_sample": False}
    beams = model.generate(ids, past_key_values=new(model, budget=32), **asked)
    assert torch.equal(beams, model.generate(ids, past_key_values=DynamicCache(), **asked))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_go_on_past_the_budget(family):
    """Guards the reordering of full caches: each beam's score is that of its tokens, streamed alone."""
    model, ids = model_of(family), tokens(9)
    asked = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "do_sample": False, "length_penalty": 0.0}
    asked |= {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(torch.tensor([ids]), past_key_values=new(model), **asked)
    assert len(set(map(tuple, out.sequences.tolist()))) == 3
    for made, score in zip(out.sequences.tolist(), out.sequences_scores):
        log_p = truth(model, made).log_softmax(-1)[8:-1]
        close(score, log_p[torch.arange(20), made[9:]].sum())


@pytest.mark.parametrize("prompt", [5, 30])
def test_sampling_draws_from_the_streams_own_probabilities(prompt):
    model, ids, runs = model_of("llama"), tokens(prompt), []
    asked = {"do_sample": True, "max_new_tokens": 25, "output_logits": True, "return_dict_in_generate": True}
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(model.generate(torch.tensor([ids]), past_key_values=new(model), **asked))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    made = runs[0].sequences[0].tolist()
    assert made[prompt:] != greedy_ids(model, ids, BUDGET, SINKS, 25)
    close(torch.cat(runs[0].logits), truth(model, made)[prompt - 1 : -1])


def test_a_stream_of_one_model_can_stop_while_another_begins():
    """Guards state that is kept in the class or the model: two caches on one model, fed in turns."""
    model, rows = model_of("llama"), [tokens(POSITIONS, seed=seed) for seed in range(2)]
    caches, streams = [new(model), new(model, "text")], [Stream(model, BUDGET, SINKS, p) for p in ("cache", "text")]
    with torch.no_grad():
        for at in range(POSITIONS):
            for row, cache, stream in zip(rows, caches, streams):
                close(fed(model, cache, row[at : at + 1], 1)[0], stream.feed(row[at]))
            plain = model(torch.tensor([rows[0][: at + 1]])).logits
    close(plain[0], reference(model, tuple(rows[0]), POSITIONS, 0))


@pytest.mark.parametrize(("positions", "forwards"), [("cache", 1 + 8), ("text", 1 + 3)])
def test_a_long_prompt_goes_in_few_forwards(positions, forwards):
    """Guards the speed of prompts: sinks at their place in the text are joined once a piece, not once a query."""
    model, calls = build("llama", max_position_embeddings=512), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    cache = StreamingCache(model.config, 64, 8, positions)
    fed(model, cache, [1], 1)  # with the trial of the model
    cache.reset()
    calls.clear()
    fed(model, cache, tokens(64 + 128), 192)
    assert len(calls) == forwards
