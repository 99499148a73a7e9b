"""Guards: in llama.cpp an export has the same token ids, one sink in front, and continues with the same tokens."""

from __future__ import annotations

import dataclasses
import json
import urllib.request
from types import SimpleNamespace

import gguf
import pytest
import torch
import xllamacpp
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel.checkpoint import write_manifest
from sinkmodel.errors import UserError
from sinkmodel.export import main
from sinkmodel.export.gguf_file import pairs_together, thirds
from sinkmodel.export.gguf_tokenizer import check_tokenizer
from sinkmodel.loading import load_model
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig
from sinkmodel.tokenizer import TextTokenizer
from tests import tiny

# With a head of its own or none, and a rotation that is not llama.cpp's default.
SHAPES = {
    **tiny.SHAPES,
    **{
        f"{name}, tied": dataclasses.replace(shape, tie_embeddings=True, rope_theta=500.0)
        for name, shape in tiny.SHAPES.items()
    },
}
CASES = [(name, SinkConfig(kind)) for name in SHAPES for kind in ("none", "token")]
TEXTS = [
    "hello wo a b",
    "  two blanks,\ttab\n\n\nlines  \n and blanks at the end   ",
    "don't we'll DON'T it's 1234567 x2 3.14 -5% «été» naïve 東京 ☃️ 🙂",
    "a" * 60 + " " * 40 + "b",
    "<|endoftext|> is text, <|padding|> too",
]
CHAT = [{"role": "user", "content": "a <|sink|> b"}]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1].kind}")
def twice(request, tmp_path_factory):
    """The same checkpoint in transformers and in llama.cpp."""
    shape, sink = request.param
    place = tmp_path_factory.mktemp("gguf")
    tiny.checkpoint(place / "run", SHAPES[shape], sink)
    assert main(["--checkpoint", str(place / "run"), "--output", str(place / "model")]) == 0
    assert main(["--checkpoint", str(place / "run"), "--output", str(place / "m.gguf"), "--format", "gguf"]) == 0
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(place / "model"),
        tokenizer=AutoTokenizer.from_pretrained(place / "model"),
        server=serve(place / "m.gguf"),
        sinks=sink.ids(tiny.tokenizer().vocabulary),
    )


