"""Guards: `sink-prepare` writes every token of every document, once, the same whatever disturbs it."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from recipes import prepare
from recipes.config import shipped_configs
from recipes.data import preparation, writing
from recipes.data.pipeline import Encoded, split_of
from recipes.data.settings import PrepareConfig
from recipes.data.shards import open_split
from recipes.data.tokenization import cuts_exactly
from recipes.demo.king_james import KingJames
from recipes.prepare import join_lists
from sinkmodel.text import read_documents
from sinkmodel.text_tokenizer import text_encoder
from tests import tiny
from tests.recipes.corpus import make_text, make_texts, tree, write_lines, write_tokenizer

# The command with small units, a note after each, and 5 ms a unit, so that a kill falls in the middle.
SLOWED = """
import functools, sys, time
from recipes import prepare
from recipes.data import preparation, writing
preparation.SAVE_EVERY = 0.0
preparation.make_units = functools.partial(preparation.make_units, size=4000)
write = writing.FolderWriter.write
def slow(self, encoded):
    time.sleep(0.005)
    write(self, encoded)
writing.FolderWriter.write = slow
if __name__ == "__main__":
    sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.fixture
def corpus(tmp_path):
    """300 documents in two files, one of them long and one given twice, and a tokenizer."""
    texts = [*make_texts(150, 2000), make_text(150_000, seed=5), *make_texts(149, 2000, seed=2)]
    write_lines(tmp_path / "a.jsonl", [*texts[:200], texts[0]])
    write_lines(tmp_path / "b.jsonl", texts[200:])
    write_tokenizer(tmp_path / "tokenizer.json")
    return [*texts[:200], texts[0], *texts[200:]]


def arguments(tmp_path, output="out", *more):
    argv = ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--output", str(tmp_path / output)]
    argv += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--workers", "1", "--shard-tokens", "20000"]
    return [*argv, "--validation-fraction", "0.1", "--test-fraction", "0.1", *more]


def test_every_document_is_in_its_split_once_in_order_and_ended(tmp_path, corpus):
    assert prepare.main(arguments(tmp_path)) == 0
    encoder = text_encoder((tmp_path / "tokenizer.json").read_text())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for name in ("train", "validation", "test"):
        texts = [text for text in corpus if split_of(text, 0, 0.1, 0.1) == name]
        ids = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
        stream = [token for document in ids for token in (*document, 0)]
        split = open_split(tmp_path / "out", name)
        assert (split.documents, split.tokens) == (len(texts), len(stream))
        assert split.read(0, split.tokens).tolist() == stream
        assert split.row_tokens is None
        starts, before = [], 0
        for shard in manifest["splits"][name]["shards"]:
            offsets = np.load(tmp_path / "out" / shard["file"].replace(".bin", ".offsets.npy"))
            assert len(offsets) == shard["documents"]
            starts += [before + int(offset) for offset in offsets]
            before += shard["tokens"]
        assert starts == [0, *np.cumsum([len(document) + 1 for document in ids])[:-1].tolist()]
        if name == "test":
            assert list(read_documents(tmp_path / "out" / "test.jsonl")) == texts
        if name == "train":
            assert len(manifest["splits"][name]["shards"]) > 3
            assert {shard["tokens"] for shard in manifest["splits"][name]["shards"][:-1]} == {20000}
    assert not (tmp_path / "out" / "progress.json").exists()


def test_the_bytes_do_not_depend_on_the_number_of_workers_or_the_size_of_units(tmp_path, corpus, monkeypatch):
    assert prepare.main(arguments(tmp_path, "one")) == 0
    assert prepare.main(arguments(tmp_path, "two", "--workers", "2")) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    small = preparation.make_units
    monkeypatch.setattr(preparation, "make_units", lambda *a: small(*a, size=3000))
    assert prepare.main(arguments(tmp_path, "small")) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "small")


@pytest.mark.parametrize("trained", [False, True])
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, corpus, trained, capsys):
    script = tmp_path / "slowed.py"
    script.write_text(SLOWED)
    argv = arguments(tmp_path, "killed")
    if trained:
        at = argv.index("--tokenizer")
        argv[at : at + 2] = ["--vocabulary-size", "400"]
    whole = [word if word != str(tmp_path / "killed") else str(tmp_path / "whole") for word in argv]
    assert prepare.main(whole) == 0
    draw = np.random.default_rng(trained)
    places = []
    for _ in range(4):
        process = subprocess.Popen([sys.executable, str(script), *argv], stderr=subprocess.PIPE, text=True)
        begun = recorded(tmp_path / "killed")
        while process.poll() is None and recorded(tmp_path / "killed") in (begun, None):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        places.append(recorded(tmp_path / "killed"))
        assert not (tmp_path / "killed" / "manifest.json").exists()
    assert prepare.main(argv) == 0
    assert "resuming" in capsys.readouterr().err
    assert len({json.dumps(place) for place in places}) >= 3  # killed at three places in the middle, at least
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def recorded(folder):
    try:
        return json.loads((folder / "progress.json").read_text())["place"]
    except (FileNotFoundError, NotADirectoryError):
        return None


