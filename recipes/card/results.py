"""The results of `sink-eval … --json` for this model: rows of a table, and the card's `model-index`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import read_json
from sinkmodel.perplexity import perplexity

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

IN_REPORT_ALONE = ("sinks", "streameval", "latency", "latency --prefill")
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


Reader = Callable[[dict[str, Any], Own], Iterator[Measured]]


def read_results(paths: Sequence[Path], own: Own, readers: Mapping[str, Reader] | None = None) -> list[Measured]:
    """The numbers of this model in the files, each once. Prints a line for a file that holds only other models.

    Args:
        readers: by command; None: `READERS`, those of a model.

    Raises UserError for a file that `sink-eval --json` did not write.
    """
    readers = READERS if readers is None else readers
    found: dict[tuple[str, ...], Measured] = {}
    for path in paths:
        content = read_json(path)
        command = content.get("command") if isinstance(content, dict) else None
        if command in READERS and command not in readers:
            say(f"{path}: sink-eval {command} measures no memory; nothing of it is on the card")
            continue
        if command in IN_REPORT_ALONE:
            say(f"{path}: results of sink-eval {command} are shown only in a report; give it to sink-eval report")
            continue
        if not isinstance(command, str) or command not in READERS:
            raise UserError(f"{path} is not a result of sink-eval --json: its command is {command!r}")
        try:
            of_file = [one for one in readers[command](content, own) if _known(one.value)]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{path} is not what sink-eval {command} --json writes; measure it again") from None
        if not of_file:
            say(f"{path} names other models than this one: nothing of it is on the card")
        for one in of_file:
            found[one.metric, one.what, one.text, one.revision or ""] = one
    return list(found.values())


# --------------------------------------------------------------------------------------------------------- each command


def _ppl(content: dict[str, Any], own: Own) -> Iterator[Measured]:
    if own(content["model"]):
        for row in content["rows"]:
            yield from _perplexity(content, row, row["nll_after_overflow"], row["stderr_after_overflow"])


def _grid(content: dict[str, Any], own: Own) -> Iterator[Measured]:
    """The losses of this run alone, not the mean over runs with several seeds."""
    for row in content["rows"]:
        for run in row["runs"]:
            if own(run["run"]):
                yield from _perplexity(content, row, run.get("nll"), run.get("stderr"), max(content["budgets"]))


def _verify(content: dict[str, Any], own: Own) -> Iterator[Measured]:
    verdict = content["verdict"]
    pairs = content.get("pairs") or [content]  # results of older versions have one pair and no `pairs`
    if any(own(pair["sink"]) for pair in pairs) and verdict["difference"] is not None:
        what = f"{verdict['first']} − {verdict['second']}, nats per token after overflow"
        alone = verdict.get("speaks_of") == "these texts"
        what += ", on these texts alone" if alone else ""
        what += f", over {len(pairs)} pairs of runs" if len(pairs) > 1 else ""
        limits = {"low": verdict["low"], "high": verdict["high"], "level": content["level"]}
        more = {"answer": verdict["answer"], "margin": content["margin"], "tokens": verdict["tokens"]}
        more |= {"speaks_of": verdict["speaks_of"]} if "speaks_of" in verdict else {}
        what += f", margin ±{content['margin']:g}: {verdict['answer']}"
        yield Measured("nll_difference", what, *_text(content), verdict["difference"], **limits, more=more)
    for row in content["rows"]:
        if own(row["run"] if "run" in row else content[row["model"]]):
            yield from _perplexity(content, row, row["nll_after_overflow"], row["stderr_after_overflow"])


def _zeroshot(content: dict[str, Any], own: Own) -> Iterator[Measured]:
    if not own(content["model"]):
        return
    files = {file["task"]: file["sha256"][:16] for file in content.get("files", ())}
    for row in content["rows"]:
        if row["adapter"] is None:
            continue
        of_filter = "" if row["filter"] == "none" else f", {row['filter']}"
        limit = f", the first {row['questions']} questions" if content.get("limit") else ""
        low, high = (
            None if row["adapter_stderr"] is None else row["adapter"] + side * row["adapter_stderr"]
            for side in (-1.96, 1.96)
        )
        metric = {"acc": "accuracy"}.get(row["metric"], row["metric"])
        what = f"{row['metric']}{of_filter}, zero-shot{limit}"
        more = {"questions": row["questions"]}
        yield Measured(metric, what, row["task"], files.get(row["task"]), row["adapter"], low, high, more=more)


def _memories(content: dict[str, Any], own: Own) -> Iterator[Measured]:
    """The perplexity of dense, and each memory's difference to dense."""
    if not own(content["model"]):
        return
    after = f"{content['continue']:,} tokens after a prompt of {content['prompt']:,}"
    for row in content["rows"]:
        held = {} if row.get("bytes_held") is None else {"bytes_held": _short(row["bytes_held"])}
        if row["difference"] is None:
            what = f"perplexity, {row['label']}, {after}"
            yield Measured("perplexity", what, *_text(content), perplexity(row["nll"]), more=held)
            continue
        alone = ", on these texts alone" if row.get("speaks_of") == "these texts" else ""
        answer = f", margin ±{content['margin']:g}: {row['answer']}" if row["answer"] else ""
        what = f"{row['label']} − dense, nats per token, {after}{alone}{answer}"
        limits = {"low": row["low"], "high": row["high"], "level": content["level"]}
        yield Measured("nll_difference", what, *_text(content), row["difference"], **limits, more=held)


