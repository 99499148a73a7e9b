"""Guards: text cannot bring a special token, and the trained tokenizer is Pythia's kind and always the same."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer

from recipes.data.tokenization import load_vocabulary, text_encoder, train_vocabulary
from sinkmodel.errors import UserError
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
    sunk = Tokenizer.from_file(str(tmp_path / "t.json"))
    sunk.add_special_tokens(["<|sink|>"])
    sunk.save(str(tmp_path / "sunk.json"))
    for name, message in (
        ("broken.json", "is no tokenizer.json"),
        ("endless.json", "no end-of-text token"),
        ("missing.json", "does not exist"),
        ("sunk.json", "has a <|sink|> already"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_vocabulary(str(tmp_path / name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_hub_name_without_network_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("offline\nmany lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"tokenizer EleutherAI/pythia-160m is neither .*\(offline\)"):
        load_vocabulary("EleutherAI/pythia-160m")
