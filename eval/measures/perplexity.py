"""The perplexity of a model under each cache policy (`sink-eval ppl`).

The first N text tokens of each document are one stream. A sink model's sinks come before them; they are not counted in
N and are never scored. The first text token is not scored either, so that sink models and vanilla models are scored on
the same targets.

The query at position p predicts the token at p + 1. "After overflow" means the queries p ≥ C, which are the first to
have lost keys to eviction. With the paper's count of keys, the query at C has not lost any yet; it is included all the
same, so that all rows are means over the same queries.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from eval.measures.loading import load
from eval.measures.meters import PeakMemory
from eval.measures.statistics import block_stderr, by_position, mean
from eval.measures.texts import check_positions, fed, read_texts
from eval.policies.choice import choose
from eval.policies.options import check_stride
from eval.policies.policy import Policy
from sinkmodel.loading import LoadedModel
from sinkmodel.perplexity import perplexity
from sinkmodel.progress import CountedProgress
from sinkmodel.results.perplexity import PerplexityResult, PerplexityRow
from sinkmodel.sinks import kind_of


def run(options: argparse.Namespace) -> tuple[PerplexityResult, str]:
    """The result, and the model's sink in words. `options` are those of `eval.commands.ppl`."""
    loaded = load(options)
    sinks = len(loaded.sink_ids)
    check_stride(options.policies, options.stride, options.budget, sinks)
    texts, documents = read_texts(loaded, options.text, options.budget, options.tokens, options.documents)
    policies = choose(options.policies, options.sinks, options.budget, sinks, options.stride)
    within = f"--tokens {(loaded.positions or 0) - sinks + 1} stays within"
    check_positions(loaded, fed(documents), policies, within=within)
    rows = [
        measure(loaded, documents, policy, options.budget, options.chunk, f"{i}/{len(policies)} {policy.label}")
        for i, policy in enumerate(policies, 1)
    ]
    result = PerplexityResult(
        model=options.model,
        sink_ids=loaded.sink_ids,
        budget=options.budget,
        chunk=options.chunk,
        dtype=options.dtype,
        device=str(loaded.model.device),
        texts=texts,
        rows=rows,
    )
    return result, _sink_in_words(loaded)


def _sink_in_words(loaded: LoadedModel) -> str:
    if not loaded.sink_ids:
        return f"sink: {kind_of(loaded.model.config)}"
    return f"{' '.join(loaded.borrowed) or f'{len(loaded.sink_ids)} sink tokens'} in front"


def measure(
    loaded: LoadedModel, documents: Sequence[Sequence[int]], policy: Policy, budget: int, chunk: int, label: str
) -> PerplexityRow:
    """One row of the table, and of `rows` in the JSON result."""
    sinks = len(loaded.sink_ids)
    longest = max(len(ids) for ids in documents) - 1
    memory = PeakMemory(loaded.model.device)
    started = time.perf_counter()
    with CountedProgress(label, "tokens", sum(len(ids) - 1 for ids in documents)) as progress:
        losses = policy.score(loaded.model, documents, chunk, progress.add)
    seconds = time.perf_counter() - started
    first = sinks  # position of the first scored query: it is the first text token and predicts the second
    scored = [nll[first:] for nll in losses]
    after = [nll[max(first, budget) :] for nll in losses]
    nll, nll_after = mean(scored), mean(after)
    assert nll is not None, "a document that fills the budget has at least one token to score"
    return PerplexityRow(
        **vars(policy.row(longest)),
        documents=len(documents),
        tokens=sum(map(len, scored)),
        tokens_after_overflow=sum(map(len, after)),
        nll=nll,
        nll_after_overflow=nll_after,
        ppl=perplexity(nll),
        ppl_after_overflow=perplexity(nll_after),
        stderr=block_stderr(scored, budget),
        stderr_after_overflow=block_stderr(after, budget),
        tokens_per_second=sum(len(nll) for nll in losses) / seconds,
        peak_bytes=memory.peak(),
        by_position=by_position([(first, part) for part in scored]),
    )
