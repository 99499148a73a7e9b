"""Guards the statistics of the verdict on made-up series with known answers: coverage, power, symmetry, rules."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import chi2, norm, t

from eval.measures.verdict import equivalence
from eval.measures.verdict.equivalence import Interval, decide, enough, interval, more_tokens, over_runs

SERIES = 1000


def autocorrelated(rng: np.random.Generator, shape: tuple[int, int], share: float = 0.5) -> np.ndarray:
    """AR(1) with mean 0, [documents, tokens]; each keeps `share` of the one before."""
    noise = rng.standard_normal((shape[0], shape[1] + 100))
    return lfilter([1], [1, -share], noise, axis=1)[:, 100:]


def coverage(
    documents: int, tokens: int, block: int, share: float = 0.5, spread: float = 0.0, times: int = SERIES
) -> float:
    """How often the interval of simulated texts holds the true mean, 0; documents differ by `spread`."""
    hits = 0
    for seed in range(times):
        rng = np.random.default_rng(seed)
        series = autocorrelated(rng, (documents, tokens), share) + spread * rng.standard_normal((documents, 1))
        found = interval(list(series), block, seed=seed, resamples=1000)
        assert found is not None
        hits += found.low <= 0 <= found.high
    return hits / times


# ------------------------------------------------------------------------------------------------ what it promises


@pytest.mark.parametrize(("tokens", "block", "share"), [(4000, 100, 0.5), (4000, 100, 0.8), (1000, 100, 0.5)])
def test_the_interval_of_one_text_covers_the_truth_as_often_as_it_says(tokens, block, share):
    """A nominal 95 % on 1,000 autocorrelated series; with ten blocks too."""
    assert 0.93 <= coverage(1, tokens, block, share) <= 0.97


def test_blocks_are_what_makes_it_cover():
    """Guards against the test above passing by accident: token by token the same interval is far too narrow."""
    assert coverage(1, 1000, 1, 0.8, times=50) < 0.7


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_documents_that_differ_are_covered_as_a_population(spread):
    assert 0.93 <= coverage(8, 400, 50, spread=spread) <= 0.97


def test_documents_of_unlike_length_are_covered_as_a_population():
    """Five books and 300 pages: taken for fifteen documents, as Kish's number has it, 75 % were covered."""
    hits, times = 0, 500
    for seed in range(times):
        rng = np.random.default_rng(seed)
        books = autocorrelated(rng, (5, 800), 0.7) + 0.4 * rng.standard_normal((5, 1))
        pages = autocorrelated(rng, (300, 10), 0.7) + 0.4 * rng.standard_normal((300, 1))
        found = interval([*books, *pages], 32, seed=seed, resamples=500)
        hits += found.low <= 0 <= found.high
    assert 0.93 <= hits / times <= 0.98


@pytest.mark.parametrize(
    "lengths", [[60] * 5, [300] * 8, [800] * 5 + [10] * 300, [900, 900, 700, 500, 400, 400, 300, 20]]
)
def test_degrees_of_freedom_are_those_of_the_variance_that_resampling_gives(lengths):
    """Against the matrix of the quadratic form, and n − 1 to the last bit if documents are alike; its bias too."""
    rng = np.random.default_rng(0)
    found = interval([rng.standard_normal(n) + 9 * rng.standard_normal() for n in lengths], 50, resamples=10)
    weight = np.array(lengths) / sum(lengths)
    off_mean = np.eye(len(lengths)) - weight
    form = off_mean.T @ np.diag(weight**2) @ off_mean
    assert found.freedom == pytest.approx(np.trace(form) ** 2 / np.trace(form @ form))
    assert found.freedom == len(lengths) - 1 or len(set(lengths)) > 1
    factor = equivalence._shrink(np.array(lengths, dtype=float), 0.0, 0.0, has_blocks=False)
    assert factor**2 == pytest.approx((weight**2).sum() / np.trace(form))


