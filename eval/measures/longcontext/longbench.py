"""Local files in LongBench's format (arXiv 2308.14508): JSON lines with `input`, `context`, `answers`, `dataset`, …

The prompts and the numbers of generated tokens are those of LongBench's published configuration (THUDM/LongBench,
`LongBench/config/`, MIT licence, copyright THU-KEG and Zhipu AI), which its data sets are made for. The metrics are in
`metrics`. A prompt that is too long is cut in its middle. Chat templates are not used.

    input, context     texts that replace {input} and {context} in the prompt
    answers            right answers; one of them is enough
    dataset            one of DATASETS; the names of LongBench-E end with `_e`
    all_classes        the classes of a classification, else null or missing

Other keys are ignored. Every row is checked before a model is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from eval.measures.longcontext.metrics import METRICS, of_first_line
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.loading import LoadedModel
from sinkmodel.results.parts import Text
from sinkmodel.tasks.cells import Cell, OnSample
from sinkmodel.tasks.samples import Metric, Question, Sample, Setting
from sinkmodel.tasks.tokens import in_tokens_cut
from sinkmodel.text.json_lines import Row, read_json_lines

STORY = "using a single phrase if possible. Do not provide any explanation.\n\n"
ONLY = "Only give me the answer and do not output any other words."
YES_NO = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
PASSAGES = (
    f"Answer the question based on the given passages. {ONLY}\n\nThe following are given passages.\n{{context}}\n\n"
    f"Answer the question based on the given passages. {ONLY}\n\nQuestion: {{input}}\nAnswer:"
)


@dataclass(frozen=True)
class Dataset:
    """LongBench's configuration of a data set; `room` is the most tokens of an answer."""

    prompt: str
    room: int
    metric: Metric

    @property
    def before(self) -> str:
        return self.prompt.partition("{context}")[0]

    def question(self, text: str) -> str:
        return self.prompt.partition("{context}")[2].replace("{input}", text)


DATASETS = {
    "narrativeqa": Dataset(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"asconcisely as you can, {STORY}Story: {{context}}\n\nNow, answer the question based on the story asconcisely "
        f"as you can, {STORY}Question: {{input}}\n\nAnswer:",  # "asconcisely" is LongBench's
        128,
        METRICS["f1"],
    ),
    "qasper": Dataset(
        f"You are given a scientific article and a question. Answer the question {YES_NO}Article: {{context}}\n\n "
        f"Answer the question based on the above article {YES_NO}Question: {{input}}\n\nAnswer:",
        128,
        METRICS["f1"],
    ),
    "multifieldqa_en": Dataset(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        METRICS["f1"],
    ),
    "multifieldqa_zh": Dataset(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何"
        "其他字词。\n\n问题：{input}\n回答：",
        64,
        METRICS["f1 of characters"],
    ),
    "hotpotqa": Dataset(PASSAGES, 32, METRICS["f1"]),
    "2wikimqa": Dataset(PASSAGES, 32, METRICS["f1"]),
    "musique": Dataset(PASSAGES, 32, METRICS["f1"]),
    "dureader": Dataset(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        128,
        METRICS["rouge-l of characters"],
    ),
    "gov_report": Dataset(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        METRICS["rouge-l"],
    ),
    "qmsum": Dataset(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
        METRICS["rouge-l"],
    ),
    "multi_news": Dataset(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write "
        "a one-page summary of all the news.\n\nSummary:",
        512,
        METRICS["rouge-l"],
    ),
    "vcsum": Dataset(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        512,
        METRICS["rouge-l of characters"],
    ),
    "trec": Dataset(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        of_first_line(METRICS["classification"]),
    ),
    "triviaqa": Dataset(
        f"Answer the question based on the given passage. {ONLY} The following are some examples.\n\n{{context}}\n\n"
        "{input}",
        32,
        of_first_line(METRICS["f1"]),
    ),
    "samsum": Dataset(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        of_first_line(METRICS["rouge-l"]),
    ),
    "lsht": Dataset(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        64,
        of_first_line(METRICS["classification"]),
    ),
    "passage_count": Dataset(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, "
        "2, 3, and so on.\n\nThe final answer is: ",
        32,
        METRICS["count"],
    ),
    "passage_retrieval_en": Dataset(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer '
        "is: ",
        32,
        METRICS["retrieval"],
    ),
    "passage_retrieval_zh": Dataset(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n"
        '{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        METRICS["retrieval"],
    ),
    "lcc": Dataset("Please complete the code given below. \n{context}Next line of code:\n", 64, METRICS["code"]),
    "repobench-p": Dataset(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, METRICS["code"]
    ),
}