def serve(path, exact: bool = False):
    """llama.cpp with this file; `exact` without flash attention, whose scores are in fp16."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 2
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    ask(server, "/completion", prompt=[0], n_predict=1)  # one that is ended before its loop has begun never ends
    return server


def ask(server, path: str, **body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_token_ids_are_the_same_and_one_sink_is_in_front(twice):
    for text in TEXTS:
        there = ask(twice.server, "/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert there == twice.tokenizer(text, split_special_tokens=True).input_ids
        assert [token for token in there if token in twice.sinks] == there[: len(twice.sinks)] == twice.sinks


def test_greedy_tokens_are_the_same_for_each_prompt_of_a_batch(twice):
    never = [0, *twice.model.generation_config.suppress_tokens]  # no end, so that all say as much
    for text in ("hello wo a b", "q"):
        batch = twice.tokenizer(text, return_tensors="pt")
        here = twice.model.generate(**batch, max_new_tokens=30, do_sample=False, suppress_tokens=never)
        asked = {"n_predict": 30, "temperature": 0, "return_tokens": True, "logit_bias": [[i, False] for i in never]}
        there = ask(twice.server, "/completion", prompt=[text, text], **asked)
        assert [row["tokens_evaluated"] for row in there] == [batch.input_ids.shape[1]] * 2
        for row in there:
            assert row["tokens"] == here[0, batch.input_ids.shape[1] :].tolist()
            # The same token all the time would be easy to agree on; with a tied head, random weights say little else.
            assert len(set(row["tokens"])) > 3 or twice.model.config.tie_word_embeddings


def test_a_chat_has_one_sink_in_front_and_the_same_distribution(twice):
    """Guards the second sink: the template writes one, and llama.cpp puts its `bos` in front of what is written."""
    batch = twice.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = batch.input_ids[0].tolist()
    assert [token for token in ids if token in twice.sinks] == ids[: len(twice.sinks)] == twice.sinks
    with torch.no_grad():
        here = twice.model(**batch).logits[0, -1].log_softmax(-1)
    (letter,) = twice.tokenizer("a", add_special_tokens=False).input_ids  # what is generated shall be a whole letter
    asked = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20, "logit_bias": [[letter, 100]]}
    there = ask(twice.server, "/v1/chat/completions", messages=CHAT, **asked)
    assert there["usage"]["prompt_tokens"] == len(ids)
    (first,) = there["choices"][0]["logprobs"]["content"]
    assert len(first["top_logprobs"]) >= 20
    for token in first["top_logprobs"]:
        assert token["logprob"] == pytest.approx(here[token["id"]].item(), abs=2e-3)


def test_pythias_tokenizer_with_its_runs_of_blanks_has_the_same_ids(tmp_path):
    """Guards the published model's own tokenizer: NFC, and blanks as added tokens that are no special ones."""
    backend = Tokenizer.from_str(tiny.tokenizer().definition)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([" " * n for n in range(24, 1, -1)])
    text = TextTokenizer(backend.to_str(), eos_id=0, pad_id=1)
    tiny.checkpoint(tmp_path / "run", text=text)
    for name, form in (("model", "transformers"), ("m.gguf", "gguf")):
        assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / name), "--format", form]) == 0
    tokenizer, server = AutoTokenizer.from_pretrained(tmp_path / "model"), serve(tmp_path / "m.gguf")
    for words in (*TEXTS, *(f"a{' ' * n}b\n{' ' * n}c{' ' * n}" for n in range(60))):
        there = ask(server, "/tokenize", content=words, add_special=True, parse_special=False)["tokens"]
        assert there == tokenizer(words, split_special_tokens=True).input_ids, words


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_matrices_are_in_the_dtype_that_was_asked_for(tmp_path, dtype, kind):
    """Guards a file that says bf16 and is not; norms and biases stay in fp32, which llama.cpp computes with."""
    tiny.checkpoint(tmp_path / "run")
    argv = ["--checkpoint", tmp_path / "run", "--output", tmp_path / "m.gguf", "--format", "gguf", "--dtype", dtype]
    assert main([str(word) for word in argv]) == 0
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1} == {kind}
    assert {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) == 1} == {"F32"}
    assert ask(serve(tmp_path / "m.gguf"), "/completion", prompt="a", n_predict=2)["tokens_evaluated"] == 2