def test_degrees_of_freedom_survive_one_document_that_holds_nearly_all():
    """Guards terms that cancel to the 20th digit. In the limit the form is (9, −1 …)(9, −1 …)' + Σ (u[j] − u[0])²."""
    assert equivalence._freedom(np.array([1e8] + [100.0] * 9)) == pytest.approx(108**2 / 10008, rel=1e-4)


def test_noise_within_documents_is_not_counted_twice():
    """Resampling documents and blocks as they are doubles the variance if documents are alike: 99 % coverage."""
    assert 0.93 <= coverage(12, 400, 50) <= 0.98


@pytest.mark.parametrize(("runs", "between"), [(2, 0.3), (2, 0.0), (3, 0.3), (5, 0.05), (3, 0.0)])
def test_runs_that_differ_are_covered_as_a_population(runs, between):
    """Every run reads the same texts: what these have in common and what seeds change are both in the interval."""
    hits = alone = 0
    times = 400
    for seed in range(times):
        rng = np.random.default_rng(seed)
        texts = autocorrelated(rng, (8, 200)) + 0.2 * rng.standard_normal((8, 1))
        every = [texts + autocorrelated(rng, (8, 200)) + between * rng.standard_normal() for _ in range(runs)]
        of_texts = interval(list(np.mean(every, axis=0)), 25, seed=seed, resamples=500)
        both = over_runs(of_texts, [run.mean() for run in every])
        hits += both.low <= 0 <= both.high
        alone += of_texts.low <= 0 <= of_texts.high
    assert 0.93 <= hits / times <= (0.99 if between == 0.3 else 1)
    assert between < 0.3 or alone / times < 0.8, "else the texts alone would do"


@pytest.mark.parametrize(("runs", "level"), [(2, 0.95), (2, 0.9), (3, 0.95), (5, 0.95)])
def test_it_covers_whichever_error_is_larger_and_however_few_tell_it(runs, level):
    """Guards pairs that are alike by chance: Satterthwaite's one quantile covered 87 % with two, 92 % with three.

    No noise is drawn: the coverage is a mean over quantiles of both estimated variances, those of the error over texts
    with so many degrees of freedom; the error over runs is so many times as large.
    """
    pattern = np.linspace(-1, 1, runs)
    pattern *= (runs / pattern.var(ddof=1)) ** 0.5  # its mean has a standard error of 1
    for freedom in (4, 100):
        of_texts = (chi2.ppf((np.arange(24) + 0.5) / 24, freedom) / freedom) ** 0.5
        of_runs = (chi2.ppf((np.arange(40) + 0.5) / 40, runs - 1) / (runs - 1)) ** 0.5
        for times in (0, 1 / 4, 1, 2, 4, 16):
            reach = []
            for stderr in of_texts:
                texts = dataclasses.replace(found(-1, 1), stderr=stderr, freedom=freedom, level=level)
                reach += [over_runs(texts, factor * times * pattern).high for factor in (of_runs if times else [0])]
            covered = np.mean(2 * norm.cdf(np.array(reach) / np.hypot(1, times)) - 1)
            assert covered >= level - 0.003, (runs, freedom, times)
            assert times or covered <= level + 0.003, "no wider than of the texts alone if runs do not differ"


@pytest.mark.parametrize("runs", [2, 3])
def test_several_pairs_are_seldom_equivalent_at_the_margin(runs):
    """Risk: two pairs were called equivalent in 6 % of cases if the difference is the margin: 2.5 % are promised."""
    margin, times = 4.0, 1000
    equivalent = 0
    for seed in range(times):
        rng = np.random.default_rng(seed)
        texts = 0.1 * autocorrelated(rng, (30, 40))
        every = [margin + texts + 0.1 * rng.standard_normal() for _ in range(runs)]
        of_texts = interval(list(np.mean(every, axis=0)), 10, seed=seed, resamples=200)
        equivalent += decide(over_runs(of_texts, [run.mean() for run in every]), margin) == "equivalent"
    assert equivalent / times <= 0.025 + 2 * (0.025 * 0.975 / times) ** 0.5


