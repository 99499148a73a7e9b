"""Results of every measure in small, as its --json has them, and a run's metrics.csv: what a report is made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from tests.tiny import checkpoint

TEXT = {"file": "books.jsonl", "sha256": "ab" * 32, "documents": 3, "tokens": 3000}
WHEN = {
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"python": "3.11.15", "torch": "2.13.0+cpu", "transformers": "5.14.1"},
}
VERIFY = "sink-eval verify --sink runs/token --vanilla runs/none --text 'my books.jsonl' --budget 8"
OF_ATTENTION = ("sink_alpha", "sink_heads", "first_alpha", "first_heads", "sink_share", "first_share", "rest_share")


def policy(sinks: int, budget: int | None = 8) -> dict[str, Any]:
    if budget is None:
        return {"policy": "dense", "label": "dense", "sinks": 0, "window": None, "budget": None}
    name, window = "sink" if sinks else "window", budget - sinks
    return {"policy": name, "label": f"{name} {sinks}+{window}", "sinks": sinks, "window": window, "budget": budget}


def ppl(model: str = "runs/token", budget: int = 8) -> dict[str, Any]:
    rows = [
        {
            **policy(sinks, of),
            "tokens": 90,
            "nll": 3.0 + sinks / 10,
            "nll_after_overflow": 3.1 + sinks / 10,
            "stderr_after_overflow": 0.02,
            "by_position": [[0, 7, 3.0], [8, 15, 3.2 + sinks / 10], [16, 23, 3.3]],
        }
        for sinks, of in ((0, None), (0, budget), (1, budget), (4, budget))
    ]
    return {
        "command": "ppl",
        "model": model,
        "budget": budget,
        "dtype": "float32",
        "texts": [TEXT],
        "rows": rows,
        **WHEN,
    }


def difference(first: str, second: str, value: float, answer: str | None = "equivalent") -> dict[str, Any]:
    found = {"first": first, "second": second, "tokens": 12345, "difference": value, "answer": answer, "level": 0.95}
    limits = {"low": None, "high": None} if answer is None else {"low": value - 0.004, "high": value + 0.004}
    about = {"resampled": "blocks", "speaks_of": None if answer is None else "these texts"}
    return {**found, **limits, "documents": 3, **about, "more_tokens": 0}


def verify(answer: str = "equivalent") -> dict[str, Any]:
    beside = {"model": "vanilla", **difference("sink 4+4", "dense", 0.0, None), "why": "the model's positions end at 8"}
    rows = [
        {"model": model, **policy(sinks), "nll_after_overflow": 3.1, "stderr_after_overflow": 0.01}
        for model, sinks in (("sink", 1), ("vanilla", 4))
    ]
    return {
        "command": "verify",
        "command_line": VERIFY,
        "sink": "runs/token",
        "vanilla": "runs/none",
        "budget": 8,
        "margin": 0.01,
        "level": 0.95,
        "dtype": "float32",
        "texts": [TEXT],
        "warnings": ["runs/token was trained on books.jsonl"],
        "rows": rows,
        **WHEN,
        "verdict": difference("sink 1+7", "vanilla 4+4", -0.0012, answer),
        "comparisons": [{"model": "sink", **difference("sink 1+7", "sink 4+4", 0.0004)}, beside],
    }


def grid(budgets: tuple[int, ...] = (8, 16)) -> dict[str, Any]:
    rows = [
        {
            "model": model,
            "sink": kind,
            **policy(sinks, budget),
            "runs": [{"run": "a"}, {"run": "b"}],
            "ppl_after_overflow": value,
            "ppl_low": value - 1,
            "ppl_high": value + 1,
            "paper_ppl": paper if budget == budgets[0] else None,
        }
        for model, kind, paper in (("none", "none", 27.87), ("token", "token ×1", None))
        for budget in budgets
        for sinks, value in ((0, 900.0 / budget), (1, 18.4))
    ]
    models = {"none": ["a", "b"], "token": ["c", "d"]}
    head = {"command": "grid", "models": models, "budgets": list(budgets), "sinks": [0, 1], "level": 0.95}
    return {**head, "dtype": "float32", "texts": [TEXT], "warnings": ["c is no seed of a"], "rows": rows, **WHEN}


def sinks(checkpoints: bool = False, model: str = "runs/token") -> dict[str, Any]:
    measured = dict(zip(OF_ATTENTION, (0.4, 0.25, 0.1, 0.0, 0.5, 0.1, 0.4)))
    peak = {"largest": 12.5, "times_median": 20.0, "massive": False}
    heads = [{"head": head, **measured} for head in range(2)]
    rows: list[dict[str, Any]] = [{"layer": layer, **measured, **peak, "heads": heads} for layer in range(2)]
    born = {}
    if checkpoints:
        rows = [
            {"step": step, "tokens": 1000 * step, **measured, "sink_heads": share, **peak}
            for step, share in ((10, 0.0), (20, 0.2), (30, 0.6))
        ]
        born = {"born": {"target": "sink", "threshold": 0.05, "step": 20, "tokens": 20000}}
    head = {"command": "sinks", "model": model, "length": 64, "sequences": 10, "epsilon": 0.3, "dtype": "float32"}
    return {
        **head,
        "texts": [{"file": TEXT["file"], "sha256": TEXT["sha256"], "sequences": 10}],
        "rows": rows,
        **born,
        **WHEN,
    }


def streameval(task: str = "lines") -> dict[str, Any]:
    scores = {"accuracy": 0.5, "accuracy_stderr": 0.1, "nll": 2.5, "nll_stderr": 0.2}
    lines = {"tokens_back_most": 46, "kept": 0.5, "rank": 3.0, "rank_stderr": 0.4}
    if task == "lines":
        rows = [{**policy(s), **scores, **lines, "distance": d} for s in (0, 1) for d in (10, 20)]
        own: dict[str, Any] = {"distractors": 9}
    else:
        rows = [{**policy(s), **scores, "difference": -0.1, "difference_stderr": 0.05} for s in (0, 1)]
        own = {"texts": [{"file": "arc.jsonl", "sha256": "cd" * 32}]}
    return {"command": "streameval", "model": "runs/token", "task": task, "seed": 0, **own, "rows": rows, **WHEN}


def zeroshot(model: str = "runs/token") -> dict[str, Any]:
    scores = {"stock": 0.41, "stock_stderr": 0.02, "adapter": 0.45, "adapter_stderr": 0.02}
    rows = [
        {"task": task, "metric": "acc", "filter": "none", "questions": 100, **scores, "paper": paper}
        for task, paper in (("piqa", 0.6), ("arc_easy", None))
    ]
    return {"command": "zeroshot", "model": model, "files": [], "rows": rows, **WHEN}


def latency() -> dict[str, Any]:
    times = {"ms_per_token": 1.5, "ms_per_token_p99": 2.5}
    ratio = {"value": 1.1, "low": 1.0, "high": 1.2}
    rows = [{**policy(s, c), **times, "peak_bytes": 2**28} for c in (8, 16) for s in (0, 1)]
    stream = [{**policy(1), "seen": seen, **times, **ratio, "resident_bytes": 2**28} for seen in (8, 1000)]
    ratios = [{"ratio": "window/sink", "budget": 8, "rounds": 16, **ratio}]
    head = {"command": "latency", "model": "runs/token", "dtype": "float32", "device": "cpu", "threads": 1}
    return {**head, "rows": rows, "ratios": ratios, "stream": stream, **WHEN}


def prefill() -> dict[str, Any]:
    def ratio(name: str, of_dense: bool) -> dict[str, Any]:
        return {f"{name}_{of}": None if of_dense else x for of, x in (("ratio", 1.1), ("low", 1.0), ("high", 1.2))}

    rows = [
        {
            "label": label,
            "length": 64,
            "rounds": 5,
            "ttft_ms": 12.5,
            **ratio("ttft", label == "dense"),
            "peak_bytes": 2**28,
            "reading_bytes": 2**24,
            "bytes_held": 2**20,
            "bytes_grown": 2**20,
            "answers": [
                {
                    "answer": answer,
                    "step_ms": 1.5,
                    "total_ms": 12.5 + 1.5 * (answer - 1),
                    **ratio("step", label == "dense"),
                    **ratio("total", label == "dense"),
                }
                for answer in (1, 128)
            ],
        }
        for label in ("dense", "snapkv 8", "gemfilter 8")
    ]
    pair = {"first": "gemfilter 8", "length": 64, "rounds": 5}
    crossovers = [
        {**pair, "second": "dense", "crossover": 1234, "low": 987, "high": None},
        {**pair, "second": "snapkv 8", "crossover": None, "low": None, "high": None},
    ]
    head = {"command": "latency --prefill", "model": "runs/token", "dtype": "float32", "device": "cpu", "threads": 1}
    return {**head, "weights_bytes": 2**27, "rounds": 5, "rows": rows, "crossovers": crossovers, **WHEN}


def memories() -> dict[str, Any]:
    cost = {"bytes_held": 2**20, "bytes_kept": 2**20, "prefill_ratio": 1.1, "decode_ratio": 0.9}
    paired = {"difference": 0.1, "low": 0.05, "high": 0.15, "answer": "worse"}
    rows = [
        {"memory": name, "label": f"{name} {c}", "budget": c, "tokens": 64, "nll": 3.1, **paired, **cost}
        for name in ("snapkv", "h2o")
        for c in (8, 16)
    ]
    alone = dict.fromkeys(paired)
    dense = {"memory": "dense", "label": "dense", "budget": None, "tokens": 64, "nll": 3.0, **alone, **cost}
    head = {"command": "memories", "model": "runs/token", "prompt": 32, "continue": 16, "margin": 0.01, "level": 0.95}
    forgets = {
        "prompts": 1,
        "kinds": [
            {"kind": "sink", "tokens": 1, "kept_share": 1.0},
            {"kind": "function word", "tokens": 24, "kept_share": 0.25},
            {"kind": "name", "tokens": 7, "kept_share": 0.625},
        ],
        "ages": [{"from": 0, "tokens": 16, "kept_share": 0.5}, {"from": 16, "tokens": 16, "kept_share": 0.21875}],
        "heads": [[0.5, 0.25], [0.4375, None]],
    }
    return {**head, "texts": [], "rows": [{**dense, "bytes_held": 2**22}, *rows], "forgets": forgets, **WHEN}


def longcontext() -> dict[str, Any]:
    def row(task: str, label: str, floor: bool, score: float | None) -> dict[str, Any]:
        numbers = {
            f"{name}{of}": None if score is None else value
            for name in ("score", "nll")
            for of, value in (("", score), ("_difference", -0.2), ("_low", -0.3), ("_high", -0.1))
        }
        size = None if score is None else 2**20
        return {
            "task": task,
            "label": label,
            "length": 256,
            "question": "outside",
            "floor": floor,
            **numbers,
            "bytes_held": size,
            "kept_share": None if score is None else 0.375 if "h2o" in label else 1.0,
        }

    rows = [row("vt", "dense", False, 0.9), row("vt", "h2o 8", False, 0.7)]
    rows += [row("cwe", "dense", True, 0.1), row("cwe", "h2o 8", True, None)]
    return {"command": "longcontext", "model": "runs/token", "rows": rows, **WHEN}


def everything() -> dict[str, dict[str, Any]]:
    """Name of a file -> what is in it."""
    return {
        "verify": verify(),
        "grid": grid(),
        "ppl": ppl(),
        "ppl-16": ppl(budget=16),
        "latency": latency(),
        "prefill": prefill(),
        "memories": memories(),
        "longcontext": longcontext(),
        "sinks": sinks(),
        "births": sinks(checkpoints=True),
        "zeroshot": zeroshot(),
        "lines": streameval(),
        "questions": streameval("questions"),
    }


def write(folder: Path, results: dict[str, dict[str, Any]]) -> list[str]:
    """Paths of the files, one a result."""
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return [str(folder / f"{name}.json") for name in results]


def write_run(folder: Path, name: str = "token") -> str:
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    (run / "metrics.csv").write_text(
        "step,tokens,loss,ppl,twin_loss,lr,grad_norm,sink_alpha,sink_metric,tokens_per_second,mfu,val_loss,val_ppl\n"
        "5,500,6.0,403,5.9,1e-3,1,0.1,0.0,100,0.1,,\n10,1000,5.0,148,4.9,1e-3,1,0.2,0.25,100,0.1,,\n"
        "10,1000,,,,,,,,,,5.5,244\n5,5",
        encoding="utf-8",
    )
    return str(run)


def write_checkpoint(run: str) -> None:
    """A checkpoint of the run with all that provenance says, in the lengths that sink-pretrain writes."""
    path = checkpoint(Path(run))
    content = torch.load(path, weights_only=True)
    content["recipe"]["provenance"] = {
        "data": {"fingerprint": "f00d" * 16, "train_tokens": 123_456_789},
        "git_commit": "c0de" * 10 + "+",
        "versions": {"sinkmodel": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.14.1", "lightning": "2.6.5"},
    }
    torch.save(content, path)


def write_maps(folder: Path, in_softmax: bool = False) -> str:
    """Two layers of one head, four places."""
    lines = ["layer,head,query,key,logit,weight"]
    for layer in range(2):
        for query in range(4):
            lines += [f"{layer},0,{query},sink,0.5,0.5"] if in_softmax else []
            lines += [f"{layer},0,{query},{key},{math.sin(key):.3f},{1 / (query + 1):.3f}" for key in range(query + 1)]
    (folder / "maps").mkdir()
    (folder / "maps" / "maps.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "maps")
