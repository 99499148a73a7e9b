"""The results of `sink-eval … --json` for this model: rows of a table, and the card's `model-index`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from sinkmodel.console import say
from sinkmodel.perplexity import perplexity
from sinkmodel.results.files import read_result
from sinkmodel.results.memories import MemoriesResult, MemoryRow
from sinkmodel.results.parts import PolicyFields, Result, Text
from sinkmodel.results.perplexity import GridResult, PerplexityResult
from sinkmodel.results.tasks import LongContextResult, LongContextRow, ZeroshotResult
from sinkmodel.results.verdict import THESE_TEXTS, VerdictResult

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

NAMM = "namm"  # the row of a NAMM; those of its controls are called namm-random and so on
Own = Callable[[str], bool]  # returns whether a model's name in a result means this model


@dataclass(frozen=True)
class Measured:
    """One measured number, on one text or task.

    Args:
        metric: type of the number in the model index.
        what: description: which cache, over which tokens.
        text: names of the text files, or of the task.
        revision: beginning of the text's SHA-256; None if not recorded.
        value: the number.
        low: lower end of its interval; None if there is no interval.
        high: upper end of its interval.
        level: confidence level of the interval.
        more: further entries for the model index.
    """

    metric: str
    what: str
    text: str
    revision: str | None
    value: float
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[str, str]:
        """Value and interval as texts for a table."""
        form = "+.4f" if self.metric == "nll_difference" else ",.2f" if "perplexity" in self.metric else ".4f"
        value, *limits = (
            "" if x is None else format(x, form).replace("-", "−") for x in (self.value, self.low, self.high)
        )
        return value, f"{100 * self.level:g} %: [{', '.join(limits)}]" if all(limits) else "–"

    def in_index(self) -> EvalResult:
        from huggingface_hub import EvalResult

        interval = {} if self.low is None else {"low": _short(self.low), "high": _short(self.high), "level": self.level}
        return EvalResult(
            task_type="text-generation",
            dataset_type=self.text,
            dataset_name=self.text,
            dataset_revision=self.revision,
            metric_type=self.metric,
            metric_name=self.what,
            metric_value=_short(self.value),
            metric_args={**self.more, **interval} or None,
        )


Read = Callable[[Any, Own], Iterator[Measured]]  # arguments: a result, and which names mean this model


def read_results(paths: Sequence[Path], own: Own, readers: Mapping[type[Result], Read] | None = None) -> list[Measured]:
    """The numbers of this model in the files, each once. Prints a line for a file that holds only other models.

    Args:
        readers: by kind of result; None: `READERS`, those of a model.

    Raises UserError for a file that `sink-eval --json` did not write.
    """
    readers = READERS if readers is None else readers
    found: dict[tuple[str, ...], Measured] = {}
    for path in paths:
        result = read_result(path)
        kind, command = type(result), result.COMMAND
        if kind not in READERS:
            say(f"{path}: results of sink-eval {command} are shown only in a report; give it to sink-eval report")
            continue
        if kind not in readers:
            say(f"{path}: sink-eval {command} measures no memory; nothing of it is on the card")
            continue
        of_file = [one for one in readers[kind](result, own) if _known(one.value)]
        if not of_file:
            say(f"{path} names other models than this one: nothing of it is on the card")
        for one in of_file:
            found[one.metric, one.what, one.text, one.revision or ""] = one
    return list(found.values())


# --------------------------------------------------------------------------------------------------------- each command


def _ppl(result: PerplexityResult, own: Own) -> Iterator[Measured]:
    if own(result.model):
        for row in result.rows:
            nll, stderr, tokens = row.nll_after_overflow, row.stderr_after_overflow, row.tokens_after_overflow
            yield from _perplexity(result.texts, row, nll, stderr, tokens, result.budget)


def _grid(result: GridResult, own: Own) -> Iterator[Measured]:
    """The losses of this run alone, not the mean over runs with several seeds."""
    for row in result.rows:
        for run in row.runs:
            if own(run.run):
                tokens = row.tokens_after_overflow
                yield from _perplexity(result.texts, row, run.nll, run.stderr, tokens, max(result.budgets))


def _verify(result: VerdictResult, own: Own) -> Iterator[Measured]:
    verdict = result.verdict
    names = [pair.sink for pair in result.pairs] or [result.sink]  # older files have one pair and no `pairs`
    if any(map(own, names)) and verdict.difference is not None:
        what = f"{verdict.first} − {verdict.second}, nats per token after overflow"
        what += ", on these texts alone" if verdict.speaks_of == THESE_TEXTS else ""
        what += f", over {len(names)} pairs of runs" if len(names) > 1 else ""
        more = {"answer": verdict.answer, "margin": result.margin, "tokens": verdict.tokens}
        more |= {} if verdict.speaks_of is None else {"speaks_of": verdict.speaks_of}
        what += f", margin ±{result.margin:g}: {verdict.answer}"
        low, high, level = verdict.low, verdict.high, result.level
        yield Measured("nll_difference", what, *_text(result.texts), verdict.difference, low, high, level, more)
    for row in result.rows:
        if own(row.run or {"sink": result.sink, "vanilla": result.vanilla}.get(row.model, "")):
            nll, stderr, tokens = row.nll_after_overflow, row.stderr_after_overflow, row.tokens_after_overflow
            yield from _perplexity(result.texts, row, nll, stderr, tokens, result.budget)


def _zeroshot(result: ZeroshotResult, own: Own) -> Iterator[Measured]:
    if not own(result.model):
        return
    files = {file.task: file.sha256[:16] for file in result.files}
    for row in result.rows:
        if row.adapter is None:
            continue
        of_filter = "" if row.filter == "none" else f", {row.filter}"
        limit = f", the first {row.questions} questions" if result.limit else ""
        metric = {"acc": "accuracy"}.get(row.metric, row.metric)
        what = f"{row.metric}{of_filter}, zero-shot{limit}"
        limits = _around(row.adapter, row.adapter_stderr)
        more = {"questions": row.questions}
        yield Measured(metric, what, row.task, files.get(row.task), row.adapter, *limits, more=more)


def _memories(result: MemoriesResult, own: Own) -> Iterator[Measured]:
    if own(result.model):
        for row in result.rows:
            yield from _memory(result, row)


def _memory(result: MemoriesResult, row: MemoryRow) -> Iterator[Measured]:
    """The perplexity of dense, or a memory's difference to dense."""
    after = f"{result.after:,} tokens after a prompt of {result.prompt:,}"
    held = {} if row.bytes_held is None else {"bytes_held": _short(row.bytes_held)}
    if row.difference is not None:
        alone = ", on these texts alone" if row.speaks_of == THESE_TEXTS else ""
        answer = f", margin ±{result.margin:g}: {row.answer}" if row.answer else ""
        what = f"{row.label} − dense, nats per token, {after}{alone}{answer}"
        low, high, level = row.low, row.high, result.level
        yield Measured("nll_difference", what, *_text(result.texts), row.difference, low, high, level, held)
    elif row.nll is not None:
        what = f"perplexity, {row.label}, {after}"
        yield Measured("perplexity", what, *_text(result.texts), perplexity(row.nll), more=held)