@pytest.mark.parametrize("lengths", [[400], [400] * 4, [8000 >> i for i in range(7)]])
def test_an_interval_that_does_not_cover_other_texts_does_not_speak_of_them(lengths):
    """Guards what `speaks_of` promises; the true mean of these texts is covered, that of all such texts is not."""
    others = these = 0
    times = 300
    for seed in range(times):
        rng = np.random.default_rng(seed)
        of_document = 0.5 * rng.standard_normal(len(lengths))
        series = [autocorrelated(rng, (1, n))[0] + own for n, own in zip(lengths, of_document)]
        result = interval(series, 20, seed=seed, resamples=300)
        assert result.speaks_of == "these texts"
        others += result.low <= 0 <= result.high
        these += result.low <= np.average(of_document, weights=lengths) <= result.high
    assert these / times >= 0.92
    assert others / times < 0.5


def test_these_texts_alone_are_asked_about_though_they_are_many():
    """Guards the population: documents that differ much make the interval of others wide, not that of these."""
    rng = np.random.default_rng(0)
    series = list(autocorrelated(rng, (8, 400)) + 2 * rng.standard_normal((8, 1)))
    others, these = (interval(series, 50, these_texts=alone) for alone in (False, True))
    assert (others.speaks_of, these.speaks_of) == ("other texts", "these texts")
    assert others.high - others.low > 5 * (these.high - these.low)
    assert enough([60] * 8, 50)
    assert not enough([60] * 8, 50, these_texts=True)


def test_the_errors_of_runs_and_texts_are_added_as_squares():
    texts = found(-0.2, 0.2)
    texts = dataclasses.replace(texts, stderr=0.1, freedom=50.0)
    both = over_runs(texts, [-0.3, 0.0, 0.3])
    assert (both.runs, both.stderr_runs, both.stderr_texts) == (3, pytest.approx(0.3 / 3**0.5), 0.1)
    assert both.stderr == pytest.approx((0.03 + 0.01) ** 0.5)
    reach = (0.03 * t.ppf(0.975, 2) ** 2 + 0.01 * t.ppf(0.975, 50) ** 2) ** 0.5
    assert both.high - both.mean == both.mean - both.low == pytest.approx(reach)
    assert both.freedom == 50
    assert over_runs(texts, [0.1]) == texts


def test_documents_of_a_block_each_are_resampled_whole():
    assert 0.93 <= coverage(20, 80, 50, spread=0.1) <= 0.97


def test_it_is_equivalent_as_often_as_theory_says_and_seldom_at_the_margin():
    """Power of two one-sided tests at 2.5 %: with a standard error of 0.4 margins, P(|z| ≤ 2.5 − 1.96) = 0.41."""
    tokens, stderr, margin = 4000, 0.4, 1.0
    answers = {0.0: [], margin: []}
    for truth, given in answers.items():
        for seed in range(500):
            noise = np.random.default_rng(seed).standard_normal(tokens) * stderr * tokens**0.5
            given.append(decide(interval([truth + noise], 20, seed=seed, resamples=500), margin))
    assert answers[0.0].count("equivalent") / 500 == pytest.approx(2 * norm.cdf(2.5 - 1.96) - 1, abs=0.06)
    assert answers[margin].count("equivalent") / 500 <= 0.045
    assert answers[margin].count("worse") / 500 == pytest.approx(norm.cdf(2.5 - 1.96), abs=0.06)
    assert "better" not in answers[margin]


def test_exchanging_the_two_mirrors_the_interval_and_the_answer():
    rng = np.random.default_rng(3)
    for documents in (1, 7):
        series = list(autocorrelated(rng, (documents, 900)) + 0.3)
        there, back = interval(series, 60), interval([-d for d in series], 60)
        assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
        assert (decide(there, 0.01), decide(back, 0.01)) == ("worse", "better")


def test_more_text_narrows_it_by_the_square_root():
    rng = np.random.default_rng(5)
    short, long = (interval(list(autocorrelated(rng, (1, tokens))), 50) for tokens in (5_000, 80_000))
    assert (short.high - short.low) / (long.high - long.low) == pytest.approx(4, rel=0.15)


