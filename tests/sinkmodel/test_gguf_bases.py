"""Guards: llama.cpp computes what transformers does of a model that started from somebody else's, or it is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel.errors import UserError
from sinkmodel.export import main
from sinkmodel.export.gguf_tokenizer import LLAMA_3, PATTERNS, QWEN, pattern_of
from sinkmodel.loading import load_model
from sinkmodel.sinks import SinkConfig
from sinkmodel.tokenizer import TextTokenizer
from tests import tiny
from tests.sinkmodel.test_export_bases import BASE, TEMPLATES
from tests.sinkmodel.test_gguf import TEXTS, ask, refused, serve

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
READ_BACK = {  # by transformers too
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, heads wider than the model": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
}
MODELS = {  # it reads no scaling of rotary positions from a GGUF file, no bias of Llama, no width of a head of Qwen 3
    **READ_BACK,
    "llama, biases": ("llama", {"attention_bias": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama, llama3": ("llama-llama3", {}),
    "llama, linear": ("llama-linear", {}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2, linear": ("qwen2", {"rope_parameters": LINEAR}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
}
PROMPT = "a b c d e f g h i j k l m n o p"


def both(place, sink=None, text=None, family="llama", **changes):
    """The model folder and the GGUF file of one checkpoint."""
    tiny.checkpoint(place / "run", sink=sink, text=text, model=tiny.based(family, sink, text, **changes), base=BASE)
    for name, form in (("model", "transformers"), ("m.gguf", "gguf")):
        assert main(["--checkpoint", str(place / "run"), "--output", str(place / name), "--format", form]) == 0
    return place / "model", place / "m.gguf"


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_has_the_same_distribution(tmp_path, name):
    """Risk: heads in another order, a rotation or a bias that is lost, a row of the sink that is not its own."""
    family, changes = MODELS[name]
    folder, file = both(tmp_path, family=family, **changes)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        here = model(**batch).logits[0, -1].log_softmax(-1)
    (letter,) = tokenizer("a", add_special_tokens=False).input_ids  # what is generated shall be a whole letter
    asked = {"n_predict": 1, "n_probs": len(here), "logit_bias": [[letter, 100]]}
    there = ask(serve(file, exact=True), "/completion", prompt=PROMPT, **asked)
    assert there["tokens_evaluated"] == batch.input_ids.shape[1]
    top = there["completion_probabilities"][0]["top_logprobs"]
    assert len(top) > 50
    close = 1e-2 if family == "gpt_neox" else 1e-4  # llama.cpp looks up its GELU in a table of fp16
    for token in top:
        assert token["logprob"] == pytest.approx(here[token["id"]].item(), abs=close)


@pytest.mark.parametrize("name", READ_BACK)
def test_our_own_commands_read_it_back(tmp_path, name):
    family, changes = READ_BACK[name]
    folder, file = both(tmp_path, family=family, **changes)
    whole, loaded = load_model(str(folder)), load_model(str(file))
    assert loaded.sink_ids == whole.sink_ids == [tiny.tokenizer().vocabulary]
    ids = loaded.tokenizer("a b c d e", return_tensors="pt").input_ids
    assert ids.tolist() == whole.tokenizer("a b c d e", return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        assert (loaded.model(ids).logits - whole.model(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama, llama3", "it scales its rotary positions"),
        ("llama, linear", "it scales its rotary positions"),
        ("qwen2, linear", "it scales its rotary positions"),
        ("llama, biases", "its projections have biases"),
    ],
)
def test_our_own_commands_refuse_what_transformers_would_leave_out(tmp_path, name, reason):
    """Risk: a model of other numbers, and no word of it."""
    family, changes = MODELS[name]
    _, file = both(tmp_path, family=family, **changes)
    with pytest.raises(UserError, match=f"cannot be read with the right numbers: {reason}"):
        load_model(str(file))


# --------------------------------------------------------------------------------------------------------- tokenizers


# Merges over what one pattern or another cuts apart (digits, line ends, capitals), so that ids tell which one it was.
MERGES = [
    ("1", "2"),
    ("12", "3"),
    ("123", "4"),
    ("Ġ", "1"),
    ("Ċ", "Ċ"),
    ("!", "Ċ"),
    ("č", "Ċ"),
    ("'", "L"),
    ("'L", "L"),
]
WORD = "Ġzqx"  # a token that no merges lead to


def cut_by(*steps, ignore_merges: bool = False, front: str | None = None) -> TextTokenizer:
    """The tiny tokenizer with another way to cut a text into words, and MERGES."""
    backend = tiny.tokenizer().backend()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    if front is not None:
        number = backend.token_to_id(front)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{front} $A", pair=f"{front} $A {front} $B", special_tokens=[(front, number)]
        )
    content = json.loads(backend.to_str())
    model = content["model"]
    model["ignore_merges"] = ignore_merges
    for name in (*("".join(pair) for pair in MERGES), WORD):
        model["vocab"].setdefault(name, len(model["vocab"]))
    model["merges"] += [list(pair) for pair in MERGES if list(pair) not in model["merges"]]
    return TextTokenizer(Tokenizer.from_str(json.dumps(content)).to_str(), eos_id=0, pad_id=1)


def split(pattern: tuple[str, str]):
    return pre_tokenizers.Split(Regex(pattern[1]), "isolated")


PLAIN, BYTES = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex) for regex in (True, False))
CUTS = {
    "gpt-2": cut_by(PLAIN),
    "smollm": cut_by(pre_tokenizers.Digits(individual_digits=True), PLAIN),
    "llama-bpe": cut_by(split(LLAMA_3), BYTES, ignore_merges=True, front="<|endoftext|>"),
    "smaug-bpe": cut_by(split(LLAMA_3), BYTES),
    "qwen2": cut_by(split(QWEN), BYTES),
}
MORE = [
    "x²y ½ 1234 Ⅷ 12 3 1212",
    "a zqx 1!\n\n",
    "I'LL don't 'S\r\n\r\n a\n\n b  \n",
    "a\tb\u00a0c\u3000d",
    "!?...\n\n--\n word's",
    "  \n  x",
]


@pytest.mark.parametrize("name", CUTS)
def test_ids_are_the_same_and_one_sink_is_in_front(tmp_path, name):
    """Risk: llama.cpp cuts a text by another pattern than the one that is named; `<s>` of the base beside the sink."""
    folder, file = both(tmp_path, text=CUTS[name])
    tokenizer, server = AutoTokenizer.from_pretrained(folder), serve(file)
    sink = CUTS[name].vocabulary
    for words in (*TEXTS, *MORE):
        there = ask(server, "/tokenize", content=words, add_special=True, parse_special=False)["tokens"]
        assert there == tokenizer(words, split_special_tokens=True).input_ids, words
        assert [token for token in there if token in (0, sink)] == [sink]


def test_patterns_are_all_tried():
    assert set(CUTS) == set(PATTERNS.values())
    assert [pattern_of(json.loads(text.definition)) for text in CUTS.values()] == list(CUTS)
    assert pattern_of(json.loads(cut_by(pre_tokenizers.Digits(), PLAIN).definition)) is None
    behaviour = pre_tokenizers.Split(Regex(QWEN[1]), "removed")
    assert pattern_of(json.loads(cut_by(behaviour, BYTES).definition)) is None


def test_a_vanilla_continuation_keeps_the_first_token_of_its_base(tmp_path):
    text = dataclasses.replace(CUTS["llama-bpe"], front=(0,))
    folder, file = both(tmp_path, SinkConfig(), text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    there = ask(serve(file), "/tokenize", content="a b", add_special=True)["tokens"]
    assert there == tokenizer("a b").input_ids
    assert there.count(0) == 1


@pytest.mark.parametrize("name", ["bos in front", "bos in each turn", "no bos"])
def test_a_chat_in_the_template_of_the_base_has_one_sink(tmp_path, name):
    """Risk: llama.cpp's own engine for templates puts a sink in each turn, or none."""
    text = dataclasses.replace(tiny.tokenizer(), chat_template=TEMPLATES[name])
    folder, file = both(tmp_path, text=text)
    turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user")]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, return_dict=True).input_ids
    there = ask(serve(file), "/v1/chat/completions", messages=turns, max_tokens=1)
    assert there["usage"]["prompt_tokens"] == len(ids)
    assert ids.count(text.vocabulary) == 1
    assert ids[0] == text.vocabulary


