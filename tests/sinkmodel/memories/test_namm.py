"""Guards NAMM: features and scores of the slow reference to 1e-5, the same sets, candidates, and what is counted."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from sinkmodel.memories import NAMM, Dense, observation
from sinkmodel.memories.namm import PARAMETERS, NAMMConfig, flatten, layout, measure_statistics, memory, network, split
from tests.models import IN_SOFTMAX, build, model_of, tokens
from tests.sinkmodel.memories.namm_reference import run

N = 58
SMALL = NAMMConfig(window=8, hop=4, interval=12, hidden=6, age_size=4)
CONFIGS = {
    "overlap": SMALL,
    "apart": SMALL.replace(window=4, gamma=0.9),
    "thrice": SMALL.replace(window=12, interval=8, age_base=100.0),
    "paper": NAMMConfig(interval=16),
}


@functools.cache
def config_of(family: str, name: str = "overlap") -> NAMMConfig:
    """With statistics."""
    return measure_statistics(model_of(family), [torch.tensor([tokens(N, seed=3)])], CONFIGS[name])


@functools.cache
def parameters_of(family: str, name: str = "overlap", seed: int = 0) -> torch.Tensor:
    """Random ones that keep a part of what there is."""
    config = config_of(family, name)
    parameters = 0.5 * torch.randn(config.parameters, generator=torch.Generator().manual_seed(seed))
    cache = NAMM(model_of(family), config)
    model_of(family)(torch.tensor([tokens(2 * config.interval, seed=4)]), past_key_values=cache)
    scores = torch.stack([cache.with_parameters(parameters).scores(layer) for layer in cache.layers])
    parameters[-1] -= scores.quantile(0.4)
    return parameters


@functools.cache
def expected(family: str, name: str, ragged: str = "true", start: int = 0, seed: int = 0):
    config = config_of(family, name)
    settings = {
        "n_fft": config.window,
        "hop": config.hop,
        "delay": config.interval,
        "coefficient": config.gamma,
        "code": config.age_size,
        "base": config.age_base,
        "hidden": config.hidden,
        "mean": config.mean,
        "variance": config.variance,
        "fill": ragged == "fill",
    }
    outcome = run(model_of(family), settings, parameters_of(family, name, seed), tokens(N)[start:])
    assert outcome.gap > 1e-5, "the choice hangs on rounding: change the seed"
    held = [len(d.positions) for each in outcome.decisions.values() for d in each]
    stayed = [len(d.stayed) for each in outcome.decisions.values() for d in each]
    assert 0.2 * sum(held) < sum(stayed) < 0.9 * sum(held), "the network keeps too much or too little to be a test"
    return outcome


@pytest.fixture
def judged(monkeypatch):
    """What every decision of a layer was made of, in order: positions, the features of each head's slots, scores."""
    calls, seen = [], []
    scores, network = NAMM._scores, memory.token_scores

    def noted(self, layer, rows, lengths):
        seen.clear()
        result = scores(self, layer, rows, lengths)
        calls.append((layer.held_positions()[rows], [x[:, 0] for x in seen], result))
        return result

    monkeypatch.setattr(memory, "token_scores", lambda x, *more: seen.append(x) or network(x, *more))
    monkeypatch.setattr(NAMM, "_scores", noted)
    return calls


