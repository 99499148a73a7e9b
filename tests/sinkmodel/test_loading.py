"""Guards: every way to name a model finds it, what is damaged is refused in one line, and text cannot forge a sink."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from sinkmodel.cache.serialization import read_state
from sinkmodel.errors import UserError
from sinkmodel.export import export
from sinkmodel.loading import LoadedModel, encode, load_model
from sinkmodel.sinks import SinkConfig
from sinkmodel.streaming import Stream
from tests import tiny

IDS = torch.arange(2, 30)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.checkpoint(folder, "llama")
    return folder


@pytest.fixture
def exported(run, tmp_path):
    return export(run, tmp_path / "model")


def test_run_checkpoint_and_folder_are_the_same_model(run, exported):
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    loaded = [load_model(str(path)) for path in (run, checkpoint, exported)]
    sink = tiny.tokenizer().vocabulary
    for one in loaded:
        assert one.sink_ids == [sink]
        assert one.positions == 128
        assert not one.model.training
        torch.testing.assert_close(one.model(IDS).logits, loaded[0].model(IDS).logits)
    assert load_model(str(run), "bfloat16").model.dtype == torch.bfloat16


def test_a_vanilla_model_has_no_sink(tmp_path):
    tiny.checkpoint(tmp_path, sink=SinkConfig("none"))
    assert load_model(str(tmp_path)).sink_ids == []


@pytest.mark.parametrize("sink", [SinkConfig("token", 2), SinkConfig("none")])
def test_what_a_strangers_tokenizer_puts_in_front_is_put_in_front(tmp_path, sink):
    """Risk: a Llama is measured without its `<s>`, which is its sink, and seems to have none."""
    tiny.checkpoint(tmp_path / "run", "llama", sink)
    folder = export(tmp_path / "run", tmp_path / "model")
    ours = load_model(str(folder))
    assert ours.borrowed == []
    config = json.loads((folder / "config.json").read_text())
    del config["sink"]
    (folder / "config.json").write_text(json.dumps(config))
    theirs = load_model(str(folder))
    assert theirs.sink_ids == ours.sink_ids
    assert theirs.borrowed == sink.names


def test_text_cannot_become_a_sink_and_sinks_are_not_put_in_front(run):
    loaded = load_model(str(run))
    (sink,) = loaded.sink_ids
    assert loaded.tokenizer("<|sink|> x").input_ids.count(sink) == 2, "the plain call is fooled, and adds one"
    ids = encode(loaded, "<|sink|> and <|endoftext|>")
    assert loaded.tokenizer.decode(ids) == "<|sink|> and <|endoftext|>"
    assert not {sink, 0} & set(ids)


@pytest.mark.parametrize("limit", [1, 10, 333, 10_000])
def test_the_first_tokens_of_a_text_are_found_without_reading_all_of_it(run, limit):
    loaded, text = load_model(str(run)), tiny.words(3000)
    read = []
    tokenizer = loaded.tokenizer
    loaded.tokenizer = lambda text, **kwargs: read.append(len(text)) or tokenizer(text, **kwargs)
    assert encode(loaded, text, limit) == encode(loaded, text)[:limit]
    assert limit > 1000 or max(read[:-1]) < len(text) / 2


def test_a_cut_inside_of_a_word_does_not_reach_the_tokens():
    """Guards the spare tokens: the 40th word would end at the first cut, were the first word not longer."""
    words = ["longerword", *(f"w{i:04d}" for i in range(500))]

    def by_word(text, **kwargs):
        return SimpleNamespace(input_ids=text.split())

    loaded = LoadedModel(None, by_word, [], "")
    for limit in (1, 5, 40, 300, 501):
        assert encode(loaded, " ".join(words), limit) == words[:limit]


@pytest.mark.parametrize("limit", [None, 1, 700, 1900])
def test_a_long_text_goes_through_the_tokenizer_in_pieces(run, monkeypatch, limit):
    """Guards memory that grows with a text; the tokens are those of the whole."""
    loaded, text = load_model(str(run)), tiny.words(3000)
    whole = encode(loaded, text)
    assert len(whole) > 1900
    read = []
    tokenizer = loaded.tokenizer
    loaded.tokenizer = lambda text, **kwargs: read.append(len(text)) or tokenizer(text, **kwargs)
    monkeypatch.setattr("sinkmodel.loading.PIECE", 1000)
    assert encode(loaded, text, limit) == whole[:limit]
    assert max(read) < 1200


# ------------------------------------------------------------------------------------------------------ bad input


def refusal(name, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(name), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "not a folder, a file or an installed package" in refusal(tmp_path / "nothing")
    assert "not a folder, a file or an installed package" in refusal("runs/nothing"), "not sought on the Hub"
    assert "no config.json" in refusal(tmp_path)
    assert "ships 0 .gguf files" in refusal("torch")
    assert "choose one of float32" in refusal(tmp_path, dtype="int3")


def test_damaged_weights(exported):
    weights = exported / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert str(exported) in refusal(exported)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lack 1 tensors of the model in the config, the first is model.layers.1.mlp.up_proj.weight" in refusal(
        exported
    )
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": lost[:-1]}, weights, metadata={"format": "pt"})
    assert str(exported) in refusal(exported)


def test_pickled_weights_are_not_read(exported):
    weights = exported / "model.safetensors"
    torch.save(load_file(weights), exported / "pytorch_model.bin")
    weights.unlink()
    assert "complete .safetensors weights" in refusal(exported)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("what", ["weights", "weights by another index", "tokenizer"])
def test_a_folder_that_names_files_outside_is_refused(exported, what, absolute):
    """Risk: transformers opens what an index names, wherever it is."""
    outside = exported.parent / "outside"
    outside.mkdir()
    name = f"{outside if absolute else '../outside'}/"
    if what == "tokenizer":
        (exported / "tokenizer.json").rename(outside / "tokenizer.1.0.json")
        path = exported / "tokenizer_config.json"
        content = json.loads(path.read_text()) | {"fast_tokenizer_files": [f"{name}tokenizer.1.0.json"]}
    else:
        (exported / "model.safetensors").rename(outside / "weights.safetensors")
        weights = load_file(outside / "weights.safetensors")
        content = {"metadata": {}, "weight_map": dict.fromkeys(weights, f"{name}weights.safetensors")}
        path = exported / "model.safetensors.index.json"
        if what == "weights by another index":
            path = exported / "other.safetensors.index.json"
            config = json.loads((exported / "config.json").read_text()) | {"transformers_weights": path.name}
            (exported / "config.json").write_text(json.dumps(config))
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{path.name} names the file .* which is not inside"):
        load_model(str(exported))


@pytest.mark.parametrize("how", ["archive", "older archive", "pickle", "module", "script"])
def test_a_file_with_code_is_not_loaded_and_says_why_in_our_words(tmp_path, how):
    """Risk: torch's words are shown, which advise to load it all the same."""
    path, content = tmp_path / "x.ckpt", {"a": SimpleNamespace(x=1)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif how == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    else:
        content = torch.nn.Linear(2, 2) if how == "module" else content
        torch.save(content, path, _use_new_zipfile_serialization=how != "older archive")
    for read in (lambda: load_model(str(path)), lambda: read_state(path), lambda: export(path, tmp_path / "out")):
        with pytest.raises(UserError, match=rf"{path} holds objects or code, .*as safetensors") as caught:
            read()
        assert "weights_only" not in str(caught.value)


def test_a_config_that_wants_code_of_its_own_is_refused(exported):
    config = json.loads((exported / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}}
    (exported / "config.json").write_text(json.dumps(config))
    (exported / "x.py").write_text("raise SystemExit('this ran')")
    assert str(exported) in refusal(exported)


def test_a_folder_without_tokenizer_and_one_with_another(exported):
    tokenizer = exported / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 5000, "content": "<|more|>"})
    content["model"]["vocab"]["<|more|>"] = 5000
    tokenizer.write_text(json.dumps(content))
    assert "the tokenizer does not fit the model: it has ids up to" in refusal(exported)
    for file in exported.glob("token*"):
        file.unlink()
    assert "no tokenizer" in refusal(exported)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_without_a_row_is_refused_when_it_is_fed(exported, special):
    """Gemma-3's tokenizer has 262,145 ids and its text model 262,144 rows; transformers runs it."""
    plain = load_model(str(exported))
    rows = plain.model.config.vocab_size
    tokenizer = plain.tokenizer
    while len(tokenizer) < rows:
        tokenizer.add_tokens(f"<more{len(tokenizer)}>")
    tokenizer.add_tokens(AddedToken("<image>", special=special))
    assert tokenizer.convert_tokens_to_ids("<image>") == rows
    tokenizer.save_pretrained(exported)
    loaded = load_model(str(exported))
    assert encode(loaded, "some words") == encode(plain, "some words")
    stream = Stream(loaded.model, loaded.tokenizer, budget=16)
    feeds = [lambda: stream.feed(["a", rows]), lambda: stream.feed([rows])]
    if special:  # which no text can spell
        assert rows not in encode(loaded, "an <image> here")
    else:
        feeds += [
            lambda: encode(loaded, "an <image> here"),
            lambda: stream.feed("an <image> here"),
            lambda: list(stream.score("an <image>")),
            lambda: Stream(loaded.model, loaded.tokenizer, budget=16, pinned="<image>"),
        ]
    for feed in feeds:
        with pytest.raises(UserError, match=f"the model has no id {rows} of the token '<image>'"):
            feed()
    stream.reset()
    stream.feed("and on")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "pool", "token_ids": [300]}, "a sink of kind 'pool'"),
        ({"kind": "token", "token_ids": "abc"}, "the token ids 'abc'"),
        ({"kind": "token", "token_ids": [-1]}, "token ids [-1]"),
        ({"kind": "token", "token_ids": []}, "token ids []"),
        ({"kind": "none", "token_ids": [300]}, "token ids [300]"),
    ],
)
def test_a_sink_that_is_none_of_ours_is_not_taken_for_one(exported, record, message):
    config = json.loads((exported / "config.json").read_text()) | {"sink": record}
    (exported / "config.json").write_text(json.dumps(config))
    assert message in refusal(exported)


