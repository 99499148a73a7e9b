"""Tasks of lm-eval, with the model's sink tokens in front of every window exactly once (`sink-eval zeroshot`).

If the model has sink tokens, every task is run twice: with lm-eval's own HFLM ("stock"), and with the adapter, which
puts the sinks in front (`harness.adapter` explains the difference). If it has none, the adapter would change nothing,
so its numbers are stock's. All prompts are zero-shot, even if a task's default is not. Standard errors are lm-eval's:
over questions, by bootstrap for a perplexity, and none for a mean over the bytes of whole texts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import set_seed

from eval.measures.harness.adapter import SinkLM
from eval.measures.harness.paper import paper_accuracy
from eval.measures.harness.tasks import load_tasks, quiet
from eval.measures.loading import load
from eval.measures.verdict.paper import PYTHIA_160M, model_of
from eval.measures.verdict.training import shape_of
from sinkmodel.errors import UserError, not_finite
from sinkmodel.files import sha256_of
from sinkmodel.loading import LoadedModel
from sinkmodel.progress import Progress
from sinkmodel.results.parts import Text
from sinkmodel.results.tasks import ZeroshotResult, ZeroshotRow
from sinkmodel.sinks import IN_SOFTMAX, kind_of

RESAMPLES = 1000  # of a bootstrap; lm-eval's 100,000 take minutes and change only the third digit

Scores = dict[tuple[str, str], tuple[float, float | None]]  # (metric, filter) -> value, standard error


def run(
    options: argparse.Namespace,
    names: list[str],
    files: dict[str, Path],
    give: Callable[[ZeroshotResult, str], None],
) -> None:
    """Pass the result and the model's sink in words to `give`, also if a later task fails, or after Ctrl-C.

    Args:
        options: those of `eval.commands.zeroshot`.
        names: names of the tasks, in order.
        files: the files of the tasks that have one.
        give: called once, unless no task was finished.
    """
    tasks = load_tasks(names, files)
    loaded = load(options)
    models = language_models(loaded, options.batch_size)
    for name, task in tasks.items():
        check_room(name, task, models["stock"], len(loaded.sink_ids))
        check_requests(name, task, models["stock"], options.limit)
    rows: list[ZeroshotRow] = []
    try:
        for i, (name, task) in enumerate(tasks.items(), 1):
            scores = {}
            for way, lm in models.items():
                scores[way], questions = answer(lm, name, task, options.limit, f"{i}/{len(tasks)} {name}, {way}")
            rows += rows_of(loaded, name, questions, scores)
    finally:
        if rows:
            give(result(loaded, options, files, rows), _sink_in_words(loaded))


def language_models(loaded: LoadedModel, batch_size: int) -> dict[str, Any]:
    """lm-eval's wrappers of the model: "stock", and also "adapter" if the model has sink tokens."""
    if loaded.tokenizer.bos_token_id is None and loaded.tokenizer.eos_token_id is None:
        raise UserError(
            f"{loaded.name}: its tokenizer has neither a bos nor an eos token, and lm-eval needs one to score the "
            "first token of a text; name one in tokenizer_config.json"
        )
    with quiet():
        models = {"stock": HFLM(loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size)}
        if loaded.sink_ids:
            models["adapter"] = SinkLM(loaded, batch_size)
    return models


def check_room(name: str, task: Any, lm: Any, sinks: int) -> None:
    """Raise UserError if the tokens that a task generates leave no positions for its prompt."""
    if task.OUTPUT_TYPE != "generate_until":
        return
    tokens = normalize_gen_kwargs(task.config.generation_kwargs, lm.max_gen_toks)["max_gen_toks"]
    if tokens + sinks >= lm.max_length:
        raise UserError(
            f"task {name} lets the model generate {tokens} tokens, and it was made for {lm.max_length} positions, "
            "which leaves none for the question; leave the task out"
        )