def feed(model, cache, ids, size: int, mask=None):
    logits = []
    for start in range(0, ids.shape[1], size):
        end = min(start + size, ids.shape[1])
        given = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, start:end], attention_mask=given, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def check(cache, outcome, logits, row: int = 0) -> None:
    torch.testing.assert_close(logits.double(), outcome.logits, atol=1e-4, rtol=0)
    assert [cache.kept_positions(layer, row) for layer in range(len(cache.layers))] == outcome.kept


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", CONFIGS)
def test_features_and_scores_are_those_of_the_reference(family, name, judged):
    """Several blocks, with evictions between them. In fp64, so that the rounding of the model is no part of it."""
    model, config = build(family).double(), config_of(family, name)
    outcome, cache = expected(family, name), NAMM(model, config, parameters_of(family, name))
    judged.clear()
    check(cache, outcome, feed(model, cache, torch.tensor([tokens(N)]), N)[0])
    layers, blocks = len(cache.layers), N // config.interval
    assert len(judged) == layers * blocks >= 2 * layers
    for call, (positions, of_heads, scores) in enumerate(judged):
        for g, x in enumerate(of_heads):
            decision, held = outcome.decisions[call % layers, g][call // layers], positions[0, g] >= 0
            assert positions[0, g][held].tolist() == decision.positions
            torch.testing.assert_close(x[0].double(), decision.features, atol=1e-5, rtol=0)
            torch.testing.assert_close(scores[0, g][held].double(), decision.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("ragged", ["true", "fill"])
@pytest.mark.parametrize("size", [1, 7, 12])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_text_in_forwards_of_any_size(family, ragged, size, implementation):
    """Guards frames and blocks that a forward begins and another one ends; while decoding as in the prompt."""
    model = model_of(family, attn_implementation=implementation)
    cache = NAMM(model, config_of(family), parameters_of(family), ragged=ragged)
    check(cache, expected(family, "overlap", ragged), feed(model, cache, torch.tensor([tokens(N)]), size)[0])


@pytest.mark.parametrize(
    ("family", "ragged", "size"),
    [("llama", "true", 1), *itertools.product(["llama", "gpt_neox"], ["true", "fill"], [10, N])],
)
def test_padded_rows_are_as_alone(family, ragged, size):
    """Guards rows whose frames and decisions fall on other columns, each with parameters of its own if size is 10."""
    model, starts = model_of(family), [0, 7, 29]
    ids = torch.tensor([[0] * start + tokens(N)[start:] for start in starts])
    mask = torch.tensor([[0] * start + [1] * (N - start) for start in starts])
    seeds = [0, 1, 2] if size == 10 else [0, 0, 0]
    candidates = torch.stack([parameters_of(family, seed=seed) for seed in seeds])
    cache = NAMM(model, config_of(family), candidates if size == 10 else candidates[0], ragged=ragged)
    logits = feed(model, cache, ids, size, mask)
    for row, (start, seed) in enumerate(zip(starts, seeds)):
        check(cache, expected(family, "overlap", ragged, start, seed), logits[row, start:], row)


def test_pads_do_not_bring_a_decision_forward(monkeypatch):
    """Guards a padded prompt that is cut in more pieces than it needs."""
    model, pieces, plan = model_of("llama"), [], NAMM.plan
    monkeypatch.setattr(NAMM, "plan", lambda *a: pieces.append(x := plan(*a)) or x)
    mask = torch.tensor([[0] * 7 + [1] * SMALL.interval])
    model(torch.ones_like(mask), attention_mask=mask, past_key_values=NAMM(model, SMALL))
    assert [(x.start, x.end) for x in pieces] == [(0, 7 + SMALL.interval)]


@pytest.mark.parametrize("family", ["qwen3", "gemma", "phi", "smollm3", "llama-yarn", *IN_SOFTMAX])
def test_other_families(family):
    model = model_of(family)
    cache = NAMM(model, config_of(family), parameters_of(family))
    check(cache, expected(family, "overlap"), feed(model, cache, torch.tensor([tokens(N)]), N)[0])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("ragged", ["true", "fill"])
def test_zeros_keep_everything_and_give_dense_logits(family, ragged):
    model, ids = model_of(family), torch.tensor([tokens(N), tokens(N, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    cache, dense = NAMM(model, config_of(family), ragged=ragged), Dense(model)
    logits, truth = (feed(model, each, ids, 20, mask) for each in (cache, dense))
    torch.testing.assert_close(logits[1], truth[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[0, 9:], truth[0, 9:], atol=1e-5, rtol=0)
    assert cache.kept_positions(1, 0) == [list(range(N - 9))] * len(cache.kept_positions(1, 0))
    assert cache.bytes_kept == dense.bytes_kept


def test_each_row_is_judged_by_its_own_candidate():
    """Guards an evolution that shares what comes before the first decision."""
    model, config = model_of("llama"), config_of("llama")
    candidates = torch.stack([parameters_of("llama", seed=seed) for seed in (0, 1, 2)])
    ids = torch.tensor([tokens(N), tokens(N, seed=1)])
    start, before = NAMM(model, config), config.interval - 1
    model(ids[:, :before], past_key_values=start)
    cache = start.for_candidates(candidates)
    logits = model(ids[:, before:].repeat_interleave(3, dim=0), past_key_values=cache).logits
    sizes = set()
    for row, each in enumerate(ids):
        for candidate, parameters in enumerate(candidates):
            alone = NAMM(model, config, parameters)
            truth = model(each[None], past_key_values=alone).logits[0, before:]
            torch.testing.assert_close(logits[3 * row + candidate], truth, atol=1e-5, rtol=0)
            assert cache.kept_positions(1, 3 * row + candidate) == alone.kept_positions(1)
            sizes.add(len(alone.kept_positions(1)[0]))
    assert len(sizes) > 2
    assert start.columns == before
    assert not start.parameters.any()
    twin = start.with_parameters(candidates[1])
    model(ids[:, before:], past_key_values=twin)
    assert twin.kept_positions(0, 1) == cache.kept_positions(0, 4)


def test_forks_share_nothing_that_they_change():
    """Risk: a fork writes its tokens, or adds its attention, into the slots of the memory that it came from."""
    model, config = model_of("llama"), config_of("llama")
    first, second = (parameters_of("llama", seed=seed) for seed in (0, 1))
    before = config.interval - 3
    texts = [torch.tensor([tokens(before) + tokens(N - before, seed=seed)]) for seed in (1, 2, 3)]
    start = NAMM(model, config, first)
    for part in (texts[0][:, : before - 2], texts[0][:, before - 2 : before]):  # the second leaves room for more tokens
        model(part, past_key_values=start)
    forks = [start.fork(), start.with_parameters(second), start]
    for part in (slice(before, before + 2), slice(before + 2, N)):  # in turns; the decision comes in the second part
        for fork, text in zip(forks, texts):
            model(text[:, part], past_key_values=fork)
    for fork, text, parameters in zip(forks, texts, (first, second, first)):
        alone = NAMM(model, config, parameters)
        model(text, past_key_values=alone)
        for layer, of_alone in zip(fork.layers, alone.layers):
            assert torch.equal(layer.held_positions(), of_alone.held_positions())
            for held in (lambda x: x.held()[0], lambda x: x.held()[1], lambda x: x.held_numbers("spectrum")):
                torch.testing.assert_close(held(layer), held(of_alone), atol=1e-5, rtol=0)


def test_rows_that_are_reordered_take_their_candidates_along():
    model, config = model_of("llama"), config_of("llama")
    candidates = torch.stack([parameters_of("llama", seed=seed) for seed in (0, 1)])
    ids = torch.tensor([tokens(N), tokens(N, seed=1)])
    cache = NAMM(model, config, candidates)
    model(ids[:, :20], past_key_values=cache)
    swapped = cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    for each, text in ((cache, ids), (swapped, ids.flip(0))):
        model(text[:, 20:], past_key_values=each)
    assert [swapped.kept_positions(1, row) for row in (1, 0)] == [cache.kept_positions(1, row) for row in (0, 1)]


def test_first_and_last_tokens_can_be_forced():
    """Guards a network that keeps nothing: the newest token stays in any case."""
    model, config = model_of("llama"), config_of("llama")
    nothing = torch.zeros(config.parameters)
    nothing[-1] = -1.0
    for settings, held in (({}, [35]), ({"sinks": 2, "window": 3}, [0, 1, 33, 34, 35])):
        for ragged in ("true", "fill"):
            cache = NAMM(model, config, nothing, ragged=ragged, **settings)
            model(torch.tensor([tokens(36)]), past_key_values=cache)
            assert cache.kept_positions(0) == [held] * 2


def test_state_is_counted_and_slots_are_those_of_the_longest_head():
    model, config = model_of("llama"), config_of("llama")
    cache = NAMM(model, config, parameters_of("llama"))
    ids = torch.tensor([tokens(48), tokens(48, seed=1)])
    for part in ids.split(46, dim=1):  # a frame that is begun is held for as long as it is not whole
        model(part, past_key_values=cache)
    held = kept = 0
    for layer in range(2):
        heads = [len(head) for row in (0, 1) for head in cache.kept_positions(layer, row)]
        kept += sum(heads)
        held += 4 * max(heads)
    assert cache.bytes_kept == kept * 2 * 8 * 4
    assert cache.bytes_held == held * (2 * 8 + 1 + config.bins + config.window - config.hop) * 4
    assert kept < held


def test_statistics_are_those_of_a_network_that_keeps_everything(judged):
    model, ids = model_of("llama"), [torch.tensor([tokens(N)]), torch.tensor([tokens(30, seed=1), tokens(30, seed=2)])]
    config = measure_statistics(model, ids, config_of("llama"))
    for each in ids:
        model(each, past_key_values=NAMM(model, SMALL))
    features = [x for _, of_heads, _ in judged for x in of_heads]
    spectra = torch.cat([x[..., SMALL.age_size :].flatten(0, 1) for x in features]).double()
    torch.testing.assert_close(torch.tensor(config.mean).double(), spectra.mean(dim=0), atol=1e-6, rtol=1e-5)
    variance = spectra.var(dim=0, correction=0)
    torch.testing.assert_close(torch.tensor(config.variance).double(), variance, atol=1e-6, rtol=1e-5)


def test_no_matrix_of_prompt_times_prompt_is_made(monkeypatch):
    model, config = build("llama", max_position_embeddings=256), config_of("llama")
    monkeypatch.setitem(observation.BLOCK_NUMBERS, "cpu", 4 * 200 * config.hop)
    made, weights = [], observation.Observation._weights
    monkeypatch.setattr(observation.Observation, "_weights", lambda self, *a: made.append(x := weights(self, *a)) or x)
    model(torch.tensor([tokens(200)]), past_key_values=NAMM(model, config))
    assert max(x.numel() for x in made) <= 4 * 200 * config.hop


@pytest.mark.parametrize("candidates", [1, 3])
def test_without_a_fused_attention_scores_are_computed_in_blocks(monkeypatch, candidates):
    """Risk: on a GPU, whose fused attention does not take fp64, a decision makes a matrix of kept × kept weights."""
    kept, queries = 50, 8
    generator = torch.Generator().manual_seed(1)
    x_BGKF = torch.randn(candidates, 1, kept, SMALL.features, generator=generator).double()
    parameters = torch.randn(candidates, SMALL.parameters, generator=generator).double()
    fused = network.token_scores(x_BGKF, parameters, SMALL.hidden)
    monkeypatch.setattr(network, "FUSED", ())
    monkeypatch.setitem(observation.BLOCK_NUMBERS, "cpu", candidates * kept * queries)
    sizes, attention = [], network.F.scaled_dot_product_attention

    def watched(q, k, v, **settings):
        sizes.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **settings)

    monkeypatch.setattr(network.F, "scaled_dot_product_attention", watched)
    torch.testing.assert_close(network.token_scores(x_BGKF, parameters, SMALL.hidden), fused, atol=1e-12, rtol=0)
    assert sizes == [(8, 8), (8, 16), (8, 24), (8, 32), (8, 40), (8, 48), (2, 50)]


def test_the_flat_vector_has_the_papers_length_and_the_documented_order():
    assert (PARAMETERS, NAMMConfig().parameters, NAMMConfig().features) == (4172, 4172, 25)
    named = split(torch.arange(4172.0), 25, 32)
    assert {name: tuple(x.shape) for name, x in named.items()} == layout(25, 32)
    assert named["qkv.weight"][1, 0] == 96
    assert named["score.bias"] == 4171
    assert torch.equal(flatten(named), torch.arange(4172.0))
