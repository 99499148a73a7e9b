"""Risks: a command that fails because of what its output goes to, after the work is done or before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sinkmodel.console import command, put, say
from sinkmodel.files import read_json, write_json
from tests import tiny
from tests.test_house import ROOT

SCRIPTS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint and a text."""
    folder = tmp_path_factory.mktemp("console")
    tiny.checkpoint(folder / "run")
    (folder / "text.txt").write_text("“≥ é” " + tiny.words(60), encoding="utf-8")
    return folder


PPL = "sink-eval ppl --model run --text text.txt --budget 8 --tokens 30 --policies sink --json ppl.json"
STREAM = "sink-stream --model run --max-tokens 4 --save stream"


def shell(line: str, place: Path, **environment: str) -> subprocess.CompletedProcess:
    """A line of bash; its exit code is that of its first command."""
    everything = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}", **environment}
    script = f"rm -f ppl.json stream; {line}\nexit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", script], capture_output=True, cwd=place, env=everything)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_our_characters_costs_neither_the_table_nor_the_result(place, encoding):
    done = shell(PPL, place, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "nll ?C" in done.stdout.decode(encoding)
    assert (place / "ppl.json").exists()


def test_text_in_a_locale_without_utf8_is_read_and_written_as_utf8(place):
    c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell("sink-stream --model run --max-tokens 0 --system 'é≥' --save stream < text.txt", place, **c)
    assert done.returncode == 0, done.stderr
    text = "é≥" + (place / "text.txt").read_text(encoding="utf-8")
    tokens = 1 + len(tiny.tokenizer().backend().encode("é≥").ids) + len(tiny.tokenizer().backend().encode(text[2:]).ids)
    assert f"saved the stream after {tokens} tokens" in done.stderr.decode()


@pytest.mark.parametrize("script", ["slurm/estimate.py", "examples/million_tokens.py", "examples/recall_text.py"])
def test_help_of_a_script_is_shown_where_the_terminal_is_ascii(place, script):
    done = shell(f"{sys.executable} {ROOT / script} --help", place, PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("where", "code"), [("<&- >&- 2>&-", 0), (">/dev/full", 2), ("|& true", 0)])
def test_a_measurement_outlives_what_its_output_goes_to(place, where, code, unbuffered):
    done = shell(f"{PPL} {where}", place, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == code, done.stderr
    assert (b"standard output: no space left on device; send" in done.stderr) == (code == 2)
    assert b"Traceback" not in done.stderr
    assert read_json(place / "ppl.json")["rows"]


@pytest.mark.parametrize(("where", "code"), [(">&-", 0), (">/dev/full", 2), ("| true", 0)])
def test_a_stream_is_saved_whatever_its_output_goes_to(place, where, code):
    done = shell(f"{STREAM} < text.txt {where}", place)
    assert done.returncode == code, done.stderr
    assert (b"standard output: no space left on device; send" in done.stderr) == (code == 2)
    assert b"Traceback" not in done.stderr
    assert (place / "stream").exists()


ANY_COMMAND = """import sys, time
from sinkmodel.console import command, put, say
@command("x")
def main(argv):
    time.sleep(0.3)
    say("a")
    {"put": put, "print": print, "flush": lambda text: print(text, flush=True)}[sys.argv[1]]("≥")
    say("b")
    open("done", "w").close()
    return 1
sys.exit(main([]))
"""


@pytest.mark.parametrize(
    ("how", "where", "code"),
    [
        ("put", ">&-", 1),
        ("put", "2>&-", 1),
        ("put", ">&- 2>&-", 1),
        ("put", ">/dev/full", 2),
        ("print", ">/dev/full", 2),
        ("flush", ">/dev/full", 2),
        ("put", "2>/dev/full", 1),
        ("put", "| true", 1),
        ("print", "| true", 1),
        ("put", "|& true", 1),
        ("put unbuffered", ">/dev/full", 2),
        ("put unbuffered", "| true", 1),
    ],
)
def test_every_command_ends_as_it_would_have_ended(tmp_path, how, where, code):
    """Risk: exit code 120 of Python's own end, 0 for an answer that is no, or a traceback into a closed descriptor."""
    (tmp_path / "any.py").write_text(ANY_COMMAND, encoding="utf-8")
    done = shell(
        f"{sys.executable} any.py {how.split()[0]} {where}",
        tmp_path,
        PYTHONPATH=str(ROOT),
        PYTHONIOENCODING="ascii",
        PYTHONUNBUFFERED="1" if how.endswith("unbuffered") else "",
    )
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert (tmp_path / "done").exists() or code == 2
    full = b"x: standard output: no space left on device; send the output elsewhere and run again\n"
    assert done.stderr.endswith(full) == (code == 2), "and not advice about files"


def test_a_closed_stdin_is_a_mistake_in_one_line(place):
    done = shell(f"{STREAM} <&-", place)
    assert done.returncode == 2
    assert done.stderr.decode() == "sink-stream: there is no input; pipe text in or use a terminal\n"


def test_a_result_that_cannot_be_written_is_still_shown(place):
    """The other way round: no room for the file, a table on the screen."""
    from argparse import Namespace

    from eval.commands.output import give_result
    from sinkmodel.results.perplexity import PerplexityResult

    shown = []
    options = Namespace(json=place / "text.txt" / "x.json", command_line="")
    with pytest.raises(OSError, match="text.txt"):
        give_result(options, PerplexityResult(model="m", budget=8, rows=[]), lambda: shown.append(1))
    assert shown == [1]


def test_streams_of_a_test_or_a_notebook_are_left_as_they_are(capsys):
    @command("x")
    def main(argv):
        put("≥")
        say("–")

    assert main([]) == 0
    assert capsys.readouterr() == ("≥\n", "–\n")


def test_a_name_of_a_file_that_is_no_text_stays_the_same_name_in_json(tmp_path):
    name = os.fsdecode(b"b\xfccher.txt")
    write_json(tmp_path / "x.json", {"file": name, "text": "≥"})
    assert read_json(tmp_path / "x.json") == {"file": name, "text": "≥"}
    assert "≥" in (tmp_path / "x.json").read_text(encoding="utf-8")
