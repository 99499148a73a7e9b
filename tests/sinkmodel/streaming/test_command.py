"""Guards: `sink-stream` reads without end, prints what it did, and can be stopped at any time without loss."""

from __future__ import annotations

import array
import contextlib
import fcntl
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from sinkmodel import loading
from sinkmodel.errors import UserError
from sinkmodel.loading import load_checkpoint
from sinkmodel.scoring import streaming_nll
from sinkmodel.sinks import SinkConfig
from sinkmodel.streaming import Stream
from sinkmodel.streaming.chat import Chat
from sinkmodel.streaming.command import main
from sinkmodel.streaming.intake import Intake
from sinkmodel.streaming.terminal import READ, Interrupts, TextPipe
from sinkmodel.tokenizer import load_tokenizer
from tests import tiny

BUDGET = 32
TEXT = tiny.words(500)
PROGRAM = [sys.executable, "-m", "sinkmodel.streaming.command"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model that never comes to the end of a text by itself, and says nothing that has no text."""
    path = tiny.checkpoint(tmp_path_factory.mktemp("run"))
    content = torch.load(path, weights_only=True)
    for name, weight in content["state_dict"].items():
        if name.endswith(("lm_head.weight", "embed_out.weight")):
            weight[[0, 1, *range(300, len(weight))]] = (weight[5] + weight[6]) / 2  # between two others, never above
        elif weight.dim() == 2:
            weight *= 8  # so that what it attends to matters
    torch.save(content, path)
    return str(path)


@pytest.fixture
def stream(model, tmp_path, monkeypatch, capsys):
    """Call the command on a piped text: exit code, stdout, stderr."""

    def call(text: str | bytes, *argv: object) -> tuple[int, str, str]:
        path = tmp_path / "piped"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with path.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            settled = [] if "--restore" in argv else ["--budget", str(BUDGET)]
            code = main(["--model", model, *settled, *map(str, argv)])
        return code, *capsys.readouterr()

    return call


def expected_text(model: str, text: str, count: int, **settings) -> str:
    network, tokenizer, _ = load_checkpoint(Path(model))
    stream = Stream(network, tokenizer, BUDGET, **settings)
    stream.feed(text)
    return "".join(stream.text(max_tokens=count))


def result_of(out: str) -> tuple[int, float, float]:
    tokens, nll, ppl = re.fullmatch(r"tokens (\d+) nll (\S+) ppl (\S+)\n", out).groups()
    return int(tokens), float(nll), float(ppl)


# ------------------------------------------------------------------------------------------------------ what is piped


def test_a_piped_text_is_continued(stream, model):
    code, out, stderr = stream(TEXT + "\n", "--max-tokens", 20)
    assert code == 0, stderr
    assert out == expected_text(model, TEXT, 20) + "\n"
    assert re.search(r"^sink-stream: 1\.\d+k tokens, \S+ tokens/s, cache 32/32$", stderr, re.MULTILINE)
    assert stream(TEXT, "--max-tokens", 20)[1] == out, "a line end at the very end is the shell's"
    assert stream(TEXT + "\n\n", "--max-tokens", 20)[1] != out, "two are not"


def test_the_loss_is_that_of_chunked_scoring_from_the_second_text_token_on(stream, model):
    network, tokenizer, sinks = load_checkpoint(Path(model))
    ids = tokenizer(TEXT + "\n", add_special_tokens=False).input_ids
    (nll,) = streaming_nll(network, [sinks + ids], BUDGET, 1)
    code, out, stderr = stream(TEXT + "\n", "--score")
    assert code == 0, stderr
    tokens, mean, ppl = result_of(out)
    assert tokens == len(ids) - 1
    assert mean == pytest.approx(nll[1:].mean().item(), abs=1e-5)
    assert ppl == pytest.approx(math.exp(mean), rel=1e-4)
    assert f"nll {mean:.4f}" in stderr


def test_options_reach_the_stream(stream, model):
    greedy = stream(TEXT, "--max-tokens", 20)[1]
    for argv in (["--temperature", 2], ["--top-k", 5], ["--top-p", 0.9], ["--stop", greedy[2:4]]):
        assert stream(TEXT, "--max-tokens", 20, *argv)[1] != greedy, argv
    loss = result_of(stream(TEXT, "--score")[1])
    for argv in (["--sinks", 4], ["--system", "be kind"], ["--positions", "text"], ["--dtype", "bfloat16"]):
        assert result_of(stream(TEXT, "--score", *argv)[1])[1] != loss[1], argv
    draws = [stream(TEXT, "--max-tokens", 20, "--temperature", 2, "--seed", seed)[1] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert stream(TEXT, "--max-tokens", 20, "--system", "be kind")[1] == (
        expected_text(model, TEXT, 20, pinned="be kind") + "\n"
    )
    assert stream(TEXT, "--max-tokens", 0)[1] == ""


@pytest.mark.parametrize("mode", [["--score"], ["--max-tokens", "0"]], ids=["score", "continue"])
def test_bytes_that_are_no_text_are_one_clear_error_and_nothing_before_them_is_lost(stream, tmp_path, mode):
    text, saved = TEXT[:1500].encode() + "é".encode(), tmp_path / "saved"
    code, out, stderr = stream(text + b"\xff" + b"more text", *mode, "--save", saved)
    assert code == 2
    assert f"the input is not UTF-8 at byte {len(text)} (invalid start byte)" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    before = stream(text.decode(), *mode, "--save", tmp_path / "whole")
    assert torch.equal(*(torch.load(path)["values"] for path in (saved, tmp_path / "whole")))
    assert out == (before[1] if mode == ["--score"] else "")
    code, _, stderr = stream("ab é".encode()[:-1], *mode)
    assert (code, "not UTF-8 at byte 3 (unexpected end of data)" in stderr) == (2, True)


def test_a_pipe_is_read_bit_by_bit_as_it_is_used(tmp_path):
    """Neither its length nor that of a line matters."""
    path = tmp_path / "piped"
    path.write_text("word" * 250_000)
    with path.open() as file, Interrupts() as interrupts, interrupts.working():
        pieces = iter(TextPipe(file.fileno(), interrupts))
        for count in range(1, 50):
            assert len(next(pieces)) <= READ
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) <= count * READ


@pytest.mark.parametrize("read", [1, 2, 3, 5, 1000])
def test_text_is_the_same_however_it_comes(tmp_path, monkeypatch, read):
    monkeypatch.setattr("sinkmodel.streaming.terminal.READ", read)
    path = tmp_path / "piped"

    def text_of(content: bytes, **settings) -> str:
        path.write_bytes(content)
        with path.open() as file, Interrupts() as interrupts, interrupts.working():
            pipe, text, parts = TextPipe(file.fileno(), interrupts, **settings), "", []
            for piece in pipe:
                text += piece
                parts.append((text, pipe.taken))
        assert pipe.error is None
        assert pipe.taken == len(content)
        if len(parts) > 1:  # a pipe that begins at the place at which another was left gives the rest
            for begun, taken in parts:
                assert begun + text_of(content[taken:], **settings) == text
        return text

    content = "\ufeffa é 🙂\r\nb\rc\n\n".encode()
    assert text_of(content) == "a é 🙂\nb\nc\n\n"
    assert text_of(content, last_line_end=False) == "a é 🙂\nb\nc\n"
    assert text_of(b"a\n\nb", last_line_end=False) == "a\n\nb"
    assert text_of(b"") == ""


def test_the_status_goes_on_now_and_then(stream, monkeypatch):
    monkeypatch.setattr("sinkmodel.streaming.terminal.EVERY", 0.0)
    lines = stream(TEXT, "--score")[2].splitlines()
    assert len(lines) > 100
    assert all(re.match(r"sink-stream: \S+ tokens, \S+ tokens/s, cache \d+/32, nll \d", line) for line in lines)


# ---------------------------------------------------------------------------------------------------- a saved stream


def test_a_saved_stream_goes_on(stream, tmp_path):
    saved, again = tmp_path / "saved", tmp_path / "again"
    cut = TEXT.index(" ", 1000)
    whole = result_of(stream(TEXT, "--score")[1])
    half = result_of(stream(TEXT[:cut], "--score", "--save", saved)[1])
    assert half[0] < whole[0]
    code, out, stderr = stream(TEXT[cut:], "--score", "--restore", saved, "--save", again)
    assert code == 0, stderr
    assert result_of(out) == (whole[0], pytest.approx(whole[1], abs=1e-5), pytest.approx(whole[2], rel=1e-4))
    assert f"bytes of this input; continue with --restore {again}" in stderr


def test_draws_go_on_where_they_were(stream, tmp_path):
    saved, drawn = tmp_path / "saved", ["--temperature", 2, "--max-tokens"]
    whole = stream("", *drawn, 40)[1]
    half = stream("", *drawn, 15, "--save", saved)[1]
    rest = stream("", *drawn, 25, "--restore", saved)[1]
    assert whole.startswith(half[:-4]), "but for a character that is not yet whole, and the line end"
    assert whole.endswith(rest[4:])
    assert min(len(half), len(rest)) > 10


def test_a_saved_stream_is_checked_before_it_is_used(stream, model, tmp_path):
    saved = tmp_path / "saved"
    assert stream("some text", "--save", saved, "--max-tokens", 1)[0] == 0
    cut = tmp_path / "cut"
    cut.write_bytes(saved.read_bytes()[:2000])
    plain = tmp_path / "plain"
    Stream(load_checkpoint(Path(model))[0], budget=BUDGET).cache.save(plain)
    for path, message in (
        (cut, "not a saved stream, or it is damaged"),
        (plain, "not the state of a Stream"),
        (tmp_path, "is not a file"),
        (tmp_path / "none", "is not a file"),
    ):
        code, _, stderr = stream("text", "--restore", path)
        assert code == 2
        assert message in stderr
        assert len(stderr.splitlines()) == 1, stderr
    for option, value in (("--budget", 8), ("--sinks", 1), ("--system", "x"), ("--positions", "text")):
        code, _, stderr = stream("text", "--restore", saved, option, value)
        assert code == 2
        assert f"{option} is fixed" in stderr


# ----------------------------------------------------------------------------------------------- Ctrl-C, broken pipes


def start(model: str, *argv: object, **pipes) -> subprocess.Popen:
    command = [*PROGRAM, "--model", model, *map(str, argv)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_while_it_waits_for_a_pipe_saves_and_nothing_is_lost(model, tmp_path, stream):
    saved = tmp_path / "saved"
    cut = len(TEXT) // 2 + 3
    process = start(model, "--budget", BUDGET, "--score", "--save", saved)
    process.stdin.write(TEXT[:cut].encode())
    process.stdin.flush()
    wait_until(lambda: asleep(process) and empty(process.stdin))
    process.send_signal(signal.SIGINT)
    out, stderr = (stream.decode() for stream in process.communicate(timeout=60))
    assert process.returncode == 130, stderr
    assert out == ""
    assert re.search(r"^sink-stream: \S+ tokens, .*cache 32/32, nll \d", stderr, re.MULTILINE)
    assert f", {cut} bytes of this input; continue with --restore" in stderr
    assert "Traceback" not in stderr
    code, out, stderr = stream(TEXT[cut:], "--score", "--restore", saved)
    assert code == 0, stderr
    whole = result_of(stream(TEXT, "--score")[1])
    assert result_of(out)[0] == whole[0]
    assert result_of(out)[1] == pytest.approx(whole[1], abs=1e-5)


def test_ctrl_c_while_it_writes_into_a_pipe_ends_it_at_once(model):
    process = start(model, "--budget", BUDGET, "--max-tokens", 10**9)
    process.stdin.write(TEXT.encode())
    process.stdin.close()
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    stderr = process.stderr.read().decode()
    assert process.wait(timeout=60) == 130, stderr
    assert expected_text(model, TEXT, 40).encode().startswith(begun)
    assert re.search(
        r"^sink-stream: \S+ tokens, .*cache 32/32\nsink-stream: interrupted$", stderr.strip(), re.MULTILINE
    )
    assert "Traceback" not in stderr


def test_a_reader_that_goes_away_is_no_error(model):
    process = start(model, "--budget", BUDGET, "--max-tokens", 10**9)
    process.stdin.write(b"some text")
    process.stdin.close()
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read().decode().strip() == ""


def test_ctrl_c_is_kept_until_a_step_is_done_and_the_second_is_not():
    with Interrupts() as interrupts:
        with interrupts.working():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.pressed
            with pytest.raises(KeyboardInterrupt), interrupts.waiting():
                raise AssertionError("it does not wait")
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with interrupts.working():
            assert not interrupts.pressed, "a turn later it is forgotten"
            with pytest.raises(KeyboardInterrupt), interrupts.waiting():
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def asleep(process) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


def empty(pipe) -> bool:
    """Whether all that was written into a pipe has been read."""
    waiting = array.array("i", [0])
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, waiting)
    return waiting[0] == 0


# ----------------------------------------------------------------------------------------------------- in a terminal


class Terminal:
    """The command in a terminal of its own; `said` is all that it showed."""

    def __init__(self, model: str, *argv: object):
        self.shown = ""
        command = [*PROGRAM, "--model", model, *map(str, argv)]
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, command, {**os.environ, "TERM": "dumb"})

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def see(self, pattern: str, seconds: float = 120) -> str:
        """What has come since the last call, up to what matches `pattern`."""
        seen, deadline = "", time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                self.shown += os.read(self.screen, 4096).decode(errors="replace")
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def code(self) -> int:
        with contextlib.suppress(OSError):  # the terminal of a process that has gone
            while os.read(self.screen, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal_each_line_is_a_turn_and_ctrl_c_ends_the_turn(model):
    """A real terminal, so that Ctrl-C is the key and not a signal that we send."""
    terminal = Terminal(model, "--budget", BUDGET, "--max-tokens", 10**9)
    terminal.see("> ")
    terminal.type("some words\n")
    terminal.see("some words\\s+")
    terminal.see("[^>]{30}")
    terminal.type("\x03")
    turn = terminal.see(r"cache \d+/32\s+> ")
    assert re.search(r"\nsink-stream: \S+ tokens, \S+ tokens/s, cache", turn), turn
    terminal.type("\n")
    terminal.see("[^>]{30}")
    terminal.type("\x03")
    terminal.see(r"cache 32/32\s+> ")
    wait_until(lambda: asleep(terminal))  # Python misses what comes just before it waits for keys
    terminal.type("\x03")
    assert "Traceback" not in terminal.see("interrupted")
    assert terminal.code() == 130


def test_turns_are_those_of_one_stream(model):
    terminal = Terminal(model, "--budget", BUDGET, "--max-tokens", 8)
    terminal.see("> ")
    network, tokenizer, _ = load_checkpoint(Path(model))
    stream = Stream(network, tokenizer, BUDGET)
    for line, fed in (("some words", "some words"), ("and more", "\nand more"), ("", "")):
        terminal.type(f"{line}\n")
        terminal.see(rf"{line}\r?\n")
        shown = terminal.see(r"sink-stream: [^>]*> ").replace("\r\n", "\n")
        stream.feed(fed)
        assert shown.startswith("".join(stream.text(max_tokens=8)) + "\nsink-stream: "), shown
    terminal.type("\x04")
    assert terminal.code() == 0


# ---------------------------------------------------------------------------------------------------------- a template


@pytest.mark.parametrize("sink", [SinkConfig("token"), SinkConfig("none")], ids=lambda sink: sink.kind)
@pytest.mark.parametrize("system", [None, "be kind"])
def test_turns_of_a_chat_are_what_the_template_makes_of_all_messages(sink, system):
    tokenizer = load_tokenizer(tiny.tokenizer(), sink, 128)
    sinks = sink.ids(300)
    chat = Chat(tokenizer, sinks, system)
    system_turn = [{"role": "system", "content": system}] if system else []
    # A word that is one token less with the space in front.
    hello = next(word for word in TEXT.split() if len(ids_of(tokenizer, f" {word}")) == len(ids_of(tokenizer, word)))
    messages = [*system_turn, {"role": "user", "content": hello}]
    ids = [*sinks, *chat.pinned, *blocks(tokenizer, [*chat.opening, hello, *chat.closing])]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    messages += [{"role": "assistant", "content": "a reply"}, {"role": "user", "content": "and now"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    later = tokenizer.decode(blocks(tokenizer, [*chat.between, "and now", *chat.closing]))
    assert whole.endswith(f" a reply{later}")
    assert (chat.pinned == []) == (system is None)


def test_a_message_that_is_trimmed_and_broken_off_loses_no_blank(stream, model, tmp_path, monkeypatch):
    """The blank before the cut is inside of the message that a restored stream continues."""

    def templated(name, *args):
        loaded = load_model(name, *args)
        loaded.tokenizer.chat_template = loaded.tokenizer.chat_template.replace(
            "message['content']", "message['content'] | trim"
        )
        return loaded

    load_model = loading.load_model
    monkeypatch.setattr(loading, "load_model", templated)
    saved = tmp_path / "saved"
    whole = stream("  hello you ", "--chat", "--max-tokens", 10)
    assert whole[0] == 0, whole
    assert "trims earlier replies" in whole[2]
    assert stream(b"  hello \xff", "--chat", "--save", saved)[0] == 2
    rest = stream("you \n", "--chat", "--restore", saved, "--max-tokens", 10)
    assert rest[1] == whole[1]
    assert stream("hello you", "--chat", "--max-tokens", 10)[1] == whole[1]


def test_a_message_that_spells_a_special_token_does_not_get_it():
    tokenizer = load_tokenizer(tiny.tokenizer(), SinkConfig("token"), 128)
    chat = Chat(tokenizer, [300], "a <|sink|> b")
    ids = [*chat.pinned, *blocks(tokenizer, [*chat.opening, "c <|sink|> d<|endoftext|>", *chat.closing])]
    assert not {0, 300} & set(ids)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def blocks(tokenizer, source) -> list[int]:
    return [token for block in Intake(tokenizer, 301).blocks(source) for token in block]


def test_a_chat_from_a_pipe(stream, model, tmp_path):
    network, tokenizer, sinks = load_checkpoint(Path(model))
    chat = Chat(tokenizer, sinks, "be kind")
    expected = Stream(network, tokenizer, BUDGET, pinned=chat.pinned)
    expected.feed([*chat.opening, "hello you", *chat.closing])
    code, out, stderr = stream("hello you\n", "--chat", "--system", "be kind", "--max-tokens", 10)
    assert code == 0, stderr
    assert out == "".join(expected.text(max_tokens=10)) + "\n"
    fed = len(sinks + chat.pinned + blocks(tokenizer, [*chat.opening, "hello you"]))
    stderr = stream(b"hello you\xff", "--chat", "--system", "be kind", "--save", tmp_path / "saved")[2]
    assert f"saved the stream after {fed} tokens" in stderr, "a message that is not whole is not closed"


def test_templates_that_cannot_be_streamed_are_named(model):
    tokenizer = load_tokenizer(tiny.tokenizer(), SinkConfig("none"), 128)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    for template, message in (
        (None, "no chat template; leave --chat out"),
        ("{{ messages | length }}", "cannot be split into turns"),
        (refusing + tokenizer.chat_template, "refuses the messages system: no system here"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            Chat(tokenizer, [], "be kind")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "0"], "not a number above 0"),
        (["--budget", "1"], "a budget of 1 does not hold 1 sinks"),
        (["--budget", "129"], "needs as many positions and .* has only 128; use --budget 128 or less"),
        (["--system", "very " * 40], "does not hold 1 sinks, .* pinned tokens"),
        (["--temperature", "-1"], "not a number of 0 or more"),
        (["--temperature", "0", "--top-k", "3"], "have no effect at temperature 0"),
        (["--top-p", "1.5"], "sampling settings"),
        (["--stop", ""], "stop string is empty"),
        (["--score", "--top-k", "3"], "--score writes no text, so --top-k has no effect"),
        (["--score", "--chat"], "--score writes no text, so --chat has no effect"),
        (["--save", "none/here"], "--save none/here cannot be written"),
        (["--max-token", "3"], "did you mean --max-tokens"),
    ],
)
def test_a_mistake_is_one_line(stream, argv, message):
    code, out, stderr = stream("some text", *argv)
    assert (code, out) == (2, "")
    assert len(stderr.splitlines()) == 1, stderr
    assert re.search(message, stderr), stderr


def test_too_little_to_score(stream):
    for text in ("", "a"):
        code, _, stderr = stream(text, "--score")
        assert code == 2
        assert "nothing to score: a loss needs at least two tokens" in stderr


def test_mistakes_are_found_before_anything_heavy_is_loaded():
    program = (
        "import sys; from sinkmodel.streaming.command import main; assert main(sys.argv[1:]) == 2; "
        "sys.exit('torch' in sys.modules)"
    )
    for argv in (["--model", "x", "--budget", "0"], ["--model", "x", "--save", "none/here"]):
        done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