def _longcontext(result: LongContextResult, own: Own) -> Iterator[Measured]:
    if own(result.model):
        for row in result.rows:
            yield from _task(row)


def _task(row: LongContextRow) -> Iterator[Measured]:
    """The score of a cell, unless it is at the floor."""
    if row.floor or row.score is None:
        return
    what = f"long prompt, {row.label}, {row.length:,} tokens, question {row.question}"
    more = {} if row.contexts is None else {"contexts": row.contexts}
    limits = _around(row.score, row.score_stderr)
    yield Measured(row.metric or "score", what, row.task, None, row.score, *limits, more=more)


def _memories_of_namm(result: MemoriesResult, own: Own) -> Iterator[Measured]:
    """The rows of a NAMM and its controls; `own` gets the name of the artefact."""
    if result.artefact is not None and own(result.artefact):
        for row in filter(_is_of_namm, result.rows):
            for one in _memory(result, row):
                yield replace(one, what=f"{one.what}{_on(result.model, row.kept_share)}")


def _longcontext_of_namm(result: LongContextResult, own: Own) -> Iterator[Measured]:
    """The rows of a NAMM and its controls; `own` gets the name of the artefact."""
    if result.artefact is not None and own(result.artefact):
        for row in filter(_is_of_namm, result.rows):
            for one in _task(row):
                yield replace(one, what=f"{one.what}{_on(result.model, row.kept_share)}")


def _is_of_namm(row: MemoryRow | LongContextRow) -> bool:
    return row.label.partition("-")[0] == NAMM


def _on(model: str, kept: float | None) -> str:
    share = "" if kept is None else f", {100 * kept:.0f} % kept"
    return f", on {PurePath(model).name}{share}"


READERS: dict[type[Result], Read] = {
    VerdictResult: _verify,
    GridResult: _grid,
    PerplexityResult: _ppl,
    ZeroshotResult: _zeroshot,
    MemoriesResult: _memories,
    LongContextResult: _longcontext,
}
NAMM_READERS: dict[type[Result], Read] = {
    MemoriesResult: _memories_of_namm,
    LongContextResult: _longcontext_of_namm,
}


def _perplexity(
    texts: Sequence[Text],
    row: PolicyFields,
    nll: float | None,
    stderr: float | None,
    tokens: int | None,
    overflow: int,
) -> Iterator[Measured]:
    """exp(nll) and exp(nll ± 1.96 standard errors), over the `tokens` tokens after place `overflow`."""
    if nll is None:
        return
    scored = f"tokens that overflow {overflow}"
    # Results over different numbers of tokens are different results.
    what = f"perplexity, {row.name}, {scored if tokens is None else f'{tokens:,} {scored}'}"
    low, high = (None if end is None else perplexity(end) for end in _around(nll, stderr))
    known = {"sinks": row.sinks, "window": row.window, "keys_seen": row.keys_seen}
    more = {"nll": _short(nll), **{key: value for key, value in known.items() if value is not None}}
    yield Measured("perplexity", what, *_text(texts), perplexity(nll), low, high, more=more)


def _around(value: float, stderr: float | None) -> tuple[float | None, float | None]:
    """The ends of the 95 % interval."""
    return (None, None) if stderr is None else (value - 1.96 * stderr, value + 1.96 * stderr)


def _text(texts: Sequence[Text]) -> tuple[str, str]:
    return ", ".join(Path(text.file).name for text in texts), "+".join(text.sha256[:16] for text in texts)


def _known(value: float) -> bool:
    """False for a number that is not finite, and for a perplexity that is too large to be computed."""
    return math.isfinite(value) and value < perplexity(math.inf)


def _short(value: float | None) -> float | None:
    """Round to six digits; more are noise."""
    return None if value is None else float(f"{value:.6g}")
