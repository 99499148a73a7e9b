"""Guards: `custom_generate` streams exactly, any model, from a repository of its own."""

from __future__ import annotations

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel import StreamingCache
from sinkmodel.export import main
from sinkmodel.export.custom_generate import generate
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig
from tests import models, tiny
from tests.hub import hub, upload
from tests.reference import streaming_logits

__all__ = ["hub"]

# One of each rotary layout: half-split, partial, interleaved, a layer without, a factor on the keys, other frequencies.
FAMILIES = ["gpt_neox", "gpt_neox-serial", "llama", "llama-yarn", "llama-llama3", "qwen3", "cohere", "smollm3", "phi"]
CASES = [(family, 12, 4, 70) for family in FAMILIES]  # budget, sinks, prompt
CASES += [("gpt_neox", *case) for case in ((12, 1, 1), (12, 1, 5), (9, 8, 50), (70, 2, 150), (3, 0, 9))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("custom")
    tiny.checkpoint(place / "run")
    assert main(["--checkpoint", str(place / "run"), "--output", str(place / "model")]) == 0
    return place / "model"


def streamed(model, ids, budget, sinks, new=30, **settings):
    """The same by `StreamingCache`, which tests of its own hold to the slow and obvious way."""
    cache = StreamingCache(model.config, budget=budget, sinks=sinks)
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, **settings)


@pytest.mark.filterwarnings("ignore:sinks=0")
@pytest.mark.parametrize(("family", "budget", "sinks", "prompt"), CASES)
def test_it_continues_as_a_streaming_cache_does(family, budget, sinks, prompt):
    model, ids = models.model_of(family), torch.tensor([models.tokens(prompt)])
    ours = generate(model, ids, budget=budget, sinks=sinks, max_new_tokens=30)
    assert ours.shape == (1, prompt + 30)
    assert ours.tolist() == streamed(model, ids, budget, sinks).tolist()


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize(("budget", "sinks", "prompt"), [(12, 4, 101), (70, 1, 101), (12, 4, 3)])
def test_its_scores_are_those_of_the_slow_and_obvious_way(family, budget, sinks, prompt):
    """Guards an error that is too small to change a greedy token, in the pieces of a prompt and in single steps."""
    model, ids, seen = models.model_of(family), models.tokens(prompt + 50), []

    def watch(_, scores):
        seen.append(scores.clone())
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([ids[prompt - 1 + len(seen)]]), 0.0)

    out = generate(
        model, torch.tensor([ids[:prompt]]), budget=budget, sinks=sinks, max_new_tokens=50, logits_processor=[watch]
    )
    assert out[0].tolist() == ids
    expected = streaming_logits(model, ids, budget, sinks)[prompt - 1 :]
    assert (torch.cat(seen) - expected).abs().max() < 1e-4
    dense = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
    assert (dense - expected).abs().max() > 0.1, "nothing was evicted"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_left_padded_batch_have_sinks_of_their_own(attention):
    model = models.build("llama")
    model.set_attn_implementation(attention)
    lengths, longest = (3, 100, 40, 1), 100
    rows = [models.tokens(n, seed=n) for n in lengths]
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    together = generate(model, ids, attention_mask=mask, budget=12, sinks=2, max_new_tokens=30)
    for row, out in zip(rows, together):
        alone = streamed(model, torch.tensor([row]), 12, 2)
        assert out[longest:].tolist() == alone[0, len(row) :].tolist()


def test_what_fits_is_what_generate_gives(folder):
    """Guards sampling, stopping and forbidden tokens, which are those of transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a b", "c d e f g"], return_tensors="pt", padding=True)
    for settings in ({"do_sample": False}, {"top_k": 20}, {"num_return_sequences": 3}):
        settings = {"do_sample": True, "max_new_tokens": 60, "return_dict_in_generate": True, **settings}
        settings |= {"output_scores": True, "output_logits": True}
        torch.manual_seed(0)
        plain = model.generate(**batch, **settings)
        torch.manual_seed(0)
        ours = generate(model, **batch, **settings, budget=200)
        assert torch.equal(ours.sequences, plain.sequences)
        torch.testing.assert_close(ours.scores, plain.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.logits, plain.logits, atol=1e-4, rtol=0)


def test_stop_strings_end_a_text_wherever_they_are_said(folder):
    """Guards what transformers drops on the way to a decoding loop of ours: the tokenizer that came with them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch, settings = tokenizer("a b", return_tensors="pt"), {"do_sample": False, "max_new_tokens": 60}
    whole = model.generate(**batch, **settings)[0, batch.input_ids.shape[1] :]
    strings = [next(word for x in whole[5:] if (word := tokenizer.decode([x])).isalpha())]
    expected = model.generate(**batch, **settings, stop_strings=strings, tokenizer=tokenizer)
    assert expected.shape[1] < batch.input_ids.shape[1] + 60
    config = transformers.GenerationConfig(**settings, stop_strings=strings)
    for stopping in ({**settings, "stop_strings": strings}, {"generation_config": config}):
        assert torch.equal(generate(model, **batch, **stopping, tokenizer=tokenizer, budget=200), expected)
        with pytest.raises(ValueError, match="tokenizer"):
            generate(model, **batch, **stopping, budget=200)
    model.generation_config.stop_strings = strings
    assert torch.equal(generate(model, **batch, **settings, tokenizer=tokenizer, budget=200), expected)


