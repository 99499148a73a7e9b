"""Guards: no message, log or file has a token or the password of an address."""

from __future__ import annotations

import logging

import pytest

from recipes.prepare import main as prepare
from sinkmodel.console import command, say
from sinkmodel.errors import UserError
from sinkmodel.loading import load_model
from sinkmodel.secrets import all_redacted, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see http://user:PASS@host:80/x and more", "see http://***@host:80/x and more"),
        ("'https://TOKEN@host'", "'https://***@host'"),
        ("https://us'er:p@ss@host/a@b", "https://***@host/a@b"),
        ("git clone ssh://git:PASS@host/x.git", "git clone ssh://***@host/x.git"),
        ("http://h/x?a=1&X-Amz-Signature=SECRET&token=SECRET'", "http://h/x?a=1&X-Amz-Signature=***&token=***'"),
        ("http://host/x?mail=a@b me@host //a@b", "http://host/x?mail=a@b me@host //a@b"),
        ("of 'user:PASS@127.0.0.1:9' and me:p:w@my.host", "of '***@127.0.0.1:9' and ***@my.host"),
        ("user:PASS@hub:8080/x user:PASS@localhost", "***@hub:8080/x ***@localhost"),
        ("at 12:30@noon git@host.org:a/b image:1@sha256:0a C:\\a@b.c a/b:c@d.e", None),
        ("me/x of my own TOKEN@hub", "me/x of ***@hub"),
        ("Illegal header value b'Bearer hf_mine_alone'", "Illegal header value b'Bearer ***'"),
    ],
)
def test_credentials_are_taken_out_of_a_text(text, shown, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine_alone\n")
    monkeypatch.setenv("HF_ENDPOINT", "my own TOKEN@hub")
    shown = text if shown is None else shown
    assert redacted(text) == shown
    assert all_redacted({"a": [text, 1, (None, text)]}) == {"a": [shown, 1, (None, shown)]}
    assert str(UserError(text)) == shown


@pytest.mark.parametrize("endpoint", ["user:S3CRET@127.0.0.1:9", "S3CRET@hub", "me S3CRET@hub.org", "ftp://hub", ""])
def test_an_address_of_the_hub_without_its_scheme_is_one_line_without_its_secret(monkeypatch, endpoint):
    """Risk: the password is printed, and the blame goes to huggingface.co or to the network."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(UserError, match="^HF_ENDPOINT must begin with http:// or https:// and is '") as caught:
        load_model("org/name")
    assert "S3CRET" not in str(caught.value)


def test_what_commands_and_their_libraries_say_has_no_credentials(capsys, caplog):
    @command("sink-x")
    def main(argv: list[str]) -> None:
        logging.getLogger("huggingface_hub").warning("again: %s", "http://user:SECRET@host/x")
        say("at http://user:SECRET@host/x")
        raise UserError("http://user:SECRET@host cannot be reached; try again")

    before = logging.getLogRecordFactory()
    try:
        assert main([]) == 2
    finally:
        logging.setLogRecordFactory(before)
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "at http://***@host/x",
        "sink-x: http://***@host cannot be reached; try again",
    ]
    assert [record.getMessage() for record in caplog.records] == ["again: http://***@host/x"]


@pytest.mark.parametrize("token", ["hf_ünicode", "hf_two words", "hf_\x01control", "hf_\udcff"])
def test_a_token_that_no_header_can_hold_is_one_line_without_it(tmp_path, monkeypatch, capsys, token):
    """Risk: a traceback, with the token in it."""
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="the token for the Hub, from HF_TOKEN or from the login") as caught:
        load_model("org/name")
    assert token not in str(caught.value)
    (tmp_path / "a.txt").write_text("words")
    out = str(tmp_path / "out")
    for words in (
        ["--input", str(tmp_path / "a.txt"), "--tokenizer", "org/name"],
        ["--dataset", "org/name", "--vocabulary-size=300"],
    ):
        assert prepare([*words, "--output", out]) == 2
        err = capsys.readouterr().err
        assert "has a character that no token has" in err.splitlines()[-1]
        assert token not in err
        assert not (tmp_path / "out").exists()