def test_workers_end_with_a_killed_parent(tmp_path, corpus):
    script = tmp_path / "slowed.py"
    script.write_text(SLOWED)
    process = subprocess.Popen([sys.executable, str(script), *arguments(tmp_path)], stderr=subprocess.PIPE)
    while recorded(tmp_path / "out") in (None, [0, None, 0, 0]):
        time.sleep(0.01)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in children)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_run_again_on_a_complete_folder_it_says_so_and_touches_nothing(tmp_path, corpus, capsys):
    assert prepare.main(arguments(tmp_path)) == 0
    before = tree(tmp_path / "out")
    assert prepare.main(arguments(tmp_path, "out", "--workers", "2")) == 0
    assert "already complete" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / "train-00000.bin").write_bytes(b"")
    assert prepare.main(arguments(tmp_path)) == 2
    assert "train-00000.bin is cut short" in capsys.readouterr().err


def test_other_settings_or_input_on_the_same_folder_are_refused(tmp_path, corpus, capsys):
    assert prepare.main(arguments(tmp_path)) == 0
    before = tree(tmp_path / "out")
    assert prepare.main(arguments(tmp_path, "out", "--seed", "1")) == 2
    assert "was prepared with seed = 0, this command has 1" in capsys.readouterr().err
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert prepare.main(arguments(tmp_path)) == 2
    assert "was prepared from b.jsonl, which has been edited since; restore it" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_file_edited_in_place_to_the_same_size_is_another_text(tmp_path, corpus, interrupted, capsys, monkeypatch):
    if interrupted:
        with monkeypatch.context() as patched:
            interrupt_after(20_000, patched)
            assert prepare.main(arguments(tmp_path)) == 130
    else:
        assert prepare.main(arguments(tmp_path)) == 0
    before = tree(tmp_path / "out")
    assert ("progress.json" in before) == interrupted
    content = bytearray((tmp_path / "a.jsonl").read_bytes())
    at = content.index(b"king", len(content) // 2)
    content[at : at + 4] = b"duke"
    (tmp_path / "a.jsonl").write_bytes(content)
    capsys.readouterr()
    assert prepare.main(arguments(tmp_path)) == 2
    assert "was prepared from a.jsonl, which has been edited since; restore it" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, corpus, capsys):
    for name, content in (("thesis.doc", "years"), ("manifest.json", "{}"), ("progress.json", "[]")):
        (tmp_path / f"for {name}").mkdir()
        (tmp_path / f"for {name}" / name).write_text(content)
        assert prepare.main(arguments(tmp_path, f"for {name}")) == 2
        assert "already holds something else" in capsys.readouterr().err
        assert tree(tmp_path / f"for {name}") == {name: content.encode()}
    assert prepare.main(arguments(tmp_path, "a.jsonl")) == 2
    assert "is a file" in capsys.readouterr().err


