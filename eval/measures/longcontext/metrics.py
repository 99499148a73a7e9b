"""The metrics of LongBench (THUDM/LongBench, LongBench/metrics.py), for a generated text and an answer.

    f1                 F1 of words as multisets, in lower case, without punctuation and articles (SQuAD's)
    rouge-l            F1 of the words in longest common subsequences, as in the package `rouge` 1.0: all pairs of
                       sentences are compared, and each shared word counts once
    classification     1 / n if the text names n classes and the right one is among them; a class whose name is a part
                       of the answer's name does not count
    retrieval, count   the share of the numbers in the text that are the right one
    code               similarity of the first line that is not a comment, by `difflib`, as in the package `fuzzywuzzy`

The score of a question is that of its best answer. For Chinese, LongBench splits words with the package `jieba`; here
each character counts as a word. So rows name these metrics `f1 of characters` and `rouge-l of characters`.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from sinkmodel.tasks.samples import Metric, Question

OneAnswer = Callable[[str, str], float]
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃《》「」"
    "『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
REMOVED = str.maketrans("", "", string.punctuation)
REMOVED_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


# ---------------------------------------------------------------------------------------------- a text and one answer


def f1(text: str, answer: str) -> float:
    return _f1_of(_words(text), _words(answer))


def f1_of_characters(text: str, answer: str) -> float:
    return _f1_of(*("".join(one.lower().translate(REMOVED_CHINESE).split()) for one in (text, answer)))


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(REMOVED)).split()


def _f1_of(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(text: str, answer: str) -> float:
    sentences = [[" ".join(part.split()).split(" ") for part in one.split(".") if part] for one in (text, answer)]
    found, wanted = ({word for sentence in of_one for word in sentence} for of_one in sentences)
    same = {word for a in sentences[1] for b in sentences[0] for word in longest_common_subsequence(a, b)}
    return 2 * len(same) / (len(found) + len(wanted)) if same else 0.0


def rouge_l_of_characters(text: str, answer: str) -> float:
    return rouge_l(*(" ".join("".join(one.split())) for one in (text, answer)))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence. If there are several, the search from the end skips items of `b` first."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else max(lengths[i][j + 1], lengths[i + 1][j])
    words, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            words.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def share_of_numbers(text: str, answer: str) -> float:
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def paragraph(text: str, answer: str) -> float:
    """The share of the right number, if the answer is `Paragraph 3` or the same in Chinese."""
    return share_of_numbers(text, re.findall(r"\d+", answer)[0])


def code_similarity(text: str, answer: str) -> float:
    line = next((line for line in text.lstrip("\n").split("\n") if _is_code(line)), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def _is_code(line: str) -> bool:
    return not any(mark in line for mark in ("`", "#", "//"))


def classification(text: str, answer: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in text and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


# --------------------------------------------------------------------------------------------- a text and a question


def _best(of_one: OneAnswer, text: str, question: Question) -> float:
    return max(of_one(text, answer) for answer in question.answers)


def _best_class(text: str, question: Question) -> float:
    return max(classification(text, answer, question.classes) for answer in question.answers)


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def _has_code_line(text: str, question: Question) -> bool:
    return any(map(_is_code, text.lstrip("\n").split("\n")[:-1]))


def of_first_line(metric: Metric) -> Metric:
    """The metric of the first line that is not empty, for prompts whose examples have one line per answer."""
    return Metric(
        metric.name,
        lambda text, question: metric.score(_first_line(text), question),
        lambda text, question: "\n" in text.lstrip("\n"),
    )


METRICS = {
    metric.name: metric
    for metric in (
        Metric("f1", partial(_best, f1)),
        Metric("f1 of characters", partial(_best, f1_of_characters)),
        Metric("rouge-l", partial(_best, rouge_l)),
        Metric("rouge-l of characters", partial(_best, rouge_l_of_characters)),
        Metric("classification", _best_class),
        Metric("retrieval", partial(_best, paragraph)),
        Metric("count", partial(_best, share_of_numbers)),
        Metric("code", partial(_best, code_similarity), _has_code_line),
    )
}
