"""Terminal and pipe handling of `sink-stream`: Ctrl-C, reading text as it arrives, and a status line."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator

from sinkmodel.console import say, to_stdout
from sinkmodel.errors import UserError
from sinkmodel.progress import EVERY, progress_line
from sinkmodel.text.content import not_text, remedy

READ = 1024  # bytes read from a pipe at a time: Ctrl-C and the status line wait until they are processed
REDRAW = 0.1  # seconds between two updates of the line in a terminal


class Interrupts:
    """Handles Ctrl-C between two steps, never within one: an interrupted forward may leave the stream half fed.

    During `working` the first Ctrl-C only sets `pressed`. The second, and any at other times, is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.pressed = self._busy = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *signal_and_frame: object) -> None:
        if self.pressed or not self._busy:
            raise KeyboardInterrupt
        self.pressed = True

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self.pressed, self._busy = False, True
        try:
            yield
        finally:
            self._busy = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block inside `working` in which no step is running, so Ctrl-C may interrupt it."""
        busy, self._busy = self._busy, False
        try:
            if self.pressed:
                raise KeyboardInterrupt
            yield
        finally:
            self._busy = busy


class TextPipe:
    """UTF-8 text from a file descriptor, as it arrives: without a byte order mark, with line ends as \\\\n.

    It never raises for bytes that are not UTF-8, so that nothing before them is lost. It ends before them, and `error`
    gives their place. `taken` counts the bytes of the text that was returned. With `last_line_end=False` a line end at
    the very end is left out, since a shell adds one.
    """

    def __init__(self, descriptor: int, interrupts: Interrupts, last_line_end: bool = True):
        self.descriptor, self.interrupts, self.last_line_end = descriptor, interrupts, last_line_end
        self.taken = 0
        self.error: UserError | None = None

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        read, begun, held = 0, False, ""
        while self.error is None:
            block = self._read()
            pending, piece = len(decoder.getstate()[0]), ""
            why = not_text(block, read)
            place = read - pending
            try:
                if why is None:
                    piece = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                piece = error.object[: error.start].decode()
                place = read - pending + error.start
                why = f"is not UTF-8 at byte {place} ({error.reason}): {remedy(error.object, read - pending)}"
            if why:
                self.error = UserError(f"the input {why}; what came before it is in the stream")
            ended = not block or self.error is not None
            read += len(block)
            if piece and not begun:
                piece, begun = piece.removeprefix("\ufeff"), True
            piece = held + newlines.decode(piece, final=ended)
            held = "\n" if not self.last_line_end and piece.endswith("\n") and not self.error else ""
            unfinished = len(decoder.getstate()[0]) + (newlines.getstate()[1] & 1) + len(held)
            self.taken = place if self.error else read if ended else read - unfinished
            if piece := piece[: len(piece) - len(held)]:
                yield piece
            if ended:
                return

    def _read(self) -> bytes:
        with self.interrupts.waiting():
            select.select([self.descriptor], [], [])
        return os.read(self.descriptor, READ)


class Status:
    """Tokens seen, tokens per second, cache fill: redrawn in place in a terminal, else a plain line now and then.

    Args:
        task: the beginning of the line.
        held: returns the number of tokens seen, of slots in use and of all slots.
    """

    def __init__(self, task: str, held: Callable[[], tuple[int, int, int]]):
        self.task, self.held = task, held
        self.in_place, self._drawn = sys.stderr.isatty(), False
        self.restart()

    def restart(self) -> None:
        """Measure the speed from now on, without the time in which the user typed."""
        self._began, self._first = time.monotonic(), self.held()[0]
        self._printed = self._began

    def update(self, more: Callable[[], str] = str) -> None:
        """Show the line if enough time has passed. `more` is called only then, for text to append."""
        now = time.monotonic()
        if now - self._printed < (REDRAW if self.in_place else EVERY):
            return
        self._printed = now
        if self.in_place:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            sys.stderr.write(f"\r\x1b[K{self.task}: {self.line()}{more()}"[: columns + 3])
            sys.stderr.flush()
            self._drawn = True
        else:
            say(f"{self.task}: {self.line()}{more()}")

    def clear(self) -> None:
        """Erase the line in a terminal, before something else is written there."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False

    def last(self, more: str = "") -> None:
        """Print the final state as a permanent line."""
        self.clear()
        say(f"{self.task}: {self.line()}{more}")

    def line(self) -> str:
        seen, held, slots = self.held()
        speed = progress_line(seen, "tokens", None, time.monotonic() - self._began, 0.0, self._first)
        return f"{speed}, cache {held}/{slots}"


def ask(prompt: str) -> str:
    """A line typed at the prompt. The prompt never gets into piped output.

    Raises EOFError at Ctrl-D, and UnicodeDecodeError for bytes that are not text.
    """
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 — arrow keys and history, if Python has them
        line = input(prompt)
    else:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
    return line.removesuffix("\n").encode(errors="surrogateescape").decode()


def write(text: str) -> None:
    with to_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()