def test_two_at_once_on_one_folder_are_refused(tmp_path, corpus, capsys):
    program = "import sys; from sinkmodel.locks import locked; from pathlib import Path\n"
    program += "with locked(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        assert prepare.main(arguments(tmp_path)) == 2
        other.kill()
    assert " is writing to " in capsys.readouterr().err
    assert prepare.main(arguments(tmp_path)) == 0, "the lock goes with the process that held it"


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(tmp_path, corpus, capsys, monkeypatch):
    assert prepare.main(arguments(tmp_path, "whole")) == 0
    capsys.readouterr()
    monkeypatch.setattr(preparation, "SAVE_EVERY", 0.0)
    make_units, write = preparation.make_units, writing.SplitWriter.write
    monkeypatch.setattr(preparation, "make_units", lambda *a: make_units(*a, size=30_000))
    written = 0

    def fill(self, ids):
        nonlocal written
        written += len(ids)
        if written > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, ids)

    monkeypatch.setattr(writing.SplitWriter, "write", fill)
    assert prepare.main(arguments(tmp_path)) == 2
    error = capsys.readouterr().err.strip()
    assert "no space left on device" in error
    assert "\n" not in error
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(writing.SplitWriter, "write", write)
    assert prepare.main(arguments(tmp_path)) == 0  # there is room again: it resumes
    assert "resuming" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def interrupt_after(tokens, monkeypatch):
    """Ctrl-C between two units, small ones with a note after each."""
    make_units, write = preparation.make_units, writing.FolderWriter.write

    def interrupt(self, encoded):
        if self.tokens > tokens:
            raise KeyboardInterrupt
        write(self, encoded)

    monkeypatch.setattr(preparation, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(preparation, "make_units", lambda *a: make_units(*a, size=3000))
    monkeypatch.setattr(writing.FolderWriter, "write", interrupt)


def test_ctrl_c_keeps_what_is_done(tmp_path, corpus, capsys, monkeypatch):
    assert prepare.main(arguments(tmp_path, "whole")) == 0
    with monkeypatch.context() as patched:
        interrupt_after(20_000, patched)
        assert prepare.main(arguments(tmp_path)) == 130
    assert "tokens are kept; the same command resumes from there" in capsys.readouterr().err
    assert prepare.main(arguments(tmp_path)) == 0
    assert "resuming" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@contextlib.contextmanager
def interrupted_at(moment=None):
    """Ctrl-C before the `moment`-th line that the writers run; yields the lines run so far."""
    lines = []

    def trace(frame, event, arg):
        if event == "call" and not isinstance(frame.f_locals.get("self"), (writing.FolderWriter, writing.SplitWriter)):
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) - 1 == moment:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def encode_here(units, definition, dtype, workers):
    """`encode_units` without processes: quick, and a trace sees it all."""
    encoder = text_encoder(definition)
    for unit in units:
        ids = [encoder.encode(piece.text, add_special_tokens=False).ids for piece in unit.pieces]
        yield Encoded(unit, [np.asarray(each, dtype=dtype).tobytes() for each in ids])


