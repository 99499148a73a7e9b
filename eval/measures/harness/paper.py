"""StreamingLLM's Table 4: the seven zero-shot tasks of the paper, with its accuracies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTask:
    """A task of StreamingLLM's Table 4: zero-shot accuracy of its 160M models, trained with 0, 1 and 2 sink tokens."""

    folder: str  # its folder in lm-eval
    keys: str  # the keys of a row of its data set
    questions: int  # the size of the split that lm-eval uses
    accuracy: tuple[float, float, float]


# The paper names neither lm-eval's version nor the metric; its numbers are near EleutherAI's "acc" for Pythia-160M.
PAPER = {
    "arc_challenge": PaperTask("arc", "question choices answerKey", 1172, (0.186, 0.196, 0.187)),
    "arc_easy": PaperTask("arc", "question choices answerKey", 2376, (0.452, 0.456, 0.456)),
    "hellaswag": PaperTask("hellaswag", "activity_label ctx_a ctx_b endings label", 10042, (0.294, 0.298, 0.296)),
    "lambada_openai": PaperTask("lambada", "text", 5153, (0.396, 0.399, 0.375)),
    "openbookqa": PaperTask("openbookqa", "question_stem choices answerKey", 500, (0.160, 0.166, 0.158)),
    "piqa": PaperTask("piqa", "goal sol1 sol2 label", 1838, (0.622, 0.626, 0.643)),
    "winogrande": PaperTask("winogrande", "sentence option1 option2 answer", 1267, (0.501, 0.508, 0.504)),
}


def paper_accuracy(task: str, metric: str, questions: int, sinks: int) -> float | None:
    """The paper's accuracy for `sinks` sink tokens; None if it has none for this metric and number of questions."""
    known = PAPER.get(task)
    if known is None or metric != "acc" or questions != known.questions or sinks >= len(known.accuracy):
        return None
    return known.accuracy[sinks]
