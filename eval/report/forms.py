"""The forms of the commands' JSON results, as far as a report reads them, and a check that a file has its form."""

from __future__ import annotations

import math
import re
from typing import Any

from sinkmodel.secrets import redacted

NUMBER, REAL, COUNT, TEXT, ANY = "a number or null", "a number", "a whole number", "a text", "anything"
BAD_LETTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # \t and \n are allowed


def _each(form: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, form)


TEXTS = [_each(TEXT, "file", "sha256")]
POLICY = {"policy": TEXT, "sinks": COUNT, "window": NUMBER, "label?": TEXT}
DIFFERENCE = {**_each(TEXT, "first", "second"), **_each(NUMBER, "tokens", "difference", "low", "high"), "answer": ANY}
OF_ATTENTION = ("sink_alpha", "sink_heads", "first_alpha", "first_heads", "sink_share", "first_share", "rest_share")
TIMES = _each(NUMBER, "ms_per_token", "ms_per_token_p99")
RATIO = _each(NUMBER, "value", "low", "high")
OF_ANSWER = _each(NUMBER, *(f"{what}_{of}" for what in ("step", "total") for of in ("ms", "ratio", "low", "high")))
OF_TOKENS = {"tokens": COUNT, "kept_share": NUMBER}
EVERY = {"command_line?": TEXT}  # in the result of every command
# A list has one form for all its items, a tuple has one form for each item. A name with "?" may be missing. A measured
# number may be None: it was not measured, or it was not finite.
FORMS: dict[str, dict[str, Any]] = {
    "ppl": {
        "model": TEXT,
        "budget": COUNT,
        "texts?": TEXTS,
        "rows": [
            {
                **POLICY,
                **_each(NUMBER, "tokens", "nll", "nll_after_overflow", "stderr_after_overflow"),
                "by_position": [(COUNT, COUNT, NUMBER)],
            }
        ],
    },
    "verify": {
        **_each(TEXT, "sink", "vanilla"),
        **_each(REAL, "margin", "level"),
        "budget": COUNT,
        "texts": TEXTS,
        "warnings": [TEXT],
        "verdict": {
            **DIFFERENCE,
            **_each(NUMBER, "more_tokens", "documents", "stderr_runs?", "stderr_texts?"),
            "runs?": COUNT,
            "resampled": ANY,
            "speaks_of?": ANY,
            "why?": TEXT,
        },
        "pairs?": [{**_each(TEXT, "sink", "vanilla"), **DIFFERENCE}],
        "comparisons": [{"model": TEXT, "why?": TEXT, **DIFFERENCE}],
        "rows": [
            {"model": TEXT, "run?": TEXT, **POLICY, **_each(NUMBER, "nll_after_overflow", "stderr_after_overflow")}
        ],
    },
    "grid": {
        **_each([COUNT], "budgets", "sinks"),
        "models": ANY,
        "level": REAL,
        "texts": TEXTS,
        "warnings?": [TEXT],
        "rows": [
            {
                **_each(TEXT, "model", "sink"),
                **_each(COUNT, "sinks", "budget"),
                **_each(NUMBER, "ppl_after_overflow", "ppl_low", "ppl_high", "paper_ppl"),
                "runs": [{"run": TEXT}],
            }
        ],
    },
    "sinks": {
        **_each(COUNT, "length", "sequences"),
        "model": TEXT,
        "epsilon": NUMBER,
        "texts": TEXTS,
        "born?": {"target": TEXT, **_each(NUMBER, "threshold", "step", "tokens")},
        "rows": [
            {
                **_each(NUMBER, *OF_ATTENTION, "largest", "times_median"),
                **_each(COUNT, "layer?", "step?", "tokens?"),
                "heads?": [{"head": COUNT, **_each(NUMBER, *OF_ATTENTION)}],
            }
        ],
    },
    "streameval": {
        **_each(TEXT, "model", "task"),
        "texts?": TEXTS,
        "distractors?": COUNT,
        "rows": [
            {
                **_each(TEXT, "policy", "label"),
                **_each(NUMBER, "budget", "accuracy", "accuracy_stderr", "nll", "nll_stderr"),
                **_each(NUMBER, "distance?", "tokens_back_most?", "kept?", "rank?", "rank_stderr?"),
                **_each(NUMBER, "difference?", "difference_stderr?"),
            }
        ],
    },
    "zeroshot": {
        "model": TEXT,
        "files?": TEXTS,
        "rows": [
            {
                **_each(TEXT, "task", "metric", "filter"),
                **_each(NUMBER, "stock", "stock_stderr", "adapter", "adapter_stderr", "paper"),
                "questions": COUNT,
            }
        ],
    },
    "latency": {
        **_each(TEXT, "model", "dtype", "device"),
        "threads": COUNT,
        "rows": [{**_each(TEXT, "policy", "label"), "budget": COUNT, "peak_bytes": NUMBER, **TIMES}],
        "ratios": [{"ratio": TEXT, **_each(COUNT, "budget", "rounds"), **RATIO}],
        "stream": [{"label": TEXT, "seen": COUNT, "resident_bytes": NUMBER, **TIMES, **RATIO}],
    },
    "latency --prefill": {
        **_each(TEXT, "model", "dtype", "device"),
        **_each(COUNT, "threads", "weights_bytes"),
        "rows": [
            {
                "label": TEXT,
                **_each(COUNT, "length", "rounds"),
                **_each(NUMBER, "ttft_ms", "ttft_ratio", "ttft_low", "ttft_high"),
                **_each(NUMBER, "peak_bytes", "reading_bytes", "bytes_held", "bytes_grown"),
                "answers": [{"answer": COUNT, **OF_ANSWER}],
            }
        ],
        "crossovers": [
            {
                **_each(TEXT, "first", "second"),
                **_each(COUNT, "length", "rounds"),
                **_each(NUMBER, "crossover", "low", "high"),
            }
        ],
    },
    "memories": {
        "model": TEXT,
        **_each(COUNT, "prompt", "continue"),
        **_each(REAL, "margin", "level"),
        "texts": TEXTS,
        "rows": [
            {
                **_each(TEXT, "memory", "label"),
                **_each(NUMBER, "budget", "tokens", "nll", "difference", "low", "high"),
                **_each(NUMBER, "bytes_held", "bytes_kept", "kept_share?", "prefill_ratio", "decode_ratio"),
                "answer": ANY,
            }
        ],
        "forgets?": {
            "prompts": COUNT,
            "kinds": [{"kind": TEXT, **OF_TOKENS}],
            "ages": [{"from": COUNT, **OF_TOKENS}],
            "heads": [[NUMBER]],
        },
    },
    "longcontext": {
        "model": TEXT,
        "rows": [
            {
                **_each(TEXT, "task", "label", "question"),
                "length": COUNT,
                "floor": ANY,
                **_each(
                    NUMBER, *(f"{name}{of}" for name in ("score", "nll") for of in ("", "_difference", "_low", "_high"))
                ),
                "bytes_held": NUMBER,
            }
        ],
    },
}