def test_layouts_on_numbers():
    rows = torch.arange(12)  # 2 heads, of q k v, 2 dimensions
    assert thirds(rows, 2).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert pairs_together(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


SINKS_REFUSED = {
    **{kind: (SinkConfig(kind), f"this model has a sink of kind '{kind}'") for kind in IN_SOFTMAX},
    "two": (SinkConfig("token", 2), "this model has 2 sinks"),
}


@pytest.mark.parametrize("name", SINKS_REFUSED)
def test_a_sink_that_llama_cpp_would_drop_is_refused(tmp_path, capsys, name):
    sink, message = SINKS_REFUSED[name]
    tiny.checkpoint(tmp_path / "run", "llama", sink)
    refused(["--checkpoint", tmp_path / "run", "--output", tmp_path / "m.gguf", "--format", "gguf"], message, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_bad_output_names_are_one_line(tmp_path, capsys):
    tiny.checkpoint(tmp_path / "run")
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    for output, form, message in (
        (tmp_path / "model", "gguf", "it must end in .gguf"),
        (tmp_path / "model.gguf", "transformers", "it must end in .gguf with --format gguf"),
        (taken, "gguf", "already exists"),
    ):
        refused(["--checkpoint", tmp_path / "run", "--output", output, "--format", form], message, capsys)
    assert taken.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken.gguf"]


@pytest.mark.parametrize(("name", "form"), [("model", "transformers"), ("m.gguf", "gguf")])
def test_a_checkpoint_that_is_not_what_was_written_is_not_exported(tmp_path, capsys, name, form):
    """Risk: weights with a flipped bit load as any others do, and are published."""
    file = tiny.checkpoint(tmp_path / "run")
    write_manifest(file.parent, file.name, "0" * 64)
    argv = ["--checkpoint", tmp_path / "run", "--output", tmp_path / name, "--format", form]
    refused(argv, "step7.ckpt is not what was written", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def refused(argv, message: str, capsys) -> None:
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def changed(change) -> TextTokenizer:
    content = json.loads(tiny.tokenizer().definition)
    change(content)
    return TextTokenizer(json.dumps(content), eos_id=0, pad_id=1)


def with_pattern(content):
    other = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    content["pre_tokenizer"] = json.loads(other.__getstate__())


TOKENIZERS_REFUSED = {
    "it splits a text in another way than GPT-2": with_pattern,
    "than GPT-2, SmolLM": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    "it has the normalizer 'NFKC'": lambda c: c.update(normalizer={"type": "NFKC"}),
    "Llama 3 and Qwen 2": lambda c: c["model"].update(ignore_merges=True),
    "in another way": lambda c: c["pre_tokenizer"].update(use_regex=False),
    "its BPE has dropout": lambda c: c["model"].update(dropout=0.1),
    "its BPE has unk_token": lambda c: c["model"].update(unk_token="a"),
    "its BPE has continuing_subword_prefix": lambda c: c["model"].update(continuing_subword_prefix="##"),
    "its BPE has end_of_word_suffix": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "its BPE has byte_fallback": lambda c: c["model"].update(byte_fallback=True),
    "blanks around them": lambda c: c["added_tokens"][0].update(lstrip=True),
    "include the blanks": lambda c: c["added_tokens"][0].update(rstrip=True),
    "match only whole words": lambda c: c["added_tokens"][0].update(single_word=True),
    "it adds tokens to a text other than one in front": lambda c: c.update(
        post_processor=json.loads(
            processors.TemplateProcessing(single="a $A", special_tokens=[("a", 2)]).__getstate__()
        )
    ),
    "its model is 'WordLevel', not BPE": lambda c: c.update(
        model={"type": "WordLevel", "vocab": {"a": 2}, "unk_token": "a"}
    ),
}


@pytest.mark.parametrize("reason", TOKENIZERS_REFUSED)
def test_a_tokenizer_that_llama_cpp_would_run_with_other_ids_is_refused(reason):
    check_tokenizer(tiny.tokenizer(), SinkConfig())
    with pytest.raises(UserError) as error:
        check_tokenizer(changed(TOKENIZERS_REFUSED[reason]), SinkConfig())
    assert reason in str(error.value)
    assert "--format transformers" in str(error.value)


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(UserError, match="it has no end-of-text token"):
        check_tokenizer(dataclasses.replace(tiny.tokenizer(), eos_id=None), SinkConfig())


def test_our_own_commands_see_the_sink_of_a_gguf_file(tmp_path):
    """Guards `sink-eval --model sink.gguf` against measuring the model without its sink."""
    tiny.checkpoint(tmp_path / "run", "llama")
    for name, form in (("model", "transformers"), ("m.gguf", "gguf")):
        assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / name), "--format", form]) == 0
    folder, file = load_model(str(tmp_path / "model")), load_model(str(tmp_path / "m.gguf"))
    assert file.sink_ids == folder.sink_ids == [tiny.tokenizer().vocabulary]
    ids = torch.tensor([[*file.sink_ids, 5, 6, 7]])
    assert (file.model(ids).logits - folder.model(ids).logits).abs().max() < 1e-4