# ---------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "--format gguf supports gpt_neox, llama, mistral, qwen2, qwen3, and this model is gemma": ("gemma", {}),
    "and this model is stablelm; export it with --format transformers": ("stablelm", {}),
    "cannot compute this mistral: its attention has a sliding window of 16": ("mistral", {"sliding_window": 16}),
    "cannot compute this qwen2: its attention has a sliding window of 8": (
        "qwen2",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "cannot compute this llama: its activation is gelu": ("llama", {"hidden_act": "gelu"}),
    "its rotary positions are scaled by dynamic": ("llama-dynamic", {}),
    "its rotary positions are scaled by yarn with beta_fast": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16.0}},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, capsys, message):
    """Risk: a KeyError; a file that loads there and says something else."""
    family, changes = REFUSED[message]
    tiny.checkpoint(tmp_path / "run", model=tiny.based(family, **changes), base=BASE)
    refused(["--checkpoint", tmp_path / "run", "--output", tmp_path / "m.gguf", "--format", "gguf"], message, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tokenizer_of_llama_2_is_refused(tmp_path, capsys):
    text = tiny.llama_2_tokenizer()
    tiny.checkpoint(tmp_path / "run", text=text, model=tiny.based("llama", None, text), base=BASE)
    argv = ["--checkpoint", tmp_path / "run", "--output", tmp_path / "m.gguf", "--format", "gguf"]
    refused(argv, "cannot run this tokenizer: its BPE has unk_token", capsys)