@pytest.mark.parametrize("notes", ["after every unit", "none"])
def test_ctrl_c_at_any_line_of_the_writers_costs_no_byte_and_doubles_none(tmp_path, notes, capsys, monkeypatch):
    write_lines(tmp_path / "a.jsonl", [*make_texts(20, 400), make_text(9000, seed=5), *make_texts(20, 400, seed=2)])
    write_tokenizer(tmp_path / "tokenizer.json")
    make_units = preparation.make_units
    monkeypatch.setattr(preparation, "SAVE_EVERY", 0.0 if notes == "after every unit" else 1e9)
    monkeypatch.setattr(preparation, "make_units", lambda sources, place, limit: make_units(sources, place, 1000, 3000))
    monkeypatch.setattr(preparation, "encode_units", encode_here)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut here

    def run(output):
        config = PrepareConfig(
            output=str(tmp_path / output),
            input=str(tmp_path / "a.jsonl"),
            tokenizer=str(tmp_path / "tokenizer.json"),
            validation_fraction=0.1,
            test_fraction=0.1,
            shard_tokens=1024,
        )
        preparation.prepare(config)

    with interrupted_at() as lines:
        run("whole")
    whole = tree(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".bin")]) > 6
    moments = []  # of each line of code, the run in the middle
    for number in sorted(set(lines)):
        runs = [moment for moment, line in enumerate(lines) if line == number]
        moments.append(runs[len(runs) // 2])
    assert len(moments) > 60
    capsys.readouterr()
    kept = 0
    for moment in moments:
        with interrupted_at(moment), pytest.raises(KeyboardInterrupt):
            run(f"at {moment}")
        resumable = "are kept; the same command resumes" in capsys.readouterr().err
        kept += resumable
        run(f"at {moment}")
        again = capsys.readouterr().err
        assert not resumable or "resuming" in again or "already complete" in again
        assert tree(tmp_path / f"at {moment}") == whole, moment
    assert (kept > 40) == (notes == "after every unit")


def test_the_split_does_not_depend_on_the_tokenizer(tmp_path):
    """Else the test documents of one tokenizer are train documents of another."""
    texts = [*make_texts(60, 35_000), *(f"{number} " + "xy" * 20_000 for number in range(20))]
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "b.jsonl", make_texts(20, 100, seed=1))
    plain = Tokenizer.from_file(str(write_tokenizer(tmp_path / "tokenizer.json")))
    assert prepare.main(arguments(tmp_path, "one")) == 0
    assert cuts_exactly(plain.to_str())
    plain.normalizer = normalizers.Prepend("_")
    plain.save(str(tmp_path / "tokenizer.json"))
    assert not cuts_exactly(plain.to_str())
    assert prepare.main(arguments(tmp_path, "other")) == 0
    one, other = (list(read_documents(tmp_path / name / "test.jsonl")) for name in ("one", "other"))
    assert one == other
    assert len(one) > 4
    assert max(map(len, one)) > 1 << 15
    for split in ("train", "validation"):
        assert open_split(tmp_path / "one", split).documents == open_split(tmp_path / "other", split).documents


class Hub:
    """Takes the place of `datasets.load_dataset_builder`: a Hub with one data set, a folder for each commit."""

    def __init__(self, commits):
        import datasets  # now that the test has set the folder of its cache

        self.commits, self.newest, self.load = commits, next(iter(commits)), datasets.load_dataset_builder

    def __call__(self, name, config=None, revision=None):
        if self.newest is None:
            raise ConnectionError("offline")
        commit = revision or self.newest
        builder = self.load(str(self.commits[commit]))
        builder.hash = commit
        return builder


def test_a_hub_data_set_is_read_to_its_end_as_it_was_when_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    commits = {"a" * 40: tmp_path / "old", "b" * 40: tmp_path / "new"}
    for seed, folder in enumerate(commits.values()):
        folder.mkdir()
        write_lines(folder / "train.jsonl", make_texts(100, 2000, seed))
    hub = Hub(commits)
    monkeypatch.setattr("datasets.load_dataset_builder", hub)
    write_tokenizer(tmp_path / "tokenizer.json")

    def argv(output):
        return ["--dataset", "org/set", *arguments(tmp_path, output)[3:]]

    assert prepare.main(argv("whole")) == 0
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["source"] == f"org/set@{'a' * 40} train"
    assert manifest["settings"]["sources"][0]["revision"] == "a" * 40
    with monkeypatch.context() as patched:
        interrupt_after(20_000, patched)
        assert prepare.main(argv("out")) == 130
    hub.newest = "b" * 40
    capsys.readouterr()
    assert prepare.main(argv("out")) == 0
    assert "resuming" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert prepare.main(argv("since")) == 0  # what is begun now has the newest
    assert json.loads((tmp_path / "since" / "manifest.json").read_text())["source"] == f"org/set@{'b' * 40} train"
    assert tree(tmp_path / "since")["train-00000.bin"] != tree(tmp_path / "out")["train-00000.bin"]
    hub.newest = None
    assert prepare.main(argv("out")) == 0  # complete: no network is needed to say so
    assert prepare.main(argv("later")) == 2
    assert "data set org/set (config None, split train) cannot be opened: offline" in capsys.readouterr().err
    assert not (tmp_path / "later").exists()


def test_where_the_system_does_not_tell_our_cores_all_are_taken(tmp_path, corpus, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    argv = arguments(tmp_path)
    del argv[argv.index("--workers") : argv.index("--workers") + 2]
    assert prepare.main(argv) == 0


def test_without_arguments_it_says_what_to_give(capsys):
    assert prepare.main([]) == 2
    assert "output is missing; name the folder to make, as in --output data/books" in capsys.readouterr().err


def test_bad_text_half_way_leaves_nothing_behind(tmp_path, corpus, capsys):
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    assert prepare.main(arguments(tmp_path)) == 2
    error = capsys.readouterr().err.strip()
    assert "b.jsonl is not UTF-8 in line 2" in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_sink_in_the_text_is_text(tmp_path):
    write_lines(tmp_path / "a.jsonl", [f"{text} <|sink|><|endoftext|><|padding|>" for text in make_texts(20, 300)])
    write_lines(tmp_path / "b.jsonl", ["more"])
    write_tokenizer(tmp_path / "tokenizer.json")
    assert prepare.main(arguments(tmp_path)) == 0
    split = open_split(tmp_path / "out", "train")
    tokens = split.read(0, split.tokens)
    assert split.documents > 10
    assert (tokens == 0).sum() == split.documents  # the end of text is at the ends of documents and in no other place
    assert not (tokens == 1).any()


def test_held_out_files_are_held_out_whole(tmp_path, corpus):
    write_lines(tmp_path / "v.jsonl", make_texts(4, 100, seed=8))
    argv = arguments(tmp_path, "out", "--validation-input", str(tmp_path / "v.jsonl"))
    del argv[argv.index("--validation-fraction") : argv.index("--validation-fraction") + 2]
    assert prepare.main(argv) == 0
    assert open_split(tmp_path / "out", "validation").documents == 4
    assert open_split(tmp_path / "out", "train").documents + open_split(tmp_path / "out", "test").documents == 301


def test_an_empty_validation_split_is_said_in_one_line(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", make_texts(3, 300))
    write_lines(tmp_path / "b.jsonl", make_texts(2, 300))
    write_tokenizer(tmp_path / "tokenizer.json")
    argv = arguments(tmp_path)
    argv[argv.index("--validation-fraction") + 1] = argv[argv.index("--test-fraction") + 1] = "0.001"
    assert prepare.main(argv) == 0
    assert "the validation split got no document; raise validation_fraction" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_shorter_than_a_usual_row_is_said(tmp_path, split, capsys):
    """Risk: the first to say so is the training that waited for it."""
    sizes = {"train": 9000, "validation": 9000} | {split: 300}
    for name, size in sizes.items():
        write_lines(tmp_path / f"{name}.jsonl", make_texts(1, size))
    write_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--input", str(tmp_path / "train.jsonl"), "--validation-input", str(tmp_path / "validation.jsonl")]
    argv += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--test-fraction", "0", "--output", str(tmp_path / "out")]
    assert prepare.main(argv) == 0
    assert open_split(tmp_path / "out", split).tokens <= 2048
    (line,) = capsys.readouterr().err.splitlines()
    remedy = {"train": "give more text", "validation": "give more validation_input"}[split]
    assert re.match(rf"sink-prepare: the {split} split has \d+ .* less than one row of .* = 2,048; {remedy}, or", line)
    if split == "validation":  # what is advised must be possible
        argv[argv.index("--validation-input") : argv.index("--validation-input") + 2] = ["--validation-fraction", "0.5"]
        argv[argv.index("--input") + 1] = str(tmp_path / "short.jsonl")
        write_lines(tmp_path / "short.jsonl", make_texts(8, 300))
        assert prepare.main([*argv, "--output", str(tmp_path / "shared")]) == 0
        assert "; raise validation_fraction, or give more text, or" in capsys.readouterr().err


def test_a_large_vocabulary_takes_four_bytes(tmp_path, corpus):
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"filler {n}": n for n in range(len(content["model"]["vocab"]), 66_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert prepare.main(arguments(tmp_path)) == 0
    split = open_split(tmp_path / "out", "test")
    assert (split.dtype, split.vocabulary) == ("uint32", 66_000)
    assert (tmp_path / "out" / "test-00000.bin").stat().st_size == 4 * min(split.tokens, 20_000)
    assert (split.read(0, split.tokens) == 0).sum() == split.documents


def test_the_tokenizer_of_a_model_encodes_text_alone(tmp_path, corpus):
    """Risk: `<s>` is in front of each document in the shards, or the same command cannot resume."""
    tokenizer = tiny.sentencepiece().backend()
    model = tmp_path / "model"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(model)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "<s> a king</s> \u5929"}) + "\n")
    argv = arguments(tmp_path)
    argv[argv.index("--tokenizer") + 1] = str(model)
    assert prepare.main(argv) == 0
    assert prepare.main(argv) == 0
    first = open_split(tmp_path / "out", split_of("<s> a king</s> \u5929", 0, 0.1, 0.1)).read(0, 20).tolist()
    ids = first[: first.index(2)]
    assert tokenizer.decode(ids) == "<s> a king</s> \u5929", "what looks like a special token is text"
    assert 1 not in ids


WRONG = {
    "no input": ([], "give either --input FILE… or --dataset NAME"),
    "no tokenizer": (["--input", "a.txt"], "give either --tokenizer"),
    "both": (["--input", "a.txt", "--dataset", "kjv", "--vocabulary-size", "400"], "give either --input"),
    "tiny vocabulary": (["--input", "a.txt", "--vocabulary-size", "100"], "at least 258"),
    "fraction": (["--input", "a.txt", "--vocabulary-size", "400", "--test-fraction", "1.5"], "test_fraction is 1.5"),
    "nothing left": (
        ["--input", "a.txt", "--vocabulary-size", "400", "--test-fraction", "0.5", "--validation-fraction", "0.5"],
        "leave nothing to train on",
    ),
    "two validations": (
        ["--input", "a.txt", "--vocabulary-size", "400", "--validation-fraction", "0.1", "--validation-input", "v.txt"],
        "give one of validation_fraction, validation_input",
    ),
    "workers": (["--input", "a.txt", "--vocabulary-size", "400", "--workers", "0"], "workers is 0"),
    "wrong type": (["--input", "a.txt", "--vocabulary-size", "many"], "vocabulary_size"),
    "unknown": (["--imput", "a.txt"], "did you mean '--input'?"),
    "missing file": (["--input", "nowhere.txt", "--vocabulary-size", "400"], "nowhere.txt does not exist"),
    "same text": (["--input", "a.txt", "--test-input", "a.txt", "--vocabulary-size", "400"], "is given as input and"),
    "an unset variable": (["--input", "", "--vocabulary-size", "400"], "input is empty; give a name"),
    "one of two unset": (["--input", "a.txt", "", "--vocabulary-size", "400"], "input is empty; give a name"),
    "nothing given": (["--input", "--vocabulary-size", "400"], "input is empty; give a name"),
    "nothing after =": (["--input=", "--vocabulary-size", "400"], "input is empty; give a name"),
    "no validation name": (
        ["--input", "a.txt", "--validation-input", "", "--vocabulary-size", "400"],
        "validation_input is empty; give a name, or leave --validation-input out",
    ),
    "no test name": (["--input", "a.txt", "--test-input=", "--vocabulary-size", "400"], "test_input is empty"),
    "no data set": (["--dataset", "", "--vocabulary-size", "400"], "dataset is empty"),
    "no tokenizer name": (["--input", "a.txt", "--tokenizer", ""], "tokenizer is empty"),
    "index": (["--input", "a.idx", "--vocabulary-size", "400"], "give the --tokenizer that they were made with"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_make_no_folder(tmp_path, case, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(make_text(1000))
    argv, message = WRONG[case]
    assert prepare.main([*argv, "--output", "out"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_lists_are_given_as_people_type_them():
    argv = ["--input", "a.txt", "b c.txt", "--seed", "3", "--input=d,e.txt", "--config", "x.yaml"]
    assert join_lists(argv) == ["--seed", "3", "--config", "x.yaml", '--input=["a.txt", "b c.txt", "d,e.txt"]']


@pytest.mark.parametrize("path", sorted((shipped_configs() / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_data_config_is_complete(path):
    config = PrepareConfig(output="out", **yaml.safe_load(path.read_text()))
    assert config.dataset


def test_the_demo_holds_out_books_that_are_long_enough_to_stream():
    """Read: at least 5,000 tokens, of more than four characters each."""
    config = PrepareConfig(output="out", **yaml.safe_load((shipped_configs() / "data" / "kjv.yaml").read_text()))
    books = ["".join(chunks) for _, chunks in KingJames().documents()]
    splits = [split_of(book, config.seed, *config.fractions) for book in books]
    assert (splits.count("validation"), splits.count("test")) == (4, 4)
    assert min(len(book) for book, split in zip(books, splits) if split == "validation") > 5_000
    assert min(len(book) for book, split in zip(books, splits) if split == "test") > 25_000


MEASURE = """
import functools, resource, sys
from recipes import prepare
from recipes.data import preparation
preparation.PIECE = 4000
preparation.make_units = functools.partial(preparation.make_units, size=20000)
if __name__ == "__main__":
    code = prepare.main(sys.argv[1:])
    # not ru_maxrss of the process itself, which counts what it was forked from
    own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    sys.exit(code)
"""


@pytest.mark.parametrize("kind", ["one text file", "many lines"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, kind):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    write_tokenizer(tmp_path / "tokenizer.json")
    part = make_text(1_000_000)
    peaks = []
    for size in (3, 15):
        if kind == "one text file":
            source = tmp_path / f"{size}.txt"
            source.write_text(part * size, encoding="utf-8")
        else:
            source = write_lines(tmp_path / f"{size}.jsonl", [part[i : i + 5000] for i in range(0, 10**6, 5000)] * size)
        argv = ["--input", str(source), "--tokenizer", str(tmp_path / "tokenizer.json"), "--workers", "1"]
        argv += ["--output", str(tmp_path / f"out{size}"), "--validation-fraction", "0", "--test-fraction", "0"]
        run = subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True, check=True)
        peaks.append([int(kilobytes) / 1024 for kilobytes in run.stdout.splitlines()[-1].split()])
    (parent, worker), (parent_5, worker_5) = peaks
    assert 20 < parent_5 < parent + 6, peaks  # 12 MB more text
    assert 20 < worker_5 < worker + 6, peaks
