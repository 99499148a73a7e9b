"""Tests whether two series of losses, token by token on the same text, are equivalent. Pure statistics.

The input is the paired differences d = a − b, one series per document. The interval assumes this model:

    d[document, t] = μ + u[document] + e[document, t],      u independent with variance σ²_u, e autocorrelated

The moving-block bootstrap (Künsch 1989) resamples e in overlapping blocks of `block` tokens, which keeps the dependence
between neighbouring tokens. Documents are resampled first, since two texts differ by more than the noise of their
tokens. Resampling both unchanged would count the noise within documents twice, since a document's mean contains it. So
each document's deviation from the overall mean is first reduced, so that about σ²_u is left of its variance. From the
blocks the document's mean is subtracted; since that lowers their variance, they are scaled up again (Davison & Hinkley
1997, section 3.8; Carpenter, Goldstein & Rasbash 2003).

With few blocks or documents the bootstrap underestimates the variance. So the interval is stretched from the normal
quantile to Student's (after Hesterberg 2015, section 5.3). The degrees of freedom are those of the documents, or of the
blocks if the estimate of σ²_u is 0 or only blocks are resampled. If only a few documents are long, the degrees of
freedom are few: three books among a hundred pages tell us hardly more about σ²_u than three books alone (`_freedom`).

A pair of twins is a run of each of two models. Several pairs that read the same texts differ by their seeds as well.
The differences are averaged over the pairs, which gives an interval as above, for these runs on other texts. The spread
of the pairs' means gives the error over runs on these texts. Each error is multiplied by Student's quantile at its own
degrees of freedom, then the two are added as squares (`over_runs`), so that the interval covers at least as often as
its level, whichever error is larger. Noise of tokens that differs from pair to pair is in both errors, which makes the
interval wider still.

If the documents weigh less than DOCUMENTS of one length, σ²_u cannot be estimated. Then only blocks are resampled, and
the interval holds for these texts, not for others (`speaks_of`). The same is done if the caller asks about these texts
only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

Series = npt.NDArray[np.floating]
Answer = Literal["equivalent", "better", "worse", "undecided"]
SpeaksOf = Literal["these texts", "other texts"]

BLOCKS = 5  # blocks alone give an interval if they are at least this many (`enough`)
DOCUMENTS = 5  # documents that weigh less than this many of one length are not resampled
RESAMPLES = 5000
AT_ONCE = 1 << 22  # random numbers drawn together
MOST = 1e6  # for several runs, an answer that needs more than this many times the text is out of reach
TINY = 1e-300  # smallest half-width: the mean may lie at an end of its bootstrap interval, or outside it


@dataclass(frozen=True)
class Interval:
    """The mean of all differences and its confidence interval, in the unit of the series."""

    mean: float
    low: float
    high: float
    stderr: float
    level: float
    tokens: int
    blocks: int  # whole blocks in all series
    documents: int
    resampled: Literal["documents and blocks", "documents", "blocks"]
    freedom: float  # degrees of freedom of Student's quantile for the error over texts; for runs they are runs − 1
    runs: int = 1  # pairs of twin runs
    stderr_runs: float | None = None  # standard error of the mean over other runs on these texts; None for one run
    stderr_texts: float | None = None  # … over other texts with these runs

    @property
    def speaks_of(self) -> SpeaksOf:
        """The texts that the interval holds for: others like these only if documents were resampled."""
        return "these texts" if self.resampled == "blocks" else "other texts"


def interval(
    series: Sequence[Series],
    block: int,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
    these_texts: bool = False,
) -> Interval | None:
    """The confidence interval of the mean difference on texts like these; None if the series are too few or too short.

    Args:
        series: the differences, one array per document, in the order of the text; empty arrays are ignored.
        block: tokens per block. A block must not be shorter than the cache's memory: a key stays for up to C tokens.
        level: coverage of the two-sided interval.
        seed: random seed of the resampling.
        resamples: number of bootstrap texts.
        these_texts: answer for these documents only: documents are not resampled, only blocks.
    """
    series = [np.asarray(d, dtype=np.float64) for d in series if len(d)]
    if not enough([len(d) for d in series], block, these_texts):
        return None
    length = np.array([len(d) for d in series], dtype=np.float64)
    mean = np.array([d.mean() for d in series])
    total, center = length.sum(), float(np.average(mean, weights=length))
    draw_documents = not these_texts and is_sample(length)
    pool, noise, freedom = _blocks(series, mean, block)
    if draw_documents:
        spread = _spread(length, mean, center, noise)
        if spread > 0 or not len(pool):
            freedom = _freedom(length)
        apart = (mean - center) * _shrink(length, spread, noise, len(pool) > 0)
        mean = center + apart - np.average(apart, weights=length)  # short documents shrink more than long ones
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(list(_drawn_means(length, mean, pool, block, draw_documents, resamples, rng)))
    tail = (1 - level) / 2
    stretch = stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    low, high = center + stretch * (np.quantile(drawn, [tail, 1 - tail]) - center)
    return Interval(
        mean=center,
        low=float(low),
        high=float(high),
        stderr=float(drawn.std()),
        level=level,
        tokens=int(total),
        blocks=int((length // block).sum()),
        documents=len(series),
        resampled="blocks" if not draw_documents else "documents and blocks" if len(pool) else "documents",
        freedom=float(freedom),
    )


def over_runs(found: Interval, means: Sequence[float]) -> Interval:
    """The interval for other runs on other texts.

    For errors e with f degrees of freedom each, the half-width is √(Σ t²_f e²), t_f Student's quantile (Banerjee 1960,
    "On confidence interval for two-means problem …", Sankhyā 22). It covers at least as often as its level, for
    every ratio of the variances: with shares w of the true variance, V = χ²_f / f and G the distribution function of
    χ²_1, the coverage is E G(Σ w t²_f V) ≥ Σ w E G(t²_f V) = level, since G is concave. Satterthwaite's method, one
    quantile at estimated degrees of freedom, does not guarantee this: with two runs it covers 87 % at a nominal 95 %,
    since two runs that are alike by chance look like a small error that is well known.

    Args:
        found: the interval for the differences averaged over the runs.
        means: the mean difference of each run.
    """
    if len(means) < 2:
        return found
    stderr_runs = math.sqrt(np.var(means, ddof=1) / len(means))
    reach = math.hypot(
        _quantile(found.level, found.freedom) * found.stderr, _quantile(found.level, len(means) - 1) * stderr_runs
    )
    return replace(
        found,
        low=found.mean - reach,
        high=found.mean + reach,
        stderr=math.hypot(found.stderr, stderr_runs),
        runs=len(means),
        stderr_runs=stderr_runs,
        stderr_texts=found.stderr,
    )


def is_sample(lengths: Sequence[int] | Series) -> bool:
    """Whether documents of these lengths can represent other texts: they weigh at least DOCUMENTS of one length."""
    length = np.array([n for n in lengths if n], dtype=np.float64)
    return len(length) > 0 and effective_documents(length) >= DOCUMENTS


def effective_documents(length: Series) -> float:
    """How many documents of one length would estimate the mean equally well (Kish's 1 / Σ w²)."""
    return float(length.sum() ** 2 / (length**2).sum())


def enough(lengths: Sequence[int], block: int, these_texts: bool = False) -> bool:
    """Whether series of these lengths give an interval: there are enough documents, or enough blocks within them."""
    blocks = sum(n / block - 1 for n in lengths if n >= 2 * block) + 1
    return blocks >= BLOCKS or (not these_texts and is_sample(lengths))


def decide(found: Interval, margin: float) -> Answer:
    """Is a as good as b? The answer for differences of losses a − b is the first of these four that applies.

    equivalent   the whole interval lies within ±margin. It may exclude zero; then the difference is too small to
                 matter. This is two one-sided tests (Schuirmann 1987), each at (1 − level) / 2
    better       the whole interval lies below zero, but not within the margin: a has the lower loss
    worse        the whole interval lies above zero, but not within the margin
    undecided    the interval contains zero, and also a difference that would matter
    """
    if -margin <= found.low and found.high <= margin:
        return "equivalent"
    if found.high < 0:
        return "better"
    if found.low > 0:
        return "worse"
    return "undecided"


def answer_to(found: Interval, margin: float, these_texts: bool) -> Answer:
    """As `decide`; undecided if the question is about other texts, and the interval holds for these texts only."""
    return decide(found, margin) if these_texts or found.speaks_of == "other texts" else "undecided"


def no_sample(lengths: Sequence[int]) -> str:
    """A message: why documents of these lengths cannot represent other texts, and what to do."""
    used = [length for length in lengths if length]
    weight = effective_documents(np.array(used, dtype=np.float64))
    present = f"{len(used)} document{'s' if len(used) != 1 else ''}"
    if weight < len(used) - 0.005:
        present += f" of unequal length weigh as much as {math.floor(100 * weight) / 100:g} of one length"
    more = 0
    while not is_sample([*used, *[max(used)] * more]):
        more += 1
    return (
        f"{present}, and an answer for other texts needs {DOCUMENTS}; give {more} more as long as the longest, or ask "
        "about these alone with --these-texts"
    )


def more_tokens(found: Interval, margin: float) -> int | None:
    """How many more tokens of such text would give an answer, if the mean stayed the same; 0 if there is one already.

    There is an answer as soon as the interval lies within the margin or excludes zero. For one run the interval shrinks
    about the mean as one over the square root of the tokens. For several runs only the error over texts shrinks; the
    error over runs stays. Returns None if no amount of text would give an answer, or for several runs if more than MOST
    times the present text would be needed.
    """
    if decide(found, margin) != "undecided":
        return 0
    below, above = (max(reach, TINY) for reach in (found.mean - found.low, found.high - found.mean))
    within = min(
        (margin + found.mean) / below, (margin - found.mean) / above
    )  # scale of the interval that brings it within the margin
    apart = found.mean / below if found.mean > 0 else -found.mean / above  # … that excludes zero
    scale = max(within, apart)
    if scale <= 0:
        return None
    if found.runs == 1:
        return max(1, math.ceil(found.tokens * (scale**-2 - 1)))
    assert found.stderr_runs is not None
    of_runs = (_quantile(found.level, found.runs - 1) * found.stderr_runs) ** 2
    left = (scale * above) ** 2 - of_runs  # remains for the error over texts
    times = (above**2 - of_runs) / left if left > 0 else math.inf
    return max(1, math.ceil(found.tokens * (times - 1))) if times <= MOST else None


# -------------------------------------------------------------------------------------------- how it is estimated


def _quantile(level: float, freedom: float) -> float:
    """Student's quantile for a two-sided interval of this level."""
    return float(stats.t.ppf((1 + level) / 2, freedom))


def _freedom(length: Series) -> float:
    """Satterthwaite's degrees of freedom of documents resampled by weight: n − 1 for n of one length.

    Resampling gives the overall mean the variance V = Σ w²(m − Σ w m)², with document means m and weights w. V is a
    quadratic form in m with the matrix A[i, j] = w[i] w[j] (δ[i, j] − w[i] − w[j] + Σ w²). For normal m of one variance
    it has 2 (E V)² / Var V = (tr A)² / tr A² degrees of freedom (Bell & McCaffrey 2002). The simpler (Σ w²)² / Σ w⁴ is
    for V about a known mean, and would be n for n of one length. `effective_documents` is different: it describes the
    variance of the mean, not how well V is known.

    The sums use integers, since the terms nearly cancel if one document holds nearly all tokens, and so that five
    documents of one length have exactly 4 degrees of freedom.
    """
    whole = [int(n) for n in length]
    if len(whole) == 1:
        return 0.0
    n1, n2, n3, n4, n5 = (sum(n**power for n in whole) for power in range(1, 6))
    trace = n2 * n1**2 - 2 * n3 * n1 + n2**2  # times n1⁴, since w = n / n1
    trace_of_square = n4 * n1**4 - 4 * n5 * n1**3 + (4 * n2 * n4 + 2 * n3**2) * n1**2 - 4 * n2**2 * n3 * n1 + n2**4
    return trace**2 / trace_of_square


def _blocks(series: Sequence[Series], mean: Series, block: int) -> tuple[Series, float, float]:
    """The means of all moving blocks, centred by document; their noise per token; its degrees of freedom.

    The noise v is the long-run variance of e: the mean of n tokens of a document has the variance v / n. A document
    shorter than two blocks contributes no blocks; the blocks of the others stand in for its noise.
    """
    pool, squares, freedom = [np.empty(0)], 0.0, 0.0
    for d, center in zip(series, mean):
        if (count := len(d) / block) >= 2:
            sums = np.concatenate([[0.0], np.cumsum(d - center)])
            means = (sums[block:] - sums[:-block]) / block
            means = (means - means.mean()) * math.sqrt(count / (count - 1))
            pool.append(means)
            squares += float((means**2).sum())
            freedom += count - 1
    every = np.concatenate(pool)
    return every, (block * squares / len(every) if len(every) else 0.0), freedom


def _spread(length: Series, mean: Series, center: float, noise: float) -> float:
    """σ²_u by the method of moments: the part of V (see `_freedom`) that noise does not explain, at least 0.

    V gives long documents the most weight. This is intended: if many documents are shorter than the memory of e, their
    noise is less well known.
    """
    weight = length / length.sum()
    between = float((weight**2 * (mean - center) ** 2).sum())
    return max(0.0, (between - noise * (1 - (weight**2).sum()) / length.sum()) / _trace(weight))


def _trace(weight: Series) -> float:
    """tr A of `_freedom`: E V for means of variance 1. Below Σ w², since each mean pulls the overall mean to it."""
    return float((weight**2 * (1 - 2 * weight + (weight**2).sum())).sum())


def _shrink(length: Series, spread: float, noise: float, has_blocks: bool) -> Series | float:
    """Factors that shrink document means towards the overall mean, so that resampling them has the variance σ²_u."""
    weight = length / length.sum()
    unbiased = math.sqrt((weight**2).sum() / _trace(weight))  # √(n / (n − 1)) for n documents of one length
    if not has_blocks:
        return unbiased  # without blocks, the noise is resampled only as part of the means
    return unbiased * np.sqrt(spread / (spread + noise / length)) if spread > 0 else 0.0


def _drawn_means(
    length: Series,
    mean: Series,
    pool: Series,
    block: int,
    draw_documents: bool,
    resamples: int,
    rng: np.random.Generator,
) -> Iterator[Series]:
    """Yield the overall means of `resamples` bootstrap texts, in batches."""
    documents, total = len(length), length.sum()
    count = max(1, round(total / block)) if len(pool) else 0  # blocks per bootstrap text
    stretch = math.sqrt(count * block / total)  # corrects for count · block ≠ total tokens
    rows = max(1, AT_ONCE // max(documents, count))
    for first in range(0, resamples, rows):
        drawn = min(rows, resamples - first)
        if draw_documents:
            chosen = rng.integers(documents, size=(drawn, documents))
            means = (length * mean)[chosen].sum(1) / length[chosen].sum(1)
        else:
            means = np.full(drawn, np.average(mean, weights=length))
        if count:
            means += stretch * pool[rng.integers(len(pool), size=(drawn, count))].mean(1)
        yield means