def test_the_standard_error_is_that_of_the_model_behind_it():
    """Guards what centring takes from few blocks, and the shrinking of document means if they do differ."""
    blocks, documents = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        blocks.append(interval([rng.standard_normal(500)], 100, resamples=200).stderr)
        series = rng.standard_normal((20, 200)) + 0.1 * rng.standard_normal((20, 1))
        documents.append(interval(list(series), 20, resamples=200).stderr)
    assert np.square(blocks).mean() == pytest.approx(1 / 500, rel=0.1)
    assert np.square(documents).mean() == pytest.approx(0.1**2 / 20 + 1 / 4000, rel=0.1)


def test_documents_weigh_as_much_as_they_have_tokens():
    """Guards documents of unlike length, the long ones with another mean: the interval is about the mean of tokens."""
    rng = np.random.default_rng(0)
    series = [rng.standard_normal(400) + 1 for _ in range(6)] + [rng.standard_normal(100) - 1 for _ in range(18)]
    result = interval(series, 50)
    assert result.resampled == "documents and blocks"
    assert (result.low + result.high) / 2 == pytest.approx(result.mean, abs=0.25 * (result.high - result.low))
    assert result.mean == pytest.approx(600 / 4200, abs=0.05)


# ------------------------------------------------------------------------------------------------------ the rules


def found(low: float, high: float, mean: float | None = None, tokens: int = 1000) -> Interval:
    middle = (low + high) / 2 if mean is None else mean
    return Interval(middle, low, high, 0.0, 0.95, tokens, 10, 1, "blocks", 9.0)


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (-0.009, 0.009, "equivalent"),
        (0.001, 0.009, "equivalent"),  # it excludes zero, and does not matter
        (-0.01, 0.01, "equivalent"),
        (-0.011, -0.001, "better"),
        (-0.5, -0.4, "better"),
        (0.001, 0.011, "worse"),
        (0.4, 0.5, "worse"),
        (-0.011, 0.001, "undecided"),
        (-0.5, 0.5, "undecided"),
        (0.0, 0.011, "undecided"),  # an end at zero does not exclude it
    ],
)
def test_the_four_answers(low, high, answer):
    assert decide(found(low, high), 0.01) == answer


@pytest.mark.parametrize(
    ("low", "high", "mean", "more"),
    [
        (-0.02, 0.02, 0.0, 3000),  # half as wide: four times the text
        (-0.010, 0.014, 0.002, 1250),  # above: 0.012 must become 0.008
        (-0.004, 0.020, 0.008, 1250),  # 0.012 must become 0.008 again, now to leave zero outside
        (-0.005, 0.045, 0.020, 563),  # 0.025 must become 0.020: no nearer answer than that it is worse
        (0.001, 0.011, 0.006, 0),
    ],
)
def test_how_much_more_text_decides(low, high, mean, more):
    wide = found(low, high, mean)
    assert more_tokens(wide, 0.01) == pytest.approx(more, abs=1)
    scale = (1000 / (1000 + more_tokens(wide, 0.01) + 2)) ** 0.5
    then = dataclasses.replace(wide, low=mean + (wide.low - mean) * scale, high=mean + (wide.high - mean) * scale)
    assert decide(then, 0.01) != "undecided"


@pytest.mark.parametrize(
    ("means", "stderr", "margin"),
    [
        ([0.001, -0.001, 0.002, -0.002], 0.02, 0.01),  # within the margin
        ([0.029, 0.031, 0.03], 0.02, 0.01),  # apart from zero
        ([0.0, 0.004], 0.02, 0.03),  # two runs, whose error is multiplied by 12.7
    ],
)
def test_of_several_runs_more_text_decides_though_their_spread_stays(means, stderr, margin):
    """Guards 'undecided' over several pairs, which printed 0; it decides with so much text, and not with 2 % less."""
    texts = dataclasses.replace(found(-1.0, 1.0, float(np.mean(means))), stderr=stderr, freedom=40.0)

    def with_text(times: float) -> Interval:
        return over_runs(dataclasses.replace(texts, stderr=stderr / times**0.5), means)

    assert decide(with_text(1), margin) == "undecided"
    times = 1 + more_tokens(with_text(1), margin) / texts.tokens
    assert times > 1.5
    assert decide(with_text(0.98 * times), margin) == "undecided"
    assert decide(with_text(1.002 * times), margin) != "undecided"