def check_requests(name: str, task: Any, lm: Any, limit: int | None) -> None:
    """Raise UserError for a scored text that has no token of its own, or more tokens than the model has positions.

    lm-eval would stop at such a text, perhaps after hours. Builds the requests of the task.
    """
    with quiet():
        task.build_all_requests(limit=limit)
    for request in task.instances:
        if request.request_type != "loglikelihood":
            continue
        context, target = request.args
        tokens = len(lm.tok_encode(context + target)) - len(lm.tok_encode(context.rstrip()))  # as lm-eval splits them
        subject = f"task {name}, question {request.doc_id + 1}: the answer {target[:40]!r}"
        if tokens == 0:
            raise UserError(
                f"{subject} adds no token to its context {context[-20:]!r}; begin it with its own blank, or remove it"
            )
        if tokens > lm.max_length:
            raise UserError(
                f"{subject} is longer than the {lm.max_length} positions of the model, which lm-eval does not score; "
                "shorten it, or leave it out"
            )


# --------------------------------------------------------------------------------------------------- what is measured


def answer(lm: Any, name: str, task: Any, limit: int | None, label: str) -> tuple[Scores, int]:
    """Run a task zero-shot with `lm`; returns its scores and its number of questions."""
    set_seed(0)  # for a task that samples
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap: forking a process that runs torch may hang
    try:
        with watched(lm.model, task, label), quiet():
            result = evaluate(
                lm=lm, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
            )
    except OverflowError:
        raise UserError(
            f"task {name}: the perplexity of a continuation overflows; use a word as continuation, not a text"
        ) from None
    found = result["results"][name]
    scores: Scores = {}
    for key, value in found.items():
        metric, _, of_filter = key.partition(",")
        if of_filter and not metric.endswith("_stderr") and isinstance(value, Real):
            stderr = found.get(f"{metric}_stderr,{of_filter}")
            scores[metric, of_filter] = float(value), float(stderr) if isinstance(stderr, Real) else None
    return scores, result["n-samples"][name]["effective"]


@contextlib.contextmanager
def watched(model: Any, task: Any, label: str) -> Iterator[None]:
    """Show progress in rows that the model reads, since lm-eval is silenced. Raises UserError if logits are NaN."""
    screen, progress, rows = sys.stderr, Progress(label, "rows"), 0

    def after(module: Any, args: Any, output: Any) -> None:
        nonlocal rows
        if bool(output.logits.isnan().any()):
            raise not_finite(module)
        rows += len(output.logits)
        known = task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood")  # at most one row per request
        with contextlib.redirect_stderr(screen):
            progress.update(rows, min(1.0, rows / len(task.instances)) if known else None)

    hook = model.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()
        progress.close()


def rows_of(loaded: LoadedModel, name: str, questions: int, scores: dict[str, Scores]) -> list[ZeroshotRow]:
    """One result row per metric of a task."""
    config = loaded.model.config
    as_in_paper = model_of(shape_of(config)) == PYTHIA_160M and kind_of(config) not in IN_SOFTMAX
    rows = []
    for (metric, of_filter), (value, stderr) in scores["stock"].items():
        adapter, adapter_stderr = scores.get("adapter", scores["stock"])[metric, of_filter]
        rows.append(
            ZeroshotRow(
                task=name,
                metric=metric,
                filter=of_filter,
                questions=questions,
                stock=value,
                stock_stderr=stderr,
                adapter=adapter,
                adapter_stderr=adapter_stderr,
                paper=paper_accuracy(name, metric, questions, len(loaded.sink_ids)) if as_in_paper else None,
            )
        )
    return rows


def result(
    loaded: LoadedModel, options: argparse.Namespace, files: dict[str, Path], rows: list[ZeroshotRow]
) -> ZeroshotResult:
    return ZeroshotResult(
        model=options.model,
        sink_ids=loaded.sink_ids,
        limit=options.limit,
        batch_size=options.batch_size,
        dtype=options.dtype,
        device=str(loaded.model.device),
        lm_eval=metadata.version("lm_eval"),
        files=[Text(task=name, file=str(path), sha256=sha256_of(path)) for name, path in files.items()],
        rows=rows,
    )


def _sink_in_words(loaded: LoadedModel) -> str:
    count = len(loaded.sink_ids)
    in_front = " ".join(loaded.borrowed) or f"{count} sink token{'s' * (count > 1)}"
    return f"{in_front} in front" if count else "no sink token: adapter = stock"
