"""Fitness, by which the candidates of a generation are selected. Pure functions of scores.

    fitness = mean over tasks (score of the candidate ÷ score of the full cache) − size_penalty · share kept

Both scores are means over the same prompts; the score of a prompt is the mean over its questions (paper, section 4).
The score of an answer is the task's metric (`match`), or the likelihood of the right answer per token,

    exp(−nll),   nll in nats per token of the right answer, teacher-forced,

which lies between 0 and 1 and falls as nll rises. So a fitness without penalty lies between 0 and 1 ÷ the full cache's
score. It is 1 for a memory that answers as the full cache does, and rises if the nll of any answer falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """Results of P candidates on the R prompts of one task.

    Attributes:
        task: name of the task.
        score_PR: score of each candidate on each prompt.
        kept_PR: share of the prompt's tokens that the candidate's memory held after the context, mean over heads.
        full_R: score of the full cache on each prompt.
    """

    task: str
    score_PR: np.ndarray
    kept_PR: np.ndarray
    full_R: np.ndarray

    @property
    def ratio_P(self) -> np.ndarray | None:
        """Mean score ÷ the full cache's mean score; None if the latter is 0."""
        full = self.full_R.mean()
        return self.score_PR.mean(axis=1) / full if full > 0 else None


def fitness_of(tasks: Sequence[Measured], size_penalty: float) -> np.ndarray:
    """The fitness [P] of each candidate. A task that the full cache fails on all prompts does not count."""
    ratios = [ratio_P for task in tasks if (ratio_P := task.ratio_P) is not None]
    kept_P = kept_of(tasks)
    return (np.mean(ratios, axis=0) if ratios else np.zeros_like(kept_P)) - size_penalty * kept_P


def kept_of(tasks: Sequence[Measured]) -> np.ndarray:
    """The share [P] of the cache that each candidate kept, mean over tasks and prompts."""
    return np.mean([task.kept_PR.mean(axis=1) for task in tasks], axis=0)