def test_a_device_that_is_not_there(run):
    assert "device 'meta' has shapes and no numbers" in refusal(run, device="meta")
    assert "cannot be moved to device 'nowhere'" in refusal(run, device="nowhere")


# ------------------------------------------------------------------------------------------------------------ GGUF


@pytest.fixture
def gguf_file(exported, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(exported, path)
    return path


def test_a_gguf_file_is_the_model_that_was_written(exported, gguf_file):
    from_folder, from_gguf = load_model(str(exported)), load_model(str(gguf_file))
    torch.testing.assert_close(from_gguf.model(IDS).logits, from_folder.model(IDS).logits, atol=1e-4, rtol=1e-4)
    assert encode(from_gguf, tiny.words(50)) == encode(from_folder, tiny.words(50))


def test_a_package_is_searched_and_never_imported(gguf_file, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "llm_tiny").mkdir(parents=True)
    (site / "llm_tiny/__init__.py").write_text("raise SystemExit('imported')")
    (site / "llm_tiny-1.0.dist-info").mkdir()
    (site / "llm_tiny-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
    record = site / "llm_tiny-1.0.dist-info/RECORD"
    record.write_text("llm_tiny/__init__.py,,\nllm_tiny/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    assert "tiny.gguf is missing" in refusal("llm-tiny")
    gguf_file.rename(site / "llm_tiny/tiny.gguf")
    assert load_model("llm-tiny").model.config.model_type == "llama"
    assert "llm_tiny" not in sys.modules
    record.write_text(record.read_text() + "llm_tiny/other.gguf,,\n")
    assert "ships 2 .gguf files" in refusal("llm-tiny")


@pytest.mark.parametrize("kept", [0, 100, 5000, -100])
def test_a_gguf_that_is_cut_short(gguf_file, kept):
    gguf_file.write_bytes(gguf_file.read_bytes()[:kept])
    assert str(gguf_file) in refusal(gguf_file)


def write_gguf(folder, path):
    """The exported tiny Llama as GGUF, in the layout of llama.cpp: rotary pairs interleaved in q and k."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    names = {i: text for text, i in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    names |= special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    rows = range(config["vocab_size"])
    writer.add_token_list([names.get(i, f"[unused{i}]") for i in rows])
    writer.add_token_types([3 if i in special else 1 if i in names else 5 for i in rows])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    place = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, count in (("q_proj", heads), ("k_proj", groups)):
            if f"{part}.weight" in name:
                half = tensor.shape[0] // count // 2
                tensor = tensor.view(count, 2, half, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(place.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
