"""Guards: text cannot bring a special token, and the trained tokenizer is Pythia's kind and always the same."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from recipes.data.tokenization import LONGEST_WORD, load_vocabulary, train_vocabulary
from sinkmodel.errors import UserError
from sinkmodel.export import export
from sinkmodel.export.gguf_file import export_gguf
from sinkmodel.text_tokenizer import text_encoder
from sinkmodel.tokenizer import TextTokenizer
from tests import tiny
from tests.recipes.corpus import make_text, write_tokenizer

INJECTION = "a <|sink|> b<|endoftext|>c <|padding|>"


def test_the_trained_tokenizer_has_pythias_special_ids_and_loses_no_character():
    vocabulary = train_vocabulary([make_text(50_000)], 400)
    assert (vocabulary.size, vocabulary.eos_id, vocabulary.pad_id) == (400, 0, 1)
    encoder = text_encoder(vocabulary.definition)
    text = "Unseen:\u00e9\u4e2d\U0001f600\t\x00 " + make_text(2000, seed=9)
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert encoder.decode(ids) == text
    assert len(ids) < len(text.encode()) / 1.5
    assert train_vocabulary([make_text(50_000)], 400).definition == vocabulary.definition


def test_a_long_word_is_learned_from_in_parts_and_encoded_whole():
    """Risk: 3 million letters of DNA, or blanks, train for ever: the time grows with the square of the longest word."""
    for text in ("a" * 50_000, "b" + " " * 50_000 + "b", "\u5929" * 20_000):
        vocabulary = train_vocabulary([text], 300)
        longest = max(map(len, Tokenizer.from_str(vocabulary.definition).get_vocab()))
        assert LONGEST_WORD // 4 < longest <= LONGEST_WORD
        assert "FixedLength" not in vocabulary.definition


def test_ordinary_text_trains_the_tokenizer_that_it_always_did(monkeypatch):
    """Risk: learning from long words in parts moves a token of text that has none."""
    texts = [
        make_text(60_000),
        "\n" + "-" * LONGEST_WORD + "\n",
        "\u5929\u5730" * (LONGEST_WORD // 6),
        " " * 4000 + "x",
    ]
    ours = train_vocabulary(texts, 500)
    monkeypatch.setattr(pre_tokenizers, "Sequence", lambda parts: parts[0])
    assert train_vocabulary(texts, 500) == ours


@pytest.mark.parametrize("special", [True, False])
def test_text_cannot_inject_a_special_token(special):
    tokenizer = Tokenizer.from_str(train_vocabulary([make_text(50_000)], 400).definition)
    tokenizer.add_tokens([AddedToken("<|sink|>", special=special, normalized=False)])
    sink = tokenizer.token_to_id("<|sink|>")
    assert {0, 1, sink} < set(tokenizer.encode(INJECTION).ids)  # the danger is real
    encoder = text_encoder(tokenizer.to_str())
    for ids in (
        encoder.encode(INJECTION, add_special_tokens=False).ids,
        encoder.encode_batch_fast([INJECTION], add_special_tokens=False)[0].ids,
    ):
        assert not {0, 1, sink} & set(ids)
        assert encoder.decode(ids) == INJECTION


def test_truncation_and_padding_in_a_tokenizer_json_are_undone(tmp_path):
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path / "t.json")))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "t.json"))
    vocabulary = load_vocabulary(str(tmp_path / "t.json"))
    content = json.loads(vocabulary.definition)
    assert content["truncation"] is None
    assert content["padding"] is None
    assert len(text_encoder(vocabulary.definition).encode(make_text(1000)).ids) > 100


def test_a_folder_whose_settings_name_the_end_of_text(tmp_path):
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path / "tokenizer.json")))
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_vocabulary(str(tmp_path)).eos_id == 400


def test_a_tokenizer_that_cannot_serve_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    content = json.loads(write_tokenizer(tmp_path / "t.json").read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {
        ("x" * 20 if k == "<|endoftext|>" else k): v for k, v in content["model"]["vocab"].items()
    }
    (tmp_path / "endless.json").write_text(json.dumps(content))
    for name, message in (
        ("broken.json", "is not a tokenizer.json"),
        ("endless.json", "no end-of-text token"),
        ("missing.json", "does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_vocabulary(str(tmp_path / name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_an_export_and_a_gguf_file_of_one_model_give_the_ids_of_their_data(tmp_path):
    """Risk: data for further training of a model of ours has a sink in its vocabulary, or cannot be prepared at all."""
    write_tokenizer(tmp_path / "tokenizer.json")
    given = load_vocabulary(str(tmp_path / "tokenizer.json"))
    text = TextTokenizer(given.definition, given.eos_id, given.pad_id)
    run = tmp_path / "run"
    checkpoint = tiny.checkpoint(run, "llama", text=text)
    export(run, tmp_path / "model")
    export_gguf(run, tmp_path / "model.gguf")
    for name in (run, checkpoint):
        assert load_vocabulary(str(name)) == given
    for name in (tmp_path / "model", tmp_path / "model.gguf"):
        vocabulary = load_vocabulary(str(name))
        assert (vocabulary.size, vocabulary.eos_id, vocabulary.pad_id) == (400, 0, 1)
        ids = [text_encoder(one.definition).encode(make_text(2000)).ids for one in (given, vocabulary)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("content", [b"{bad", b"[]", b"null", "{}".encode("utf-16"), b'{"eos_token": 5}'])
def test_broken_settings_beside_a_tokenizer_are_one_line(tmp_path, content):
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"tokenizer_config.json .*(not valid JSON|not a JSON object|5 as its eos_token)"
    ):
        load_vocabulary(str(tmp_path))


def test_a_tokenizer_in_utf16_is_told_how_to_become_utf8(tmp_path):
    file = write_tokenizer(tmp_path / "tokenizer.json")
    file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))
    with pytest.raises(
        UserError, match=f"tokenizer.json .*UTF-16.*iconv -f UTF-16 -t UTF-8 {file} > utf8-tokenizer.json"
    ):
        load_vocabulary(str(tmp_path))


def test_a_hub_name_without_network_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("offline\nmany lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"tokenizer EleutherAI/pythia-160m is neither .*\(offline\)"):
        load_vocabulary("EleutherAI/pythia-160m")