def clean(value: Any) -> Any:
    """JSON that is safe for a page: NaN and infinity become None, control characters become U+FFFD.

    Credentials in addresses are redacted.
    """
    if isinstance(value, dict):
        return {clean(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [clean(inner) for inner in value]
    if isinstance(value, str):
        return redacted(BAD_LETTERS.sub("\ufffd", value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mismatch(form: Any, value: Any, where: str = "") -> str | None:
    """A phrase that names the first place where a value does not have its form; None if it has."""
    place = where.lstrip(".") or "it"
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{place} is not an object"
        for key, inner in form.items():
            name = key.rstrip("?")
            if name not in value:
                if not key.endswith("?"):
                    return f"{place} has no {name}"
            elif found := mismatch(inner, value[name], f"{where}.{name}"):
                return found
        return None
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is not a list"
        return next(filter(None, (mismatch(form[0], inner, f"{where}[{i}]") for i, inner in enumerate(value))), None)
    if isinstance(form, tuple):
        if not isinstance(value, list) or len(value) != len(form):
            return f"{place} is not a list of {len(form)}"
        return next(filter(None, map(mismatch, form, value, [where] * len(form))), None)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = {
        NUMBER: value is None or number,
        REAL: number,
        COUNT: number and isinstance(value, int),
        TEXT: isinstance(value, str),
        ANY: True,
    }
    return None if good[form] else f"{place} is not {form}"
