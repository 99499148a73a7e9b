"""Guards: a token that a fine-tuner adds to an export can be generated, and rows that were never trained cannot."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.measures.texts import check_same_tokens
from recipes.data.tokenization import load_vocabulary
from sinkmodel.export import export
from sinkmodel.loading import load_model
from sinkmodel.sinks import SinkConfig
from sinkmodel.streaming import Sampler, Stream
from sinkmodel.tokenizer import suppressed_ids
from sinkmodel.unused_rows import UNUSED
from tests import tiny
from tests.plain import json_printed_by, transformers_4

# As people fine-tune, with plain transformers. It returns the new id, a text, and what a text at random is made of.
TUNE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def tune(folder, output, **resize):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    new = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.resize_token_embeddings(len(tokenizer), **resize)
    ids = tokenizer("a b c<|im_end|>", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    prompt = tokenizer(["a b"] * 32, return_tensors="pt")
    text = model.generate(prompt.input_ids[:1], max_new_tokens=9, do_sample=False, eos_token_id=new)[0].tolist()
    torch.manual_seed(0)
    drawn = model.generate(**prompt, max_new_tokens=30, do_sample=True, temperature=9.0, top_k=0, eos_token_id=[])
    return new, text, sorted(set(drawn[:, prompt.input_ids.shape[1]:].flatten().tolist()))
"""
SINKS = {"vanilla": SinkConfig(), "one sink": SinkConfig("token"), "two sinks": SinkConfig("token", 2)}
CASES = [("gpt_neox", False, "one sink"), ("gpt_neox", True, "vanilla"), ("llama", True, "one sink"),
         ("llama", False, "two sinks")]  # fmt: skip


def exported(folder, architecture="llama", tied=False, sink="one sink"):
    shape = dataclasses.replace(tiny.SHAPES[architecture], tie_embeddings=tied)
    return export(tiny.checkpoint(folder / "run", shape, SINKS[sink]), folder / "model")


def check(new, text, drawn):
    assert new == 384, "no row is there before it is trained"
    assert text[-1] == new
    assert new in drawn
    assert set(drawn) <= {0, *range(2, 300), new}, "a sink, the padding or a row without a token"
    assert len(drawn) > 250


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_said_after_fine_tuning_with_plain_transformers(case, tmp_path):
    tools: dict = {}
    exec(TUNE, tools)
    check(*tools["tune"](str(exported(tmp_path, *case)), str(tmp_path / "tuned")))
    loaded = load_model(str(tmp_path / "tuned"))
    stream = Stream(loaded.model, loaded.tokenizer, budget=32)
    stream.feed("a b")
    assert 384 in list(stream.tokens(max_tokens=9, stop=()))
    stream.reset()
    stream.feed("a b")
    assert 384 in list(stream.tokens(max_tokens=400, stop=(), sample=Sampler(temperature=9.0)))


@pytest.mark.slow
def test_it_is_said_in_transformers_4_57(tmp_path):
    program = TUNE + "\nprint(json.dumps(tune(*sys.argv[1:])))"
    check(*json_printed_by(transformers_4(), program, exported(tmp_path), tmp_path / "tuned", place=tmp_path))


def test_rows_that_a_fine_tuner_pads_with_are_not_said_by_a_stream(tmp_path):
    tools: dict = {}
    exec(TUNE, tools)
    tools["tune"](str(exported(tmp_path)), str(tmp_path / "tuned"), pad_to_multiple_of=64)
    loaded = load_model(str(tmp_path / "tuned"))
    assert suppressed_ids(loaded.model, loaded.tokenizer) == {1, *range(300, 384), *range(385, 448)}
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[400] = 100 * loaded.model.get_output_embeddings().weight[5]
    stream = Stream(loaded.model, loaded.tokenizer, budget=32)
    stream.feed("a b")
    assert max(stream.tokens(max_tokens=50, stop=(), sample=Sampler(temperature=9.0))) <= 384


def test_a_token_that_was_added_to_an_older_export_is_said(tmp_path):
    """Such an export has no names for its free rows, so the token took one that it suppresses."""
    folder = exported(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [x for x in tokenizer["added_tokens"] if not UNUSED.fullmatch(x["content"])]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    plain, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert suppressed_ids(model, plain) == {1, *range(300, 384)}
    plain.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert plain.convert_tokens_to_ids("<|im_end|>") == 301
    assert suppressed_ids(model, plain) == {1, 300, *range(302, 384)}
    model.resize_token_embeddings(len(plain))
    assert suppressed_ids(model, plain) & set(range(len(plain))) == {1, 300}
    model.save_pretrained(folder)
    plain.save_pretrained(folder)
    loaded = load_model(str(folder))
    assert 301 not in loaded.model.generation_config.suppress_tokens, "so `generate` says it too"
    model.generation_config.suppress_tokens = [0, 301]
    assert suppressed_ids(model, plain) == {0, 1, 300, 301}, "what somebody suppresses on purpose stays so"


def test_an_exported_tokenizer_without_a_sink_encodes_data_as_before(tmp_path):
    """Guards the vocabulary of a run on data that the tokenizer of an export has encoded: the names are no tokens."""
    folder = exported(tmp_path, sink="vanilla")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 384
    assert load_vocabulary(str(folder)).size == tiny.tokenizer().vocabulary


def test_twins_and_their_runs_have_the_same_tokens(tmp_path):
    """Guards a comparison of twins, of which one has a name more for rows without a token."""
    models = []
    for sink in ("vanilla", "one sink"):
        folder = exported(tmp_path / sink, sink=sink)
        models += [load_model(str(folder)), load_model(str(tmp_path / sink / "run"))]
    for one, other in itertools.combinations(models, 2):
        check_same_tokens(one, other, [])
