"""Guards `sink-eval ppl`: which tokens are scored, which rows come, and one line for everything a user gets wrong."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from eval.cli import main
from eval.measures.statistics import block_stderr, by_position, mean
from eval.policies.caches import Dense, Streaming
from eval.policies.choice import choose
from eval.policies.options import check
from eval.policies.recompute import Recompute
from sinkmodel.errors import UserError
from sinkmodel.export import export
from sinkmodel.loading import encode, load_model
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.eval.test_policies import slow_recompute
from tests.reference import streaming_nll as reference

BUDGET, TOKENS = 24, 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folders of a vanilla and a sink model of each family."""
    folders = {}
    for family in ("gpt_neox", "llama"):
        for sink in (SinkConfig("none"), SinkConfig("token", 2)):
            folder = tmp_path_factory.mktemp(family)
            tiny.checkpoint(folder, family, sink)
            folders[family, sink.tokens] = folder
    return folders


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("<|sink|> " + tiny.words(200))
    return path


def ppl(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["ppl", *map(str, arguments)])
    return (code, *capsys.readouterr())


def rows_of(capsys, tmp_path, *arguments) -> dict:
    code, _, err = ppl(capsys, *arguments, "--json", tmp_path / "out.json")
    assert code == 0, err
    return json.loads((tmp_path / "out.json").read_text())


# ------------------------------------------------------------------------------------------------- what is scored


def test_a_stranger_with_a_token_of_its_own_in_front_is_measured_with_it(runs, book, tmp_path, capsys):
    """The same model without our record: the same numbers, and a message states it."""
    ours, theirs = export(runs["llama", 2], tmp_path / "ours"), export(runs["llama", 2], tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    del config["sink"]
    (theirs / "config.json").write_text(json.dumps(config))
    arguments = ("--text", book, "--tokens", TOKENS, "--budget", BUDGET, "--sinks", 0, 1, 3)
    rows = [rows_of(capsys, tmp_path, "--model", folder, *arguments)["rows"] for folder in (ours, theirs)]
    assert [row["nll"] for row in rows[0]] == [row["nll"] for row in rows[1]]
    _, out, err = ppl(capsys, "--model", theirs, *arguments)
    assert "its tokenizer puts <|sink|> <|sink2|> in front of every text" in err
    assert "<|sink|> <|sink2|> in front" in " ".join(out.split())


@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_rows_are_the_means_of_a_stream_fed_token_by_token(runs, book, tmp_path, capsys, family, sink_tokens):
    """The sinks come on top of --tokens; they and the first text token are never scored; overflow begins at p = C."""
    run = runs[family, sink_tokens]
    result = rows_of(capsys, tmp_path, "--model", run, "--text", book, "--tokens", TOKENS, "--budget", BUDGET,
                     "--policies", "dense", "window", "sink", "--sinks", 0, 1, 3, "--chunk", 7)  # fmt: skip
    loaded = load_model(str(run))
    ids = loaded.sink_ids + encode(loaded, book.read_text())[:TOKENS]
    assert len(loaded.sink_ids) == sink_tokens == sum(token >= tiny.tokenizer().vocabulary for token in ids)
    assert [(row["policy"], row["sinks"], row["window"], row["keys_seen"]) for row in result["rows"]] == [
        ("dense", 0, None, TOKENS + sink_tokens - 1),
        ("window", 0, BUDGET, BUDGET),
        ("sink", 1, BUDGET - 1, BUDGET),
        ("sink", 3, BUDGET - 3, BUDGET),
    ]
    for row in result["rows"]:
        losses = reference(loaded.model, ids, row["budget"] or 1000, row["sinks"])
        targets = {p: ids[p + 1] for p in range(sink_tokens, len(ids) - 1)}  # place of the query -> what it predicts
        assert list(targets.values()) == ids[sink_tokens + 1 :], "x1 … x(N-1)"
        after = [p for p in targets if p >= BUDGET]
        assert row["tokens"] == TOKENS - 1 == len(targets)
        assert row["tokens_after_overflow"] == len(after)
        assert row["nll"] == pytest.approx(losses[list(targets)].mean().item(), abs=1e-4)
        assert row["nll_after_overflow"] == pytest.approx(losses[after].mean().item(), abs=1e-4)
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
        assert row["ppl_after_overflow"] == pytest.approx(math.exp(row["nll_after_overflow"]))
        first, last, _ = zip(*row["by_position"])
        assert (first[0], last[-1]) == (sink_tokens, len(ids) - 2)
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] > 10**7
    assert len({row["nll_after_overflow"] for row in result["rows"]}) == 4, "else the rows above prove little"
    assert (result["command"], result["model"]) == ("ppl", str(run))


