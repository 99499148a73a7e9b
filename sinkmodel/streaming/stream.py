"""An endless stream: feed it tokens or text, and get tokens, text or scores, in constant memory.

    stream = Stream(model, tokenizer, budget=1024, pinned="You are a helpful assistant.")
    stream.feed("Once upon a time")                       # or ids, or an iterator that never ends
    for piece in stream.text(max_tokens=100):             # the model's continuation
        print(piece, end="", flush=True)
    stream.feed(" And then")                              # the next turn, in the same stream
    for nll in stream.score(open("book.txt")):            # −log p of each token, in nats
        ...

`generate` keeps all ids, a growing mask and growing positions. A stream keeps only its `StreamingCache`, the logits of
the last token, and a few characters and ids at the boundary between text and tokens.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkmodel.cache import StreamingCache
from sinkmodel.choices import Positions
from sinkmodel.errors import UserError
from sinkmodel.sinks import front_of, sinks_to_keep
from sinkmodel.streaming.intake import BLOCK, Intake, rows_of
from sinkmodel.streaming.sampling import Sampler
from sinkmodel.streaming.text_codec import Writer
from sinkmodel.tokenizer import suppressed_ids

TOGETHER = 1024  # most tokens of all rows in one forward, since their logits may be needed
REMEMBERED = 8  # ids that are kept as context for decoding

Stop = Sequence["int | str"]
OnEvict = Callable[[int, int, int], None]  # row, place in its stream (0 is the first token, a sink if any), token id


class Stream:
    """One stream of a model, or `batch` of them side by side.

    The stream begins with the model's own sinks, or with the `<s>` of a third-party tokenizer (`front_of`), followed by
    the pinned tokens. Both are fed once, before anything else.

    Without `batch` there is one stream. It takes text, ids, or an iterator of either, and returns plain ids, strings
    and numbers. With `batch=B` it takes a list of B such inputs and returns tuples of B. Rows may have different
    lengths: a row that has ended has None (or "") in the tuple while others continue. Nothing is fed to such a row
    meanwhile, so each row is equal to a stream of its own.

    Args:
        tokenizer: a tokenizer of transformers; needed only for text.
        budget: slots of the cache; sinks, pinned tokens and the current token are included.
        sinks: number of leading tokens that are never evicted. None takes `sinks_to_keep`, or the number of ids in
            `front_of` if that is larger.
        pinned: text or ids that are never evicted, the same in each row, such as a system prompt.
        on_evict: called with (row, place, id) for each evicted token, in order.
        batch: number of rows; None for a single stream.
        positions: "cache" or "text", see `StreamingCache`.

    Raises UserError if the budget does not hold sinks, pinned tokens and one more token; for ids that the model does
    not have; for text without a tokenizer; and for a batch of another size. Everything before the invalid input has
    been fed then, and none of the invalid input.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        budget: int = 1024,
        sinks: int | None = None,
        pinned: str | Sequence[int] = (),
        on_evict: OnEvict | None = None,
        batch: int | None = None,
        positions: Positions = "cache",
    ):
        self.model, self.tokenizer, self.on_evict, self.batch = model, tokenizer, on_evict, batch
        if batch is not None and batch < 1:
            raise UserError(f"batch is {batch}; it must be a number of rows of at least 1, or None for a single stream")
        self.rows = batch or 1
        own = front_of(model.config, tokenizer)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.front = own + list(chain.from_iterable(Intake(tokenizer, self.vocabulary).blocks(pinned)))
        sinks = max(sinks_to_keep(model.config), len(own)) if sinks is None else sinks
        kept = max(sinks, len(self.front)) if len(self.front) > len(own) else sinks
        if kept > sinks and budget <= kept:
            raise UserError(
                f"a budget of {budget} does not hold {len(own)} sinks, {len(self.front) - len(own)} pinned tokens and "
                f"the current token; make it at least {kept + 1}"
            )
        self.cache = StreamingCache(model.config, budget, kept, positions)
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        never = suppressed_ids(model, tokenizer)
        self._never_V = torch.zeros(self.vocabulary, dtype=torch.bool, device=model.device)
        self._never_V[[token for token in never if token < self.vocabulary]] = True
        self._begin()

    def _begin(self) -> None:
        self.logits: Tensor | None = None  # [B, V] in fp32, after the last token of each row
        self._columns = 0  # columns of the cache after the last complete step
        self._chosen: list[int | None] = []  # tokens that were returned but are not fed yet
        self._intakes = [Intake(self.tokenizer, self.vocabulary) for _ in range(self.rows)]
        self._recent: list[deque[int]] = [deque(maxlen=REMEMBERED) for _ in range(self.rows)]
        on_evict, cache = self.on_evict, self.cache
        self._evictions = Evictions(on_evict, self.rows, cache.sinks, cache.window) if on_evict else None

    def reset(self) -> None:
        """Begin a new stream with the same sinks and pinned tokens."""
        self.cache.reset()
        self._begin()

    @property
    def seen(self) -> int:
        """Number of tokens so far in the longest row, including sinks and pinned tokens."""
        return max(self.cache.seen, default=0)

    @property
    def whole(self) -> bool:
        """False after an interrupted step, for example by Ctrl-C: the stream cannot continue."""
        return not self.cache.torn and self.cache.get_seq_length() == self._columns

    # ------------------------------------------------------------------------------------------------- public methods

    def feed(self, source: Any) -> None:
        """Feed text, ids, or an iterator of either, chunk by chunk; with a batch, a list of them."""
        for chunk in self._chunks(source):
            self._forward(chunk)

    def score(self, source: Any) -> Iterator[Any]:
        """Feed, and yield for each token its −log p (in nats, from fp32 logits) given its row so far.

        If the stream has no sinks and no pinned tokens, its first token has no prediction and yields no number. The
        numbers equal those of `sinkmodel.scoring.streaming_nll`, for streams of any length.
        """
        for chunk in self._chunks(source):
            before_BV = self.logits
            scores = self._nll(chunk, before_BV, self._forward(chunk, all_logits=True))
            for i in range(max(map(len, scores))):
                yield self._out([row[i] if i < len(row) else None for row in scores])

    def tokens(
        self, max_tokens: int | None = None, stop: Stop | None = None, sample: Sampler | None = None
    ) -> Iterator:
        """Let the model continue the stream, and yield each token id.

        A row ends after `max_tokens` tokens or as `stop` demands. A token id in `stop` ends the row before it, and the
        id is neither yielded nor fed. A string in `stop` ends the row with the token that completes it, and this token
        stays in the stream. With None, `stop` is the end-of-text ids of model and tokenizer; with `()`, nothing stops a
        row. With None, `sample` is greedy. Ids that the model must not generate (`suppress_tokens` of its generation
        config, and its sinks) are never chosen. The iterator may be abandoned at any time: the stream then contains
        what it yielded.
        """
        for ids, _ in self._generate(max_tokens, stop, sample, text=False):
            if any(token is not None for token in ids):
                yield self._out(ids)

    def text(self, max_tokens: int | None = None, stop: Stop | None = None, sample: Sampler | None = None) -> Iterator:
        """As `tokens`, but yields pieces of text: whole characters, up to a stop string but not including it."""
        for _, pieces in self._generate(max_tokens, stop, sample, text=True):
            if any(pieces):
                yield self._out(pieces)

    # ---------------------------------------------------------------------------------------------------- generation

    def _generate(
        self, max_tokens: int | None, stop: Stop | None, sample: Sampler | None, text: bool
    ) -> Iterator[tuple[list[int | None], list[str]]]:
        """Yield for each step the ids and texts of all rows; None and "" for a row that has ended."""
        sample = sample or Sampler()
        stop = self.ends_of_text() if stop is None else [stop] if isinstance(stop, str) else stop
        ids, strings = {x for x in stop if not isinstance(x, str)}, [x for x in stop if isinstance(x, str)]
        if "" in strings:
            raise UserError("a stop string is empty and would end every text at once; leave it out")
        self._feed_pending()
        if self.logits is None or 0 in self.cache.seen:
            which = f"row {self.cache.seen.index(0)} of " if 0 in self.cache.seen and self.batch else ""
            raise UserError(f"{which}the stream has nothing to continue: feed it a token first")
        writers = [Writer(self._need_tokenizer(), recent, strings) for recent in self._recent if text or strings]
        alive, count = [True] * self.rows, 0
        while any(alive) and (max_tokens is None or count < max_tokens):
            self._feed_pending()
            count += 1
            drawn = sample(self.logits.masked_fill(self._never_V, -torch.inf), alive)
            chosen = [None if token in ids else token for token in drawn]
            pieces = [""] * self.rows
            for row, token in enumerate(chosen):
                ends = token is None or count == max_tokens
                if writers and alive[row]:
                    pieces[row], met = writers[row].push(token, ends)
                    ends |= met
                alive[row] &= not ends
            self._chosen = chosen
            yield chosen, pieces

    def ends_of_text(self) -> list[int]:
        """The default of `stop`: the end-of-text ids of model and tokenizer."""
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [eos] if isinstance(eos, int) else list(eos or ())
        return [*ends, *(x for x in [getattr(self.tokenizer, "eos_token_id", None)] if x is not None)]

    # ---------------------------------------------------------------------------------------------- feeding the cache

    def _feed_pending(self) -> None:
        """Feed sinks and pinned tokens if they are not fed yet, then the tokens that were returned last."""
        for start in range(self.seen, len(self.front), BLOCK):
            self._forward([self.front[start : start + BLOCK]] * self.rows)
        if any(token is not None for token in self._chosen):
            self._forward([[] if token is None else [token] for token in self._chosen])
        self._chosen = []

    @torch.inference_mode()
    def _forward(self, chunk: list[list[int]], all_logits: bool = False) -> Tensor:
        """Feed up to BLOCK ids per row, left-padded to [B, N]. Returns all logits [B, N, V], or the last."""
        if not self.whole:
            raise UserError("an earlier step was interrupted half way; reset() the stream or restore it")
        width = max(map(len, chunk))
        ids_BN = torch.tensor([[0] * (width - len(ids)) + ids for ids in chunk], device=self.model.device)
        real_BN = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in chunk])
        logits_BNV = self.model(
            input_ids=ids_BN,
            attention_mask=None if bool(real_BN.all()) else real_BN,
            past_key_values=self.cache,
            **({} if all_logits else self._last_only),
        ).logits
        last_BV = logits_BNV[:, -1].float()
        if self.logits is not None:  # a row that was fed nothing keeps its logits
            last_BV = torch.where(real_BN[:, -1:].bool().to(last_BV.device), last_BV, self.logits)
        if bool(last_BV.isnan().any()):
            raise UserError(
                f"{self.model.config.model_type} in {self.model.dtype} gives logits that are NaN; try float32"
            )
        self.logits, self._columns = last_BV, self.cache.get_seq_length()
        for recent, ids in zip(self._recent, chunk):
            recent.extend(ids[-REMEMBERED:])
        if self._evictions is not None:
            self._evictions.note(chunk, self.cache.seen)
        return logits_BNV

    @torch.inference_mode()
    def _nll(self, chunk: list[list[int]], before_BV: Tensor | None, logits_BNV: Tensor) -> list[list[float]]:
        """−log p of each row's ids. The first token of a stream has none."""
        scores = []
        for row, ids in enumerate(chunk):
            foreseen_NV = logits_BNV[row, logits_BNV.shape[1] - len(ids) : -1].float()
            if before_BV is not None and ids and self.cache.seen[row] > len(ids):
                foreseen_NV = torch.cat([before_BV[row : row + 1], foreseen_NV])
            targets_N = torch.tensor(ids[len(ids) - len(foreseen_NV) :], dtype=torch.long, device=foreseen_NV.device)
            scores.append(F.cross_entropy(foreseen_NV, targets_N, reduction="none").tolist())
        return scores

    # ---------------------------------------------------------------------------------------------- reading the input

    def _chunks(self, source: Any) -> Iterator[list[list[int]]]:
        """Yield up to BLOCK ids per row as they arrive, after feeding what has to come before them."""
        sources = [source] if self.batch is None else rows_of(source, self.batch)
        self._feed_pending()
        blocks = [intake.blocks(row) for row, intake in zip(sources, self._intakes)]
        if self.batch is None:
            for block in blocks[0]:
                yield [block]
            return
        ids, length = [chain.from_iterable(row) for row in blocks], max(1, min(BLOCK, TOGETHER // self.rows))
        while any(chunk := [list(islice(row, length)) for row in ids]):
            yield chunk

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UserError("the stream has no tokenizer, so it handles only ids; make it with a tokenizer for text")
        return self.tokenizer

    def _out(self, row_values: Sequence[Any]) -> Any:
        return row_values[0] if self.batch is None else tuple(row_values)

    # ------------------------------------------------------------------------------------------------ save and restore

    def state_dict(self) -> dict[str, Any]:
        """All that `from_state` needs: the cache's state, and under the key "stream" tensors, numbers and text.

        `torch.save` can write it. `sinkmodel.cache.serialization.read_state` and `StreamingCache.load` can read it.
        """
        beside = {
            "batch": self.batch,
            "sink_ids": front_of(self.model.config, self.tokenizer),
            "front": self.front,
            "logits": self.logits,
            "chosen": list(self._chosen),
            "columns": self._columns,
            "text": [(intake.encoder.pending, intake.encoder.context) for intake in self._intakes],
            "recent": [list(ids) for ids in self._recent],
            "windows": [list(ids) for ids in self._evictions.windows] if self._evictions else None,
        }
        return {**self.cache.state_dict(), "stream": beside}

    @classmethod
    def from_state(cls, state: Any, model: Any, tokenizer: Any = None, on_evict: OnEvict | None = None) -> Stream:
        """Restore a stream on the same model. Raises UserError if the state is invalid or of another model.

        `on_evict` works only if the saved stream had one: the ids in the window are stored only then.
        """
        try:
            settings, beside = state["settings"], state["stream"]
            own, pinned = front_of(model.config, tokenizer), beside["front"][len(beside["sink_ids"]) :]
            if own != beside["sink_ids"]:
                raise UserError(
                    f"the saved stream has sinks {beside['sink_ids']}, this model {own}; take its model and tokenizer"
                )
            places = settings["budget"], settings["sinks"], pinned, on_evict, beside["batch"], settings["positions"]
            stream = cls(model, tokenizer, *places)
            stream.cache.load_state_dict(state)
            stream.logits = None if beside["logits"] is None else beside["logits"].to(model.device)
            stream._chosen, stream._columns = list(beside["chosen"]), beside["columns"]
            for intake, (pending, context) in zip(stream._intakes, beside["text"]):
                intake.encoder.pending, intake.encoder.context = pending, context
            for recent, ids in zip(stream._recent, beside["recent"]):
                recent.extend(ids)
            if stream._evictions is not None:
                stream._evictions.windows = [deque(ids) for ids in beside["windows"]]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"this is not the state of a Stream ({type(error).__name__}: {error})") from None
        return stream


class Evictions:
    """The token ids in the window of each row. Calls `on_evict` for each evicted token, in order."""

    def __init__(self, on_evict: OnEvict, rows: int, sinks: int, window: int):
        self.on_evict, self.sinks, self.length = on_evict, sinks, window
        self.windows: list[deque[int]] = [deque() for _ in range(rows)]

    def note(self, chunk: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """Record that the ids in `chunk`, one list per row, were fed. `seen` is each row's token count after them."""
        for i in range(max(map(len, chunk))):
            for row, ids in enumerate(chunk):
                place = seen[row] - len(ids) + i
                if i < len(ids) and place >= self.sinks:
                    self.windows[row].append(ids[i])
                    if len(self.windows[row]) > self.length:
                        self.on_evict(row, place - self.length, self.windows[row].popleft())