def test_no_amount_of_text_decides_where_runs_differ_too_much():
    """Three runs, 4.3 standard errors over runs each way: 0.043 neither leaves zero outside nor is within 0.01.

    With the quantile of the texts' 40 degrees of freedom, 2.02, it would be 0.0202, and decide.
    """
    texts = dataclasses.replace(found(-1.0, 1.0, 0.025), stderr=0.02, freedom=40.0)
    means = [0.025 - 0.01 * 3**0.5, 0.025, 0.025 + 0.01 * 3**0.5]
    assert over_runs(texts, means).stderr_runs == pytest.approx(0.01)
    assert decide(over_runs(texts, means), 0.01) == "undecided"
    assert more_tokens(over_runs(texts, means), 0.01) is None
    assert more_tokens(over_runs(dataclasses.replace(texts, stderr=0.0), means), 0.01) is None
    much = dataclasses.replace(texts, mean=0.002, stderr=10.0)
    assert more_tokens(over_runs(much, [0.0, 0.004]), 0.03) is None, "three million times what there is"


@pytest.mark.parametrize(
    ("low", "high", "mean", "more"), [(-0.005, 0.0199, 0.02, 563), (-0.0199, 0.005, -0.02, 563), (0.0, 0.011, 0.006, 1)]
)
def test_what_is_undecided_needs_more_than_no_text(low, high, mean, more):
    """Guards a mean at an end of its bootstrap's interval or beyond, which gave −6 once in thousands of series."""
    assert decide(found(low, high, mean), 0.01) == "undecided"
    assert more_tokens(found(low, high, mean), 0.01) == more


def test_a_mean_of_zero_without_a_margin_is_never_decided():
    """Guards a division by zero."""
    assert more_tokens(found(-0.01, 0.01, 0.0), 0.0) is None


def test_what_is_resampled_depends_on_what_there_is():
    rng = np.random.default_rng(0)
    for lengths, block, resampled in (
        ([600], 50, "blocks"),
        ([300, 300, 300, 300], 50, "blocks"),
        ([6000, 60, 60, 60, 60, 60], 50, "blocks"),  # six, but one weighs all
        ([640] * 3 + [10] * 100, 50, "documents and blocks"),  # they weigh as seven, with 2.3 degrees of freedom
        ([300] * 5, 50, "documents and blocks"),
        ([60] * 5, 50, "documents"),
    ):
        series = [rng.standard_normal(n) for n in lengths]
        result = interval(series, block)
        assert result.resampled == resampled
        assert (result.documents, result.tokens) == (len(lengths), sum(lengths))
        assert result.blocks == sum(n // block for n in lengths)
        assert result.mean == pytest.approx(np.concatenate(series).mean()), "over tokens, not over documents"


@pytest.mark.parametrize("lengths", [[], [0], [249], [49] * 4, [90, 90, 60]])
def test_too_little_text_gives_no_interval(lengths):
    assert not enough(lengths, 50)
    assert interval([np.ones(n) for n in lengths], 50) is None


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    series = list(autocorrelated(np.random.default_rng(0), (6, 300)))
    assert interval(series, 50, seed=1) == interval(series, 50, seed=1) != interval(series, 50, seed=2)


def test_resampling_in_parts_changes_nothing_that_is_promised(monkeypatch):
    """Guards texts whose draws do not fit at once."""
    series = list(autocorrelated(np.random.default_rng(0), (6, 300)))
    whole = interval(series, 50)
    monkeypatch.setattr(equivalence, "AT_ONCE", 500)
    assert interval(series, 50).low == pytest.approx(whole.low, abs=0.05 * (whole.high - whole.low))