def test_documents_of_all_files_are_pooled(runs, book, tmp_path, capsys):
    """Guards .jsonl, --documents, documents too short for the budget, and the mean over tokens, not documents."""
    texts = [tiny.words(60, seed=1), "short", tiny.words(30, seed=2), tiny.words(50, seed=3)]
    jsonl = tmp_path / "many.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = runs["llama", 2]
    code, out, err = ppl(capsys, "--model", run, "--text", jsonl, book, "--budget", BUDGET, "--sinks", 1,
                         "--tokens", 70, "--documents", 2, "--json", tmp_path / "out.json")  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["rows"]
    loaded = load_model(str(run))
    documents = [encode(loaded, text)[:70] for text in (texts[0], texts[2], book.read_text())]
    assert [text["documents"] for text in result["texts"]] == [2, 1]
    assert [text["tokens"] for text in result["texts"]] == [len(documents[0]) + len(documents[1]), len(documents[2])]
    losses = [reference(loaded.model, loaded.sink_ids + ids, BUDGET, 1)[2:] for ids in documents]
    assert row["nll"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert row["documents"] == 3
    assert "left out 1 documents with fewer tokens than --budget 24" in err
    assert "sink 1+23" in out
    assert str(BUDGET) in out


def test_tokens_beyond_the_text_are_said_once_and_nothing_after_overflow_is_null(runs, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(tiny.words(30))
    run = runs["gpt_neox", 0]
    count = len(encode(load_model(str(run)), text.read_text()))
    code, _, err = ppl(capsys, "--model", run, "--text", text, "--budget", count, "--tokens", count + 5,
                         "--sinks", 0, 1, "--json", tmp_path / "o.json")  # fmt: skip
    assert code == 0
    assert err.count(f"fewer than --tokens {count + 5}") == 1
    for row in json.loads((tmp_path / "o.json").read_text())["rows"]:
        assert row["tokens"] == count - 1
        assert [row[key] for key in ("nll_after_overflow", "ppl_after_overflow", "stderr_after_overflow")] == [None] * 3
        assert row["stderr"] is None, "one block has no spread"


def test_dense_beyond_the_positions_is_a_row_and_is_said(runs, book, tmp_path, capsys):
    arguments = ["--model", runs["llama", 0], "--text", book, "--budget", BUDGET, "--policies", "dense"]
    code, _, err = ppl(capsys, *arguments, "--tokens", 140, "--json", tmp_path / "o.json")
    assert code == 0
    assert "was made for 128 positions" in err
    assert "--tokens 129 stays within" in err
    assert json.loads((tmp_path / "o.json").read_text())["rows"][0]["tokens"] == 139
    assert "positions" not in ppl(capsys, *arguments, "--tokens", 129)[2]


def test_recompute_and_the_papers_convention_are_rows_that_say_what_a_query_saw(runs, book, tmp_path, capsys):
    """Guards that the model's own sinks stand in front of every window that is read again, counted in C."""
    run = runs["llama", 2]
    policies = ["--policies", "window-paper", "recompute", "sink-paper", "--sinks", 3]
    for stride, keys in ((1, "24"), (5, "20–24")):
        code, out, err = ppl(capsys, "--model", run, "--text", book, "--tokens", TOKENS, "--budget", BUDGET,
                             *policies, "--stride", stride, "--json", tmp_path / f"{stride}.json")  # fmt: skip
        assert code == 0, err
        label = "recompute 2+22" if stride == 1 else "recompute 2+22, stride 5"
        (line,) = [line for line in out.splitlines() if label in line]
        assert line.split(label)[1].split()[0] == keys
    loaded = load_model(str(run))
    ids = loaded.sink_ids + encode(loaded, book.read_text())[:TOKENS]
    for stride in (1, 5):
        paper, again, sink = json.loads((tmp_path / f"{stride}.json").read_text())["rows"]
        assert [(row["policy"], row["sinks"], row["budget"], row["keys_seen"]) for row in (paper, again, sink)] == [
            ("window-paper", 0, BUDGET, BUDGET + 1),
            ("recompute", 2, BUDGET, BUDGET),
            ("sink-paper", 3, BUDGET, BUDGET + 1),
        ]
        assert (again["stride"], again["keys_seen_least"]) == (stride, BUDGET - stride + 1)
        expected = slow_recompute(loaded.model, ids, BUDGET, 2, stride)
        assert again["nll_after_overflow"] == pytest.approx(expected[BUDGET:].mean().item(), abs=1e-4)
        for row in (paper, sink):
            expected = reference(loaded.model, ids, BUDGET + 1, row["sinks"])[2:]
            assert row["nll"] == pytest.approx(expected.mean().item(), abs=1e-4)


def test_a_stride_that_leaves_no_room_for_the_models_sinks_is_one_line(runs, book, capsys):
    arguments = ["--model", runs["llama", 2], "--text", book, "--policies", "recompute", "--sinks", 0]
    code, _, err = ppl(capsys, *arguments, "--budget", BUDGET, "--stride", BUDGET - 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "does not fit into a window of 22 tokens after the model's 2 sink tokens; use 22 or less" in err
    code, _, err = ppl(capsys, *arguments, "--budget", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "--budget 2 leaves no window after the model's 2 sink tokens; make it at least 3" in err


# ------------------------------------------------------------------------------------------------- rows and numbers


def test_which_policies_become_rows():
    window, one, four = Streaming("window", 0, 8), Streaming("sink", 1, 8), Streaming("sink", 4, 8)
    assert choose(None, [0, 1, 4], 8) == [window, one, four]
    assert choose(None, [1, 4], 8) == [one, four]
    assert choose(["window"], [1, 4], 8) == [window]
    assert choose(["sink"], [0, 1, 1], 8) == [Streaming("sink", 0, 8), one]
    assert choose(["sink", "window"], [0, 4], 8) == [four, window]
    assert [type(policy) for policy in choose(["dense"], [0], 8)] == [Dense]
    assert choose(["recompute"], [0, 4], 8, front=1, stride=3) == [Recompute(1, 8, 3)]
    assert choose(["window-paper", "sink", "sink-paper"], [0, 1], 8) == [
        Streaming("window-paper", 0, 8, "paper"),
        Streaming("sink", 0, 8),
        one,
        Streaming("sink-paper", 1, 8, "paper"),
    ]
    assert choose(None, [7], 8)[0].window == 1
    with pytest.raises(UserError, match="make the budget at least 9"):
        check([0, 8], 8)


def test_the_mean_is_over_tokens_and_the_error_over_whole_blocks():
    parts = [torch.tensor([1.0, 3.0, 5.0, 7.0, 100.0]), torch.tensor([4.0, 4.0, 9.0])]
    assert mean(parts) == 133 / 8
    # Blocks of two: 2, 6 and 4; the 100 and the 9 are left over. Their standard deviation is 2.
    assert block_stderr(parts, 2) == pytest.approx(2 / math.sqrt(3))
    assert block_stderr(parts, 5) is None
    assert mean([]) is mean([torch.empty(0)]) is None


def test_positions_are_binned_by_the_place_of_the_query():
    parts = [(1, torch.tensor([1.0, 2.0, 3.0, 4.0])), (1, torch.tensor([3.0]))]
    assert by_position(parts) == [(1, 1, 2.0), (2, 2, 2.0), (3, 3, 3.0), (4, 4, 4.0)]
    assert by_position(parts, bins=2) == [(0, 2, 2.0), (3, 4, 3.5)]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "book.pdf").write_text(tiny.words(100))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budget", 4, "--sinks", 1, 4], "--budget 4 does not hold --sinks 4"),
        (["--budget", 0], "--budget"),
        (["--sinks", -1], "--sinks"),
        (["--tokens", 10], "--tokens 10 does not fill --budget 24"),
        (["--tokens", "many"], "--tokens"),
        (["--text", "BAD/short.txt"], "short.txt is shorter than the budget: its longest document has"),
        (["--text", "BAD/empty.txt"], "empty.txt"),
        (["--text", "BAD/latin.txt"], "latin.txt is not UTF-8"),
        (["--text", "BAD/none.txt"], "none.txt does not exist"),
        (["--text", "BAD/folder"], "folder is a folder"),
        (["--text", "BAD/book.pdf"], "book.pdf"),
        (["--model", "BAD/none"], "none is not a folder"),
        (["--model", "BAD/folder"], "no config.json"),
        (["--json", "BAD/none/out.json"], "none does not exist"),
        (["--json", "BAD/folder"], "is a folder"),
        (["--budget", 129, "--sinks", 1, "--tokens", 140], "sink 1.128 takes 129 positions .* use --budget 128"),
        (["--policies", "snapkv"], "snapkv"),
        (["--stride", 2], "--stride is only for recompute"),
        (["--policies", "recompute", "--stride", 25], "--stride 25 does not fit into a window of 24 tokens; use 24"),
        (["--policies", "recompute", "--stride", 0], "--stride"),
        (["--policies", "sink-paper", "--budget", 128, "--sinks", 1, "--tokens", 140], "129 positions .* --budget 127"),
        (["--dtype", "int3"], "int3"),
        (["--budgt", 4], "unknown option --budgt; did you mean --budget?"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(runs, book, bad, capsys, changes, message):
    base = {"--model": [runs["llama", 0]], "--text": [book], "--budget": [BUDGET], "--json": [bad / "out.json"]}
    given = [str(part).replace("BAD", str(bad)) for part in changes]
    for i in range(len(given)):
        base.pop(given[i], None)
    before = sorted(bad.rglob("*"))
    code, out, err = ppl(capsys, *given, *(part for key, values in base.items() for part in (key, *values)))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("sink-eval: ")
    assert re.search(message, err), err
    assert sorted(bad.rglob("*")) == before


def test_a_model_that_cannot_be_streamed_leaves_no_file(bad, book, tmp_path, capsys):
    from transformers import FalconConfig, FalconForCausalLM

    from sinkmodel.tokenizer import load_tokenizer

    folder = tmp_path / "falcon"
    FalconForCausalLM(
        FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ).save_pretrained(folder)
    load_tokenizer(tiny.tokenizer(), SinkConfig("none"), 128).save_pretrained(folder)
    capsys.readouterr()
    code, _, err = ppl(capsys, "--model", folder, "--text", book, "--budget", BUDGET, "--json", tmp_path / "o.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "'falcon'" in err
    assert not (tmp_path / "o.json").exists()


def test_help_is_quick_and_has_an_example(capsys):
    for arguments in (["--help"], ["ppl", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "example: sink-eval ppl --model" in " ".join(capsys.readouterr().out.split())
    assert main(["pppl"]) == 2
    assert main([]) == 2