def read_longbench(files: Sequence[Path], limit: int) -> tuple[dict[str, list[Row]], list[Text]]:
    """The first `limit` rows of each data set, and for each file a summary of what was used of it.

    Raises UserError that names the line of a row that is not in LongBench's format.
    """
    rows: dict[str, list[Row]] = {}
    taken = []
    for file in files:
        count = 0
        for number, row in read_json_lines(file):
            name, checked = _checked(row, f"{file}:{number}")
            of_dataset = rows.setdefault(name, [])
            if len(of_dataset) < limit:
                of_dataset.append(checked)
                count += 1
        if not count:
            raise UserError(f"{file} adds no row; give a .jsonl file of LongBench, and each file once")
        taken.append(Text(file=str(file), sha256=sha256_of(file), rows=count))
    for name, of_dataset in rows.items():
        if len(of_dataset) < limit:
            say(f"{name}: {len(of_dataset)} rows, fewer than --samples {limit}")
    return rows, taken


def _checked(row: Row, where: str) -> tuple[str, Row]:
    for key in ("input", "context", "answers", "dataset"):
        if key not in row:
            there = ", ".join(list(row)[:8]) or "nothing"
            raise UserError(f"{where}: no key '{key}' (there is {there}); LongBench's rows have it")
    name = str(row["dataset"]).removesuffix("_e")
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"give one of {', '.join(DATASETS)}"
        raise UserError(f"{where}: the data set {name!r} is not one of LongBench's; {remedy}")
    if not isinstance(row["context"], str) or not row["context"].strip():
        raise UserError(f"{where}: 'context' is not a text; give the long text that the answer is in")
    if not isinstance(row["input"], str):
        raise UserError(f"{where}: 'input' is not a text; give the question, or an empty text")
    if not _are_texts(row["answers"]):
        raise UserError(f"{where}: 'answers' is not a list of texts; give at least one right answer")
    metric = DATASETS[name].metric.name
    classes = row.get("all_classes")
    if metric == "classification" and not (_are_texts(classes) and set(row["answers"]) <= set(classes or ())):
        raise UserError(
            f"{where}: 'all_classes' is not a list of texts with the answers in it; {name} needs the classes"
        )
    if metric == "retrieval" and not all(any(map(str.isdigit, answer)) for answer in row["answers"]):
        raise UserError(f"{where}: an answer of {name} has no number; it is like 'Paragraph 1'")
    return name, row


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(x, str) and x.strip() for x in value)


def sample_of(name: str, row: Row, rng: Random, distractors: int) -> Sample:
    """The prompt of a row. For a classification the other classes are distractors; other data sets have none."""
    dataset = DATASETS[name]
    classes = row["all_classes"] if dataset.metric.name == "classification" else []
    wrong = [one for one in dict.fromkeys(classes) if one not in row["answers"]]
    return Sample(
        dataset.before,
        row["context"],
        (
            Question(
                dataset.question(row["input"]),
                tuple(row["answers"]),
                row["answers"][0],
                tuple(rng.sample(wrong, min(len(wrong), distractors))),
                tuple(classes),
            ),
        ),
    )


def longbench_cell(
    loaded: LoadedModel,
    name: str,
    rows: Sequence[Row],
    setting: Setting,
    seed: int,
    answer_tokens: int | None,
    on_sample: OnSample,
) -> Cell:
    """The cell of a data set. A prompt that is longer than --length is cut in its middle."""
    dataset = DATASETS[name]
    room, length = answer_tokens or dataset.room, setting.length
    if room >= length:
        raise UserError(
            f"--length {length} leaves no room for a prompt of {name} beside the {room} tokens of its answer; raise "
            "--length or lower --answer-tokens"
        )
    readings = []
    for number, row in enumerate(rows):
        sample = sample_of(name, row, Random(f"{seed} {name} {number}"), setting.distractors)
        readings.append(in_tokens_cut(loaded, sample, room, length))
        on_sample(1)
    return Cell(name, length, dataset.metric, readings)
