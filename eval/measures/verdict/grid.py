"""`sink-eval grid`: models × S+W × budgets, with seeds as an axis: StreamingLLM's Tables 2, 3 and 6 in one run.

A model is a group of twin runs that differ only in their seeds. Each number is the mean over the runs, with Student's t
interval over them; it holds for other runs on these texts, not for other texts. All numbers of a grid are means over
the same targets, those that have overflowed at its largest budget, so that rows can be compared along every axis. If
the paper has a number for a cell's model, budget and S, it is printed below the cell (`paper`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    give_result,
    load,
    new_table,
    number,
    show,
)
from eval.measures.texts import (
    add_text_argument,
    check_files,
    check_positions,
    check_same_tokens,
    fed,
    read_texts,
    repeated,
)
from eval.policies.choice import check
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, positive, whole

if TYPE_CHECKING:
    from eval.measures.verdict.paired import Documents
    from eval.measures.verdict.training import Provenance
    from sinkmodel.loading import LoadedModel

DESCRIPTION = "Perplexity after overflow of models × S+W × budgets, with mean and interval over twin runs."
EXAMPLE = (
    "sink-eval grid --models none=runs/none-1,runs/none-2 token=runs/token-1,runs/token-2 --sinks 0 1 4 "
    "--budgets 64 256 --text books-test.jsonl"
)
LEVEL = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        required=True,
        nargs="+",
        type=_group,
        metavar="NAME=RUN,RUN…",
        help=f"a name and its twin runs, trained with different seeds; or one run without a name: {MODEL_HELP}",
    )
    parser.add_argument(
        "--sinks", type=whole, nargs="+", default=[0, 1, 2, 4], metavar="S", help="first keys that are never evicted"
    )
    parser.add_argument(
        "--budgets",
        type=positive,
        nargs="+",
        default=[64, 128, 256],
        metavar="C",
        help="keys a query sees, including the sinks (default: 64 128 256)",
    )
    add_text_argument(parser, "--texts")
    parser.add_argument("--tokens", type=positive, metavar="N", help="text tokens of each document (default: all)")
    parser.add_argument(
        "--chunk", type=positive, default=256, metavar="N", help="queries computed together; changes only the speed"
    )
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> None:
    sinks, budgets = list(dict.fromkeys(options.sinks)), sorted(set(options.budgets))
    _check(options, sinks, budgets)
    from eval.measures.verdict.training import in_training, not_seeds

    kinds, texts, documents, provenances = _look(options, sinks, budgets)
    warnings = [
        *(warning for _, runs in options.models for warning in not_seeds({one: provenances[one] for one in runs})),
        *in_training(provenances, texts, documents),
    ]
    for warning in warnings:
        say(f"warning: {warning}")
    scored = {name: _score(name, runs, documents, sinks, budgets, options) for name, runs in options.models}
    rows = [
        _row(name, kinds[name], provenances[runs[0]["run"]]["shape"], policy, runs, documents, budgets[-1])
        for name, of_model in scored.items()
        for policy, runs in of_model.items()
    ]
    content = {
        "command": "grid",
        "models": dict(options.models),
        "budgets": budgets,
        "sinks": sinks,
        "level": LEVEL,
        "chunk": options.chunk,
        "dtype": options.dtype,
        "texts": texts,
        "warnings": warnings,
        "rows": rows,
    }
    give_result(options, content, lambda: print_table(content))


def _group(text: str) -> tuple[str, list[str]]:
    """Parse a value of --models: `name=run,run`, or one run, which is its own name."""
    name, equals, listed = text.partition("=")
    runs = [name_of(run) for run in (listed.split(",") if equals else [text])]
    if not name or not all(runs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RUN,RUN…")
    if repeated(runs):
        raise argparse.ArgumentTypeError(f"{text!r} has a run twice, which is not another seed")
    return name, runs


# ---------------------------------------------------------------------------------------------------- what is checked


def _check(options: argparse.Namespace, sinks: Sequence[int], budgets: Sequence[int]) -> None:
    check(sinks, budgets[0], "--budgets")
    if twice := repeated([name for name, _ in options.models]):
        raise UserError(f"--models has {twice} twice; give all its runs at once, as {twice}=RUN,RUN")
    if options.tokens is not None and options.tokens <= budgets[-1] + 1:
        raise UserError(
            f"--tokens {options.tokens} does not overflow --budgets {budgets[-1]}; raise one or lower the other"
        )
    check_files(options.text)
    check_output("--json", options.json)


def _look(
    options: argparse.Namespace, sinks: Sequence[int], budgets: Sequence[int]
) -> tuple[dict[str, str], list[dict[str, Any]], Documents, dict[str, Provenance]]:
    """Load every run once before any is scored.

    Returns the kind of each model's sink, a summary of the texts, their tokens without sinks, and the provenance of
    each run. Raises UserError if runs of one model have different sinks, if models have different tokenizers, or if a
    model has too few positions.
    """
    from eval.measures.verdict.paired import streaming
    from eval.measures.verdict.training import training_of

    first: LoadedModel | None = None
    kinds: dict[str, str] = {}
    texts: list[dict[str, Any]] = []
    documents: Documents = []
    provenances: dict[str, Provenance] = {}
    for name, runs in options.models:
        for one in runs:
            loaded = load(options, one)
            kind = _kind(loaded)
            if kinds.setdefault(name, kind) != kind:
                raise UserError(f"--models {name} mixes sinks: {runs[0]} has {kinds[name]}, {one} has {kind}")
            if first is None:
                first = loaded
                texts, read = read_texts(loaded, options.text, budgets[-1], options.tokens, None, "--budgets")
                documents = [ids[len(loaded.sink_ids) :] for ids in read]
                if max(map(len, documents)) <= budgets[-1] + 1:
                    raise UserError(
                        f"--text is too short: no document overflows --budgets {budgets[-1]}; give one of "
                        f"{budgets[-1] + 2} tokens or more, or lower the budgets"
                    )
            check_same_tokens(first, loaded, options.text)
            check_positions(loaded, fed(documents), [streaming(max(sinks), budgets[-1])], "--budgets")
            provenances[one] = training_of(loaded)
    return kinds, texts, documents, provenances


def _kind(loaded: LoadedModel) -> str:
    """The kind of sink, named as in `paper`; `none` for a vanilla or third-party model."""
    from sinkmodel.sinks import kind_of

    kind = kind_of(loaded.model.config)
    return f"token ×{len(loaded.sink_ids)}" if kind == "token" else kind


# --------------------------------------------------------------------------------------------------- what is measured


def _score(
    name: str,
    runs: Sequence[str],
    documents: Documents,
    sinks: Sequence[int],
    budgets: Sequence[int],
    options: argparse.Namespace,
) -> dict[Any, list[dict[str, Any]]]:
    """For each policy, the mean loss of each run. Only one model is in memory at a time."""
    import torch

    from eval.measures.statistics import block_stderr, mean
    from eval.measures.verdict.paired import Side, after, losses, streaming

    policies = [streaming(count, budget) for budget in budgets for count in sinks]
    by_policy: dict[Any, list[dict[str, Any]]] = {policy: [] for policy in policies}
    for place, one in enumerate(runs, 1):
        loaded = load(options, one)
        for policy in policies:
            task = f"run {place}/{len(runs)}, {policy.label}"
            side = Side(name, loaded, policy.sinks)
            late = [
                torch.from_numpy(x) for x in after(losses(side, policy, documents, options.chunk, task), budgets[-1])
            ]
            nll = mean(late)
            assert nll is not None, "documents overflow the largest budget"
            stderr = block_stderr(late, policy.budget)
            by_policy[policy].append({"run": one, "nll": nll, "stderr": stderr})
    return by_policy


def _row(
    name: str,
    kind: str,
    shape: dict[str, Any],
    policy: Any,
    runs: list[dict[str, Any]],
    documents: Documents,
    overflow: int,
) -> dict[str, Any]:
    from eval.measures.verdict.paper import of_paper
    from sinkmodel.perplexity import perplexity

    nll, low, high = over_runs([one["nll"] for one in runs])
    return {
        "model": name,
        "sink": kind,
        **policy.row(max(map(len, documents))),
        "documents": len(documents),
        "tokens_after_overflow": sum(max(0, len(ids) - 1 - overflow) for ids in documents),
        "nll_after_overflow": nll,
        "nll_low": low,
        "nll_high": high,
        "ppl_after_overflow": perplexity(nll),
        "ppl_low": perplexity(low),
        "ppl_high": perplexity(high),
        "runs": runs,
        "paper_ppl": of_paper(shape, kind, policy.budget, policy.sinks),
    }


def over_runs(values: Sequence[float], level: float = LEVEL) -> tuple[float, float | None, float | None]:
    """The mean over runs, and the ends of Student's interval for other such runs; both ends are None for one run."""
    from scipy import stats

    center = math.fsum(values) / len(values)
    if len(values) < 2:
        return center, None, None
    stderr = math.sqrt(math.fsum((x - center) ** 2 for x in values) / (len(values) - 1) / len(values))
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * stderr
    return center, center - reach, center + reach


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(content: dict[str, Any]) -> None:
    """One line per model and budget, one column per S; below a line the paper's numbers, if it has them."""
    caption = (
        f"S+: the first S keys and the latest C − S; [{100 * content['level']:g} % interval for other runs on these "
        "texts]"
    )
    if any(row["paper_ppl"] for row in content["rows"]):
        caption += (
            "; paper: StreamingLLM, Tables 2, 3 and 6, on another text (PG-19): compare the pattern, not the numbers"
        )
    table = new_table(
        f"perplexity over tokens that have overflowed {content['budgets'][-1]}, {content['dtype']}",
        caption,
        ["model", "sink"],
        ["runs", "C", *(f"{count}+" for count in content["sinks"])],
    )
    for name, runs in content["models"].items():
        for budget in content["budgets"]:
            rows = [row for row in content["rows"] if (row["model"], row["budget"]) == (name, budget)]
            table.add_row(name, rows[0]["sink"], str(len(runs)), str(budget), *map(_cell, rows))
            papers = [row["paper_ppl"] for row in rows]
            if any(papers):
                numbers = [number(ppl, ",.2f") for ppl in papers]
                table.add_row("  paper", rows[0]["sink"], "1", str(budget), *numbers, style="dim")
    show(table)


def _cell(row: dict[str, Any]) -> str:
    cell = f"{row['ppl_after_overflow']:,.2f}"
    return cell if row["ppl_low"] is None else f"{cell} [{row['ppl_low']:,.2f}, {row['ppl_high']:,.2f}]"
