"""Perplexities of models × S+W × budgets (`sink-eval grid`): StreamingLLM's Tables 2, 3 and 6 in one run.

A model is a group of twin runs that differ only in their seeds. Each number is the mean over the runs, with Student's t
interval over them; it holds for other runs on these texts, not for other texts. All numbers of a grid are means over
the same targets, those that have overflowed at its largest budget, so that rows can be compared along every axis. If
the paper has a number for a cell's model, budget and S, it is printed below the cell (`paper`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats

from eval.measures.loading import load
from eval.measures.statistics import block_stderr, mean
from eval.measures.texts import check_positions, check_same_tokens, fed, read_texts
from eval.measures.verdict.paired import Documents, Side, after, losses, streaming
from eval.measures.verdict.paper import of_paper
from eval.measures.verdict.training import Provenance, in_training, not_seeds, training_of
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.perplexity import perplexity
from sinkmodel.results.parts import Text
from sinkmodel.results.perplexity import GridResult, GridRow, GridRun
from sinkmodel.sinks import kind_of

LEVEL = 0.95


def run(options: argparse.Namespace, sinks: list[int], budgets: list[int]) -> GridResult:
    """The result. `options` are those of `eval.commands.grid`; `budgets` are in increasing order."""
    kinds, texts, documents, provenances = _look(options, sinks, budgets)
    warnings = [
        *(warning for _, runs in options.models for warning in not_seeds({one: provenances[one] for one in runs})),
        *in_training(provenances, texts, documents),
    ]
    for warning in warnings:
        say(f"warning: {warning}")
    scored = {name: _score(name, runs, documents, sinks, budgets, options) for name, runs in options.models}
    rows = [
        _row(name, kinds[name], provenances[runs[0].run]["shape"], policy, runs, documents, budgets[-1])
        for name, of_model in scored.items()
        for policy, runs in of_model.items()
    ]
    return GridResult(
        models=dict(options.models),
        budgets=budgets,
        sinks=sinks,
        level=LEVEL,
        chunk=options.chunk,
        dtype=options.dtype,
        texts=texts,
        warnings=warnings,
        rows=rows,
    )


def _look(
    options: argparse.Namespace, sinks: Sequence[int], budgets: Sequence[int]
) -> tuple[dict[str, str], list[Text], Documents, dict[str, Provenance]]:
    """Load every run once before any is scored.

    Returns the kind of each model's sink, a summary of the texts, their tokens without sinks, and the provenance of
    each run. Raises UserError if runs of one model have different sinks, if models have different tokenizers, or if a
    model has too few positions.
    """
    first: LoadedModel | None = None
    kinds: dict[str, str] = {}
    texts: list[Text] = []
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
) -> dict[Any, list[GridRun]]:
    """For each policy, the mean loss of each run. Only one model is in memory at a time."""
    policies = [streaming(count, budget) for budget in budgets for count in sinks]
    by_policy: dict[Any, list[GridRun]] = {policy: [] for policy in policies}
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
            by_policy[policy].append(GridRun(run=one, nll=nll, stderr=stderr))
    return by_policy


def _row(
    name: str,
    kind: str,
    shape: dict[str, Any],
    policy: Any,
    runs: list[GridRun],
    documents: Documents,
    overflow: int,
) -> GridRow:
    nll, low, high = over_runs([one.nll for one in runs if one.nll is not None])
    return GridRow(
        model=name,
        sink=kind,
        **vars(policy.row(max(map(len, documents)))),
        documents=len(documents),
        tokens_after_overflow=sum(max(0, len(ids) - 1 - overflow) for ids in documents),
        nll_after_overflow=nll,
        nll_low=low,
        nll_high=high,
        ppl_after_overflow=perplexity(nll),
        ppl_low=perplexity(low),
        ppl_high=perplexity(high),
        runs=runs,
        paper_ppl=of_paper(shape, kind, policy.budget, policy.sinks),
    )


def over_runs(values: Sequence[float], level: float = LEVEL) -> tuple[float, float | None, float | None]:
    """The mean over runs, and the ends of Student's interval for other such runs; both ends are None for one run."""
    center = math.fsum(values) / len(values)
    if len(values) < 2:
        return center, None, None
    stderr = math.sqrt(math.fsum((x - center) ** 2 for x in values) / (len(values) - 1) / len(values))
    reach = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * stderr
    return center, center - reach, center + reach
