"""Guards: `pipeline("text-generation")` gives a model its sinks once, for a prompt, a batch and a chat, in 4.57 and 5.

And `custom_generate` streams in both. Each transformers runs once, in a process without our package.
"""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel import StreamingCache
from sinkmodel.export import export
from sinkmodel.export.command import export_streaming_code
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.plain import json_printed_by, transformers_4

PROGRAM = """
import json, sys, transformers
from transformers import pipeline

def look(folder):
    pipe, fed = pipeline("text-generation", model=folder), []
    generate = pipe.model.generate

    def watched(*args, **inputs):
        masked = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist())
        fed.append([[token for token, seen in zip(*row) if seen] for row in masked])
        return generate(*args, **inputs)

    pipe.model.generate = watched
    outputs = {}
    for name, asked, settings in (
        ("prompt", "a b c", {}),
        ("batch", ["a", "a b c d e f"], {"batch_size": 2}),
        ("chat", [{"role": "user", "content": "a <|sink|> b"}], {}),
    ):
        fed.clear()
        answer = pipe(asked, max_new_tokens=12, do_sample=False, return_tensors=True, **settings)
        rows = [row[0] if isinstance(row, list) else row for row in answer]
        outputs[name] = [list(sum(fed, [])), [row["generated_token_ids"] for row in rows]]
    batch = pipe.tokenizer("a b c", return_tensors="pt")
    stream = {"custom_generate": sys.argv[1], "trust_remote_code": True, "budget": 8}
    outputs["stream"] = generate(**batch, **stream, max_new_tokens=40, do_sample=False).tolist()[0]
    return outputs

loaded = "sinkmodel" in sys.modules
print(json.dumps([transformers.__version__, loaded, {folder: look(folder) for folder in sys.argv[2:]}]))
"""
SINKS = {"vanilla": SinkConfig(), "one sink": SinkConfig("token"), "two sinks": SinkConfig("token", 2)}
CASES = [(architecture, name) for architecture in tiny.SHAPES for name in SINKS]


@pytest.fixture(scope="module", params=["4.57", "5"])
def seen(request, tmp_path_factory):
    """All exports, looked at by one transformers."""
    place = tmp_path_factory.mktemp("exports")
    folders = {}
    for i, (architecture, name) in enumerate(CASES):
        checkpoint = tiny.checkpoint(place / f"run{i}", architecture, SINKS[name])
        folders[architecture, name] = export(checkpoint, place / f"model{i}")
    code = export_streaming_code(place / "streaming")
    python = transformers_4() if request.param == "4.57" else sys.executable
    version, loaded, outputs = json_printed_by(python, PROGRAM, code, *folders.values(), place=place)
    assert version.startswith(f"{request.param}.")
    assert not loaded
    return {case: (folder, outputs[str(folder)]) for case, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_a_pipeline_gives_it_its_sinks_once(seen, case):
    folder, outputs = seen[case]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sinks = SINKS[case[1]].ids(tiny.tokenizer().vocabulary)
    fed = {
        "prompt": [tokenizer("a b c").input_ids],
        "batch": tokenizer(["a", "a b c d e f"]).input_ids,
        "chat": [tokenizer.apply_chat_template([{"role": "user", "content": "a <|sink|> b"}], **WHOLE).input_ids],
    }
    for name, rows in fed.items():
        there, answers = outputs[name]
        assert there == rows, name
        for row, answer in zip(rows, answers):
            assert [token for token in row if token in sinks] == row[: len(sinks)] == sinks
            alone = model.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False)[0].tolist()
            assert [token for token in answer if token != 1][: len(alone)] == alone, name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_custom_generate_streams_without_us(seen, case):
    folder, outputs = seen[case]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    cache = StreamingCache(model.config, budget=8)
    batch = tokenizer("a b c", return_tensors="pt")
    assert (
        outputs["stream"]
        == model.generate(**batch, past_key_values=cache, max_new_tokens=40, do_sample=False)[0].tolist()
    )


WHOLE = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