def _longcontext(content: dict[str, Any], own: Own) -> Iterator[Measured]:
    """Scores of the cells that are not at the floor."""
    if not own(content["model"]):
        return
    for row in content["rows"]:
        if row["floor"] or row["score"] is None:
            continue
        stderr = row.get("score_stderr")
        low, high = (None if stderr is None else row["score"] + side * stderr for side in (-1.96, 1.96))
        what = f"long prompt, {row['label']}, {row['length']:,} tokens, question {row['question']}"
        more = {} if row.get("contexts") is None else {"contexts": row["contexts"]}
        yield Measured(row.get("metric", "score"), what, row["task"], None, row["score"], low, high, more=more)


def _of_namm(read: Reader) -> Reader:
    """Of a command with memories the rows of a NAMM and its controls; `own` gets the name of the artefact."""

    def of_namm(content: dict[str, Any], own: Own) -> Iterator[Measured]:
        if content.get("artefact") is None or not own(content["artefact"]):
            return
        for row in content["rows"]:
            if row["label"].partition("-")[0] != NAMM:
                continue
            kept = row.get("kept_share")
            share = "" if kept is None else f", {100 * kept:.0f} % kept"
            for one in read({**content, "rows": [row]}, lambda name: True):
                yield replace(one, what=f"{one.what}, on {PurePath(content['model']).name}{share}")

    return of_namm


READERS: dict[str, Reader] = {
    "verify": _verify,
    "grid": _grid,
    "ppl": _ppl,
    "zeroshot": _zeroshot,
    "memories": _memories,
    "longcontext": _longcontext,
}
NAMM_READERS = {name: _of_namm(READERS[name]) for name in ("memories", "longcontext")}


def _perplexity(
    content: dict[str, Any], row: dict[str, Any], nll: float | None, stderr: float | None, overflow: int | None = None
) -> Iterator[Measured]:
    """exp(nll) and exp(nll ± 1.96 standard errors), over tokens after place `overflow` (None: the budget)."""
    if nll is None:
        return
    split = "" if row.get("window") is None else f" {row['sinks']}+{row['window']}"
    label = row.get("label") or row["policy"] + split  # results of older versions have no label
    count = row.get("tokens_after_overflow")  # results over different numbers of tokens are different results
    scored = f"tokens that overflow {overflow or content['budget']}"
    what = f"perplexity, {label}, {scored if count is None else f'{count:,} {scored}'}"
    low, high = (None, None) if stderr is None else (perplexity(nll - 1.96 * stderr), perplexity(nll + 1.96 * stderr))
    more = {"nll": _short(nll)} | {
        key: row[key] for key in ("sinks", "window", "keys_seen") if row.get(key) is not None
    }
    yield Measured("perplexity", what, *_text(content), perplexity(nll), low, high, more=more)


def _text(content: dict[str, Any]) -> tuple[str, str]:
    texts = content["texts"]
    return ", ".join(Path(text["file"]).name for text in texts), "+".join(text["sha256"][:16] for text in texts)


def _known(value: float) -> bool:
    """False for a number that is not finite, and for a perplexity that is too large to be computed."""
    return math.isfinite(value) and value < perplexity(math.inf)


def _short(value: float | None) -> float | None:
    """Round to six digits; more are noise."""
    return None if value is None else float(f"{value:.6g}")