def test_transformers_runs_it_from_the_hub_where_it_is_trusted_and_for_any_model(hub, folder, tmp_path, capsys):
    """Guards the whole way: what is pushed is found by name, and streams another model than that of its folder."""
    assert main(["--output", str(tmp_path / "streaming"), "--format", "custom_generate"]) == 0
    upload(hub, "org/streaming", tmp_path / "streaming")
    upload(hub, "org/sink", folder)
    assert "custom_generate" in ModelCard.load("org/streaming").data.tags
    tokenizer = AutoTokenizer.from_pretrained("org/sink")
    ours, other = AutoModelForCausalLM.from_pretrained("org/sink"), models.build("llama", vocab_size=400)
    batch = tokenizer("a b c", return_tensors="pt")
    asked = {**batch, "max_new_tokens": 50, "do_sample": False, "custom_generate": "org/streaming", "budget": 8}
    with pytest.raises(ValueError, match="trust_remote_code"):
        ours.generate(**asked, trust_remote_code=False)
    for model in (ours, other):
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
        out = model.generate(**asked, trust_remote_code=True, streamer=streamer)
        assert out.tolist() == streamed(model, batch.input_ids, 8, 1, new=50, do_sample=False).tolist()
        written = tokenizer.decode(out[0, batch.input_ids.shape[1] :])
        assert written
        assert written.strip() == capsys.readouterr().out.strip()


def test_a_model_folder_has_no_code(folder):
    """Guards loading in transformers 4.57, which refuses a model from the Hub that has a custom_generate beside it."""
    assert not list(folder.rglob("*.py"))


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for argv, message in (
        (["--output", tmp_path / "x", "--checkpoint", tmp_path, "--format", "custom_generate"], "takes none"),
        (["--output", tmp_path / "x"], "give the --checkpoint to export"),
        (["--output", tmp_path / "taken", "--format", "custom_generate"], "already holds something else"),
    ):
        assert main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_sinks_are_those_of_the_model_where_it_has_some(tmp_path):
    tiny.checkpoint(tmp_path / "run", "llama", SinkConfig("token", 3))
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("a b c", return_tensors="pt").input_ids
    settings = {"budget": 8, "max_new_tokens": 40}
    ours = generate(model, ids, **settings)
    assert torch.equal(ours, generate(model, ids, **settings, sinks=3))
    assert not torch.equal(ours, generate(model, ids, **settings, sinks=1))


def test_what_would_not_be_exact_is_refused():
    ids = torch.tensor([models.tokens(5)])
    cases = [
        ("llama", {"budget": 2, "sinks": 2}, "does not hold 2 sinks"),
        ("llama", {"num_beams": 2}, "beam search"),
        ("llama", {"past_key_values": transformers.DynamicCache()}, "past_key_values"),
        ("llama", {"output_attentions": True}, "output_attentions"),
        ("llama", {"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ("llama", {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ("llama", {"assistant_early_exit": 1}, "assistant_early_exit"),
        ("llama", {"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ("llama", {"dola_layers": "low"}, "dola_layers"),
        ("llama", {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "pads must be on the left"),
        ("mistral", {"budget": models.POSITIONS + 1}, f"window of {models.POSITIONS}"),
        ("llama-dynamic", {}, "changes its rotary frequencies"),
        ("mpt", {}, "same rotary positions"),
        ("GPT2", {}, "same rotary positions"),
    ]
    for family, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            generate(models.model_of(family), ids, **{"max_new_tokens": 3, "budget": 12, **settings})


@pytest.mark.parametrize("kind", IN_SOFTMAX)
def test_a_sink_in_the_softmax_is_refused(tmp_path, kind):
    tiny.checkpoint(tmp_path / "run", "llama", SinkConfig(kind))
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="sinkmodel.StreamingCache"):
        generate(model, torch.tensor([[5]]), max_new_tokens=3)
