"""Guards: the report shows what was measured, all of it and nothing else; files from strangers stay data."""

from __future__ import annotations

import copy
import csv
import html.parser
import json
import math
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from eval.cli import main
from eval.report import charts
from eval.report.blocks import Chart, Table, figure, short_names
from eval.report.inputs import Inputs, ResultFile, clean
from eval.report.sections import memories
from sinkmodel.errors import UserError
from sinkmodel.results.files import COMMANDS, result_of
from tests import results

SECTIONS = ["In short", "The verdict", "The grid", "Training of the twins", "Perplexity by position",
            "Perplexity against budget",
            "Where attention goes", "When the sink is born", "Attention maps", "Zero-shot tasks",
            "What a stream remembers", "Latency", "Reading a prompt", "Memories", "Long prompts",
            "Provenance"]  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a browser would see: texts, ids, links, tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.alts: list[str | None] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for name, value in attrs if name in ("href", "xlink:href", "src") and value]
        self.links += re.findall(r"url\((#[^)]+)\)", " ".join(value or "" for _, value in attrs))
        if tag == "svg":
            self.alts.append(found.get("aria-label"))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(folder: Path, *options: str) -> Path:
    output = folder / "report"
    assert main(["report", *options, "--output", str(output)]) == 0
    return output


def of_results(folder: Path, **contents) -> tuple[Page, str, Path]:
    """The page, the Markdown and the folder of a report on these results."""
    output = report(folder, "--json", *results.write(folder, contents))
    texts = [(output / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")]
    return Page(texts[0]), texts[1], output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    files = results.write(folder, results.everything())
    runs = [results.write_run(folder, name) for name in ("none", "token")]
    return report(folder, "--run", *runs, "--json", *files, "--maps", results.write_maps(folder, in_softmax=True))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------- what is shown


def test_sections_come_in_the_order_of_a_readers_questions_and_the_answers_first(whole):
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text) == SECTIONS
    assert re.findall("(?m)^## (.*)$", (whole / "report.md").read_text(encoding="utf-8")) == SECTIONS
    short = Page(text[text.index('<section id="summary">') : text.index('<section id="verdict">')]).text
    assert "From 13 results and 2 training runs." in short
    assert (
        "token: After the first eviction, at 8 keys, the perplexity is 22.20 with the window alone, 24.53 with 1 "
        in short
    )
    assert (
        "token: After prompts of 32 tokens, the memory that loses least against the full cache is snapkv 8 with"
        in short
    )
    first = Page(text[text.index('<section id="verdict">') :]).text
    assert first.startswith("The verdict Equivalent At a budget of 8 keys runs/token (sink 1+7) lost 0.0012 nats")
    assert "95 % interval [−0.0052, +0.0028], margin ±0.01, 12,345 tokens of 3 documents" in first


def test_every_figure_has_its_picture_its_numbers_and_words_for_who_cannot_see_it(whole):
    page = Page((whole / "report.html").read_text(encoding="utf-8"))
    markdown = (whole / "report.md").read_text(encoding="utf-8")
    linked = {link for link in page.links if link.startswith("figures/")}
    pictures = set(re.findall(r"\]\((figures/[^)]+\.png)\)", markdown))
    made = {str(path.relative_to(whole)) for path in (whole / "figures").iterdir()}
    assert linked | pictures == made
    assert linked == set(re.findall(r"\((figures/[^)]+\.csv)\)", markdown))
    assert len(linked) >= 10
    assert len(pictures) == page.tags.count("svg") >= 15
    for path in made:
        content = (whole / path).read_bytes()
        assert content.startswith(b"\x89PNG") if path.endswith(".png") else content.count(b"\n") > 1, path
    assert len(page.alts) == len(pictures)
    assert all(alt and len(alt) > 20 for alt in page.alts)


def test_a_run_of_an_earlier_version_shows_that_its_sink_metric_has_the_old_definition(tmp_path):
    """Risk: old and new numbers on one line of a figure, as if they were one metric."""
    runs = [results.write_run(tmp_path, name) for name in ("old", "new")]
    metrics = tmp_path / "old" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("sink_alpha,sink_metric", "sink_share,sink_heads"))
    output = report(tmp_path, "--run", *runs)
    header, old, *_ = (output / "figures" / "training.csv").read_text().splitlines()
    assert header == "run,step,tokens,twin_loss,val_loss,sink_alpha,sink_metric,sink_share,sink_heads"
    assert old == "old,5,500,5.9,,,,0.1,0"
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "share of heads with a sink (old definition)" in text
    assert "Runs of earlier versions have an old definition: a mean over the queries after the sinks" in text


def test_numbers_beside_a_figure_are_those_that_were_given(whole):
    training = rows_of(whole / "figures" / "training.csv")
    assert [tuple(row.values()) for row in training if row["run"] == "token"] == [
        ("token", "5", "500", "5.9", "", "0.1", "0"),
        ("token", "10", "1000", "4.9", "", "0.2", "0.25"),
        ("token", "10", "1000", "", "5.5", "", ""),
    ]
    positions = rows_of(whole / "figures" / "perplexity-by-position.csv")
    assert len(positions) == 2 * 4 * 3
    assert [row["nll"] for row in positions if row["budget"] == "8" and row["sinks"] == "4"] == ["3.0", "3.6", "3.3"]
    assert [row["low"] for row in rows_of(whole / "figures" / "verdict-1.csv")] == ["-0.0052", "-0.0036", ""]
    grid = rows_of(whole / "figures" / "grid-1.csv")
    assert [row["ppl_after_overflow"] for row in grid if row["sinks"] == "0"] == ["112.5", "56.25"] * 2
    weights = {
        (r["query"], r["key"]): r["weight"] for r in rows_of(whole / "figures" / "maps-1.csv") if r["layer"] == "1"
    }
    assert weights["3", "2"] == "0.25"
    assert weights["3", "sink"] == "0.5"


def test_tasks_with_long_prompts_show_what_is_kept(whole):
    """Risk: two memories are compared that keep different shares of the cache, and nothing shows it."""
    _, _, section = (whole / "report.md").read_text(encoding="utf-8").partition("## Long prompts")
    assert "| MiB held | kept % |" in section
    last = re.findall(r"(?m)^\| (vt|cwe) \|.*\| (.*?) \|$", section)
    assert last == [("vt", "100.0"), ("vt", "37.5"), ("cwe", "100.0"), ("cwe", "–")]


def test_the_papers_numbers_stand_below_the_models_that_are_as_its(tmp_path):
    page, markdown, _ = of_results(tmp_path, grid=results.grid())
    assert "none: the paper's none 1 8 27.87" in page.text, "below the budget that is the paper's"
    assert page.text.count("the paper's") == 1
    assert "Warning: c is no seed of a" in page.text
    assert "| token | token ×1 | 2 | 16 | 56.25 \\[55.25, 57.25\\] | 18.40 \\[17.40, 19.40\\] |" in markdown
    assert "token: the paper's" not in page.text
    assert [alt.split("; ")[1] for alt in page.alts] == ["lowest 18.40 (1+), highest 112.50 (0+)"] * 2


def test_what_a_namm_keeps_is_a_picture_by_kind_by_age_and_by_head(tmp_path, monkeypatch):
    """Risk: a bar beside the name of another, layers taken for heads, or a picture whose numbers are missing."""
    painted = []
    panel = charts.panel
    for module in (charts, memories):
        monkeypatch.setattr(
            module, "panel", lambda alt, paint, *size: painted.append(paint) or panel(alt, paint, *size)
        )
    page, markdown, output = of_results(tmp_path, memories=results.memories())
    axes = [Figure().add_subplot() for _ in painted]
    for axis, paint in zip(axes, painted):
        paint(axis)
    _, kinds, ages, heads = axes
    for axis, names, shares, mean in (
        (kinds, ["sink", "function word", "name"], [100, 25, 62.5], 100 * (1 + 24 / 4 + 7 * 0.625) / 32),
        (ages, ["from 0", "from 16"], [50, 21.875], 100 * (8 + 3.5) / 32),
    ):
        labels = dict(zip(axis.get_yticks(), (label.get_text() for label in axis.get_yticklabels())))
        bars = {labels[bar.get_y() + bar.get_height() / 2]: bar.get_width() for bar in axis.patches}
        assert bars == pytest.approx(dict(zip(names, shares)))
        assert [bar.get_y() for bar in axis.patches] == sorted((bar.get_y() for bar in axis.patches), reverse=True)
        assert axis.lines[0].get_xdata() == pytest.approx([mean] * 2)
    image = heads.images[0]
    assert image.get_array().filled(-1).tolist() == [[0.5, 0.25], [0.4375, -1]]
    assert image.get_clim() == (0, 1)
    assert (heads.get_xlabel(), heads.get_ylabel()) == ("KV head", "layer")
    assert page.alts[1:] == [
        "token: the % of tokens that namm keeps, by kind: sink 100.0, function word 25.0, name 62.5",
        "token: the % of tokens that namm keeps, by age: from 0 50.0, from 16 21.9",
        "token: the share of a prompt that each KV head keeps, layer by layer, from 25.0 to 50.0 %",
    ]
    assert [tuple(row.values()) for row in rows_of(output / "figures" / "forgotten-1.csv")] == [
        ("kind", "sink", "", "1", "1.0"),
        ("kind", "function word", "", "24", "0.25"),
        ("kind", "name", "", "7", "0.625"),
        ("age", "0", "", "16", "0.5"),
        ("age", "16", "", "16", "0.21875"),
        ("layer", "0", "0", "", "0.5"),
        ("layer", "0", "1", "", "0.25"),
        ("layer", "1", "0", "", "0.4375"),
        ("layer", "1", "1", "", ""),
    ]
    assert "(figures/forgotten-1-3.png)" in markdown


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": []},
        {"heads": [[]]},
        {"heads": [[0.5], [0.25, 0.125]]},
        {"heads": [[None]]},
        {"kinds": [], "ages": []},
        {"kinds": [{"kind": "name", "tokens": 3, "kept_share": None}], "ages": []},
    ],
    ids=str,
)
def test_a_namm_of_which_little_is_known_makes_a_page(monkeypatch, changes):
    """Risk: a traceback for layers with other numbers of heads, or for shares that were not measured."""
    for module in (charts, memories):
        monkeypatch.setattr(module, "panel", lambda alt, paint, *size: paint(Figure().add_subplot()))
    content = results.memories()
    content["forgets"] |= changes
    made = memories.memories(Inputs(results=[ResultFile(Path("x"), "", result_of(content, Path("x")))]))
    names = [block.name for block in made.blocks if isinstance(block, Chart)]
    assert names == ["memories-1", *(["forgotten-1"] if any(content["forgets"]["heads"]) else [])]


def test_keys_times_and_exact_matches_are_shown_or_left_open_for_an_older_file(monkeypatch):
    """Risk: a column beside its numbers, or a page that files without them break."""
    monkeypatch.setattr(memories, "panel", lambda *args: None)
    monkeypatch.setattr(memories, "panels", lambda *args: [])

    def table(make, content):
        made = make(Inputs(results=[ResultFile(Path("x"), "", result_of(content, Path("x")))]))
        (first, *_) = [block for block in made.blocks if isinstance(block, Table)]
        assert {len(row) for row in first.rows} == {len(first.columns)}
        return first

    content = results.memories()
    older = table(memories.memories, content)
    assert {row[older.columns.index("keys")] for row in older.rows} == {"–"}
    assert older.caption.endswith("ratio to dense's time.")
    for row, keys in zip(content["rows"], (1234, 8, 16, 7.5, 16)):
        row["keys_kept"] = keys
    content["rows"][0] |= {"prefill_seconds": 0.0125, "decode_ms": 1.5}
    shown = table(memories.memories, content)
    assert [row[shown.columns.index("keys")] for row in shown.rows] == ["1,234", "8", "16", "7.5", "16"]
    assert shown.caption.endswith("dense's time, 12.5 ms for a prompt, 1.50 ms for a token.")

    content = results.longcontext()
    assert {row[6] for row in table(memories.longcontext, content).rows} == {"–"}
    content["rows"][0]["exact"] = 0.25
    shown = table(memories.longcontext, content)
    assert (shown.columns[6], shown.rows[0][6]) == ("exact", "0.250")


@pytest.mark.parametrize(("answer", "tone"), [("better", "good"), ("worse", "bad"), ("undecided", "open")])
def test_a_verdict_is_said_in_a_word_and_not_by_colour_alone(tmp_path, answer, tone):
    _, markdown, output = of_results(tmp_path, verify=results.verify(answer))
    assert f'<div class="note {tone}"><strong>{answer.capitalize()}</strong>' in (output / "report.html").read_text()
    assert f"**{answer.capitalize()}:** At a budget" in markdown


def test_it_says_what_would_decide_or_that_no_text_would(tmp_path):
    content = results.verify("undecided")
    for more, sentence in ((1234, "About 1,234 more tokens would decide"), (None, "No amount of text decides this")):
        content["verdict"]["more_tokens"] = more
        (tmp_path / str(more)).mkdir()
        page, _, _ = of_results(tmp_path / str(more), verify=content)
        assert sentence in page.text
    content["verdict"]["answer"] = "equivalent"
    assert "No amount" not in of_results(tmp_path, verify=content)[0].text


def test_a_verdict_says_which_texts_it_is_for(tmp_path):
    """Risk: "equivalent" on a page, of an interval that says nothing of other texts."""
    pages = {}
    for place, changes in enumerate(
        (
            {},
            {"speaks_of": "other texts", "resampled": "documents and blocks"},
            {"answer": "undecided", "more_tokens": None, "why": "3 documents: too few to speak of other texts"},
        )
    ):
        content = results.verify()
        for row in (content["verdict"], content["comparisons"][0]):
            row |= changes
        (tmp_path / str(place)).mkdir()
        pages[place], _, output = of_results(tmp_path / str(place), verify=content)
        expected = changes.get("speaks_of", "these texts")
        assert [row["speaks_of"] for row in rows_of(output / "figures" / "verdict-1.csv")][:2] == [expected] * 2
    these, others, undecided = (page.text for page in pages.values())
    assert these.count("The interval holds for these texts, not for others.") >= 1
    assert these.count("equivalent for these texts") == 2
    assert "these texts" not in others
    assert "of 3 documents. 3 documents: too few to speak of other texts. The interval" in undecided
    assert undecided.count("undecided for other texts") == 2
    assert "contains zero and a difference that would matter" not in undecided
    assert "No amount of text" not in undecided


def test_what_was_not_measured_is_said_with_the_command_that_measures_it(tmp_path):
    output = report(tmp_path, "--run", results.write_run(tmp_path))
    page = Page((output / "report.html").read_text(encoding="utf-8"))
    assert re.findall("<h2>(.*?)</h2>", (output / "report.html").read_text(encoding="utf-8")) == [
        *("In short", "Training of the twins", "Not in this report", "Provenance")
    ]
    assert "No verdict yet" in page.text
    for command in COMMANDS:
        assert f"sink-eval {command} --" in page.text, command
    assert "loss curves" not in page.text


def test_each_result_alone_makes_a_page(tmp_path):
    for name, content in results.everything().items():
        (tmp_path / name).mkdir()
        page, _, _ = of_results(tmp_path / name, **{name: content})
        assert page.tags.count("section") == 4, name


def test_a_rank_says_among_how_many_numbers(tmp_path):
    page, _, _ = of_results(tmp_path, lines=results.streameval())
    assert "rank: of the answer among itself and 9 other numbers of the stream, by chance 5.5; ±" in page.text
    older = results.streameval()
    del older["distractors"]
    (tmp_path / "older").mkdir()
    page, _, _ = of_results(tmp_path / "older", lines=older)
    assert "rank: of the answer among itself and other numbers of the stream; ±" in page.text


def test_several_results_of_one_command_stand_beside_each_other(tmp_path):
    several = {f"verify-{i}": results.verify(answer) for i, answer in enumerate(("worse", "better"))}
    page, _, output = of_results(tmp_path, **several, a=results.sinks(True, "a/x"), b=results.sinks(True, "b/x"))
    assert "Worse At" in page.text
    assert "Better At" in page.text
    assert {"verdict-1.csv", "verdict-2.csv"} <= {path.name for path in (output / "figures").iterdir()}
    assert "a/x: at the sink" in page.text
    assert "b/x: at the sink" in page.text


def test_several_pairs_of_runs_are_told_apart(tmp_path):
    """Guards a verdict over seeds: a row a pair, roles instead of long lists of names, both standard errors."""
    content = results.verify()
    pairs = [{**content["verdict"], "sink": f"runs/token-{n}", "vanilla": f"runs/none-{n}"} for n in (1, 2)]
    content |= {"sink": "runs/token-1, runs/token-2", "vanilla": "runs/none-1, runs/none-2", "pairs": pairs}
    content["verdict"] |= {"runs": 2, "stderr_runs": 0.03, "stderr_texts": 0.001}
    content["rows"] = [
        {**row, "run": f"runs/{'token' if row['model'] == 'sink' else 'none'}-2"} for row in content["rows"]
    ]
    page, _, output = of_results(tmp_path, verify=content)
    text = page.text
    assert "the sink models (sink 1+7) lost 0.0012 nats per token less than the vanilla models (vanilla 4+4)" in text
    assert "Over 2 pairs of runs; standard error over runs 0.0300, over texts 0.0010." in text
    assert "They hold for these two runs" not in text
    markdown = (output / "report.md").read_text(encoding="utf-8")
    assert "| pair | token-1 | none-1 |" in markdown
    assert "| pair | token-2 | none-2 |" in markdown
    assert "| sink | sink 1+7 | sink 4+4 |" in markdown
    assert re.search(r"\| token-2 \| 1\+7 \|", markdown)


def test_provenance_names_texts_commands_and_configs(whole):
    text = Page((whole / "report.html").read_text(encoding="utf-8")).text
    assert "ab" * 32 in text
    assert results.VERIFY in text
    assert "cd" * 32 in text, "a file of questions is a text too"
    assert "python 3.11.15, torch 2.13.0+cpu, transformers 5.14.1" in text
    assert "seed: 1" in text


def test_a_runs_checkpoint_tells_its_data_and_commit(tmp_path):
    run = results.write_run(tmp_path)
    results.write_checkpoint(run)
    page = Page((report(tmp_path, "--run", run) / "report.html").read_text(encoding="utf-8"))
    assert f" {'f00d' * 4} 123,456,789 {'c0de' * 4}+ sinkmodel 0.1.0, torch 2.13.0+cpu," in page.text


def test_what_is_given_twice_is_shown_once(tmp_path):
    runs = [results.write_run(tmp_path, name) for name in ("none", "token")]
    files = results.write(tmp_path, {"ppl": results.ppl(), "sinks": results.sinks()})
    maps = results.write_maps(tmp_path)
    once = report(tmp_path, "--run", *runs, "--json", *files, "--maps", maps).rename(tmp_path / "once")
    (tmp_path / "link").symlink_to(runs[0])
    again = [f"{tmp_path}/maps/../{name}" for name in ("token", "ppl.json", "maps")]
    runs, files = [*runs, again[0], str(tmp_path / "link")], [*files, again[1], files[0]]
    twice = report(tmp_path, "--run", *runs, "--json", *files, "--maps", maps, again[2])
    for path in once.rglob("*.*"):
        assert (twice / path.relative_to(once)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_what_the_commands_write_is_what_a_report_reads(tmp_path, monkeypatch):
    """Guards a key that a command renames, which tests on made-up results would not see."""
    from sinkmodel.sinks import SinkConfig
    from tests.tiny import checkpoint, words

    monkeypatch.chdir(tmp_path)
    for kind in ("token", "none"):
        for step in (7, 14):
            checkpoint(tmp_path / kind, sink=SinkConfig(kind), step=step)
    lines = [json.dumps({"text": words(150, seed=seed)}) + "\n" for seed in range(6)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    text = ["--text", "t.jsonl"]
    commands = {
        "verify": ["--sink", "token", "--vanilla", "none", "--budget", "16", *text],
        "grid": ["--models", "none", "token", "--budgets", "8", "16", "--sinks", "0", "1", *text],
        "ppl": ["--model", "token", "--budget", "16", "--policies", "dense", "sink", "recompute", *text],
        "sinks": ["--model", "token", "--sequences", "3", "--length", "16", "--maps", "maps", *text],
        "streameval": [
            "--model",
            "token",
            "--budgets",
            "64",
            "--distances",
            "1",
            "2",
            "--samples",
            "1",
            "--queries",
            "2",
        ],
        "latency": ["--model", "token", "--budgets", "8", "16", "--tokens", "8", "--stream-length", "300"],
        "memories": [
            "--model",
            "token",
            *text,
            *["--prompt", "40", "--continue", "8", "--budgets", "16", "--window", "4"],
        ],
    }
    for command, options in commands.items():
        assert main([command, *options, "--json", f"{command}.json"]) in (0, 1), command
    born = [*text, "--sequences", "3", "--length", "16", "--checkpoints"]
    assert main(["sinks", "--model", "none", *born, "--json", "born.json"]) == 0
    sizes = ["--length", "40", "--budgets", "36", "--answers", "1", "2", "--rounds", "1"]
    assert main(["latency", "--prefill", "--model", "token", *sizes, "--json", "prefill.json"]) == 0
    files = [f"{name}.json" for name in (*commands, "born", "prefill")]
    output = report(tmp_path, "--json", *files, "--maps", "maps")
    found = re.findall("<h2>(.*?)</h2>", (output / "report.html").read_text(encoding="utf-8"))
    left_out = {"Training of the twins", "Perplexity against budget", "Zero-shot tasks", "Long prompts"}
    shown = [title for title in found if title != "Not in this report"]
    assert shown == [title for title in SECTIONS if title not in left_out]


# ------------------------------------------------------------------------------------------------------------ one page


def test_the_page_stands_alone(whole):
    """Guards a page that looks right only if there is a network, or that runs anything."""
    text = (whole / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "default-src 'none'" in text
    outside = [link for link in page.links if not link.startswith(("#", "figures/", "data:"))]
    assert outside == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_no_two_figures_share_an_id_and_all_that_is_pointed_at_is_there(whole):
    """Guards a clip path or a marker of one figure that cuts or draws another."""
    page = Page((whole / "report.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids)) > 100
    pointed = {link[1:] for link in page.links if link.startswith("#")}
    assert len(pointed) > 50
    assert pointed <= set(page.ids)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    contents = {"verify": results.verify(), "ppl": results.ppl(), "sinks": results.sinks()}
    files = results.write(tmp_path, contents)
    both = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        output = report(tmp_path / name, "--json", *files)
        both.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert both[0] == both[1]
    assert len(both[0]) >= 8


def test_figures_take_their_colours_from_the_page(whole):
    """Guards dark letters on a dark page."""
    text = (whole / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"(?s)<svg.*?</svg>", text)
    assert all("currentColor" in svg and "<text" in svg for svg in figures)
    assert not any(colour in svg for svg in figures for colour in ("#1b1e23", "#0072b2", "#ffffff", "#000000"))
    assert all(f"--line-{i}:" in text for i in range(6))


# ------------------------------------------------------------------------------------------------ files from strangers


SCRIPT = "<script>alert(1)</script>"
EVIL = [
    SCRIPT, '"><img src=x onerror=alert(1)>', "]]><svg onload=alert(1)>", "a|b `c` [d](javascript:alert(1)) *e*",
    r"$\frac{$ and $\bad$", "_hidden", "&lt;b&gt;", "a\x00b\ud800c\nd", "{{ 7 * 7 }}", "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL, ids=[name.encode("ascii", "replace")[:12].decode() for name in EVIL])
def test_a_name_from_a_file_is_shown_and_never_markup(tmp_path, evil):
    content = results.ppl(evil)
    content["rows"][0]["label"] = evil
    content["texts"] = [{"file": evil, "sha256": evil}]
    content["versions"] = {evil: evil}
    verify = results.verify()
    verify["sink"], verify["warnings"] = evil, [evil]
    grid = results.grid()
    for row in grid["rows"]:
        row["model"] = evil
    page, markdown, output = of_results(
        tmp_path,
        ppl=content,
        verify=verify,
        grid=grid,
        sinks=results.sinks(True, evil),
        zeroshot=results.zeroshot(evil),
    )
    assert not {"script", "img", "b"} & set(page.tags)
    assert len([tag for tag in page.tags if tag == "svg"]) == markdown.count("![")
    shown = " ".join(clean(evil).split())
    assert shown in page.text
    text = (output / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<[^>]*\son(load|error)=[^>]*>", re.sub(r'"[^"]*"', '""', text))
    fenced = re.sub(r"(?ms)^```+$.*?^```+$", "", markdown)
    assert "<img" not in fenced.replace("\\<img", "")
    assert "<script" not in fenced.replace("\\<script", "")
    assert "[d](javascript" not in fenced


def test_a_markdown_table_keeps_its_columns_whatever_is_in_a_cell(tmp_path):
    _, markdown, _ = of_results(tmp_path, ppl=results.ppl("a|b\\|c"))
    rows = [line for line in markdown.splitlines() if line.startswith("| a\\|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {10}


SETTINGS = ("level", "margin")  # what is no measurement


def numbers_in(value, path=()):
    """Paths of all measured numbers in a result."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from numbers_in(inner, (*path, key))
    if isinstance(value, float) and path[-1] not in SETTINGS:
        yield path


def with_value(content, path, value):
    """A copy of a result with one value replaced."""
    content = copy.deepcopy(content)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return content


@pytest.mark.parametrize("replaced", [math.nan, 1e300], ids=str)
@pytest.mark.parametrize("name", results.everything())
def test_a_result_without_its_numbers_still_makes_a_page(tmp_path, name, replaced):
    """Guards a section that fails on what was not measured, or is no number."""
    content = results.everything()[name]
    paths = list(numbers_in(content))
    assert paths
    for path in paths:
        content = with_value(content, path, replaced)
    page, _, _ = of_results(tmp_path, **{name: content})
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


@pytest.mark.parametrize("name", results.everything())
def test_any_one_number_may_be_missing(monkeypatch, name):
    from matplotlib.figure import Figure

    from eval.report.report import make_sections

    def paint_only(alt, paint, size=None):
        paint(Figure().add_subplot())
        return charts.Panel(alt, "", b"")

    sections = [f"sections.{name}" for name in ("attention", "memories", "perplexity", "tasks", "verdict")]
    for module in ("charts", *sections):
        monkeypatch.setattr(f"eval.report.{module}.panel", paint_only)
    whole = results.everything()[name]
    paths = {tuple("" if isinstance(key, int) else key for key in path): path for path in numbers_in(whole)}
    for path in paths.values():
        content = result_of(with_value(whole, path, None), Path("x.json"))
        assert len(make_sections(Inputs(results=[ResultFile(Path("x.json"), "00", content)]))) >= 3


@pytest.mark.parametrize("name", results.everything())
@pytest.mark.parametrize("wrong", ["text", [], {}, True], ids=str)
def test_any_value_of_another_kind_is_refused_in_one_line_or_not_read(tmp_path, capsys, name, wrong):
    """Guards a traceback on a file that is not quite what a command writes."""
    whole = results.everything()[name]
    refused = 0
    for number, path in enumerate({(key,) for key in whole} | {("rows", 0, key) for key in whole["rows"][0]}):
        content = with_value(whole, path, wrong)
        (file,) = results.write(tmp_path, {f"{number}": content})
        try:
            result_of(clean(content), Path(file))
            continue
        except UserError:
            pass
        refused += 1
        assert main(["report", "--json", file, "--output", str(tmp_path / "report")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert file in error
    assert refused >= 4
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "{}/none"], "has no metrics.csv"),
        (["--run", "{}/broken"], "line 2, has a value that is not a number"),
        (["--run", "{}/stepless"], "line 2, has no step or no tokens"),
        (["--run", "{}/bytes"], "is not text"),
        (["--json", "{}/deep.json"], "it is nested too deep"),
        (["--json", "{}/token/metrics.csv"], "is not valid JSON"),
        (["--json", "{}/absent.json"], "does not exist"),
        (["--json", "{}/token"], "token is a folder; give a file that a command of sink-eval wrote"),
        (["--json", "{}/list.json"], "is not a result of sink-eval --json: its command is None"),
        (["--json", "{}/other.json"], "its command is 'bench', not one of ppl, verify"),
        (["--json", "{}/odd.json"], "its command is ['ppl'], not one of"),
        (["--json", "{}/bare.json"], "is not what sink-eval ppl --json writes: it has no model; measure it again"),
        (["--json", "{}/lacking.json"], "rows[1] has no nll"),
        (["--json", "{}/bins.json"], "rows[0].by_position[0] is not a list of 3"),
        (["--json", "{}/many.json"], "distractors is not a whole number"),
        (["--json", "{}/empty.json"], "has no rows"),
        (["--maps", "{}/token"], "has no maps.csv"),
        (["--maps", "{}/bare.json"], "has no maps.csv"),
        (["--maps", "{}/wrong"], "is not what sink-eval sinks --maps writes (other columns)"),
        (["--maps", "{}/future"], "a key that a query does not see"),
        (["--maps", "{}/nothing"], "holds no map"),
        ([], "nothing to report; give --run, --json or --maps"),
        (["--runs", "x"], "did you mean --run?"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, options, message):
    results.write_run(tmp_path)
    for name, line in (("broken", "5,many"), ("stepless", ",5")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,tokens\n{line}\n")
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "metrics.csv").write_bytes(b"step,tokens\n\xff,1\n")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    header = "layer,head,query,key,logit,weight\n"
    for name, text in (("wrong", "a,b\n1,2\n"), ("future", header + "0,0,1,2,0,0\n"), ("nothing", header)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "maps.csv").write_text(text)
    lacking, bins = results.ppl(), results.ppl()
    del lacking["rows"][1]["nll"]
    bins["rows"][0]["by_position"][0] = [1, 2]
    contents = {"list": [], "other": {"command": "bench"}, "odd": {"command": ["ppl"]}, "bare": {"command": "ppl"}}
    contents["many"] = {**results.streameval(), "distractors": "many"}
    results.write(tmp_path, {**contents, "lacking": lacking, "bins": bins, "empty": {**results.ppl(), "rows": []}})
    argv = [option.format(tmp_path) for option in options]
    assert main(["report", *argv, "--output", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    files = results.write(tmp_path, {"ppl": results.ppl()})
    assert main(["report", "--json", *files, "--output", str(tmp_path / "report")]) == 2
    assert "already holds something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["mine.txt"]


# --------------------------------------------------------------------------------------------------------- small things


def test_names_are_short_where_that_is_enough():
    assert short_names(["runs/sink", "runs/none"]) == {"runs/sink": "sink", "runs/none": "none"}
    assert short_names(["a/sink", "b/sink", "b/none"]) == {"a/sink": "a/sink", "b/sink": "b/sink", "b/none": "none"}
    assert short_names(["a", "a", ""]) == {"a": "a", "": ""}


def test_numbers_are_written_as_their_form_says_unless_that_would_take_a_line():
    assert [figure(x) for x in (1234.567, None, math.exp(700))] == ["1,234.57", "–", "1.01e+304"]
    assert figure(-0.00516, "+.4f") == "−0.0052"


def test_every_line_of_a_figure_has_a_look_and_a_name_of_its_own():
    """Guards more lines than colours, and S+W meaning two things in one figure."""
    from matplotlib.figure import Figure

    from eval.report.plots import paint_positions

    rows = [{**results.policy(s, 12), "by_position": [[1, 8, 3.0]]} for s in range(1, 9)]
    rows.append({**results.policy(1, 12), "policy": "recompute", "label": "recompute 1+11", "by_position": [[1, 8, 3]]})
    rows.append({**results.policy(0, None), "by_position": [[1, 8, 2.9]]})
    rows.append({**results.policy(0, None), "label": "_odd", "by_position": [[1, 8, 2.9]]})
    axis = Figure().add_subplot()
    rows = [{**results.ppl()["rows"][0], **row} for row in rows]
    paint_positions(axis, result_of({**results.ppl("m", 12), "rows": rows}, Path("x")))
    lines, names = axis.get_legend_handles_labels()
    assert names == [*(f"{s}+{12 - s}" for s in range(1, 9)), "recompute 1+11", "dense", "\u200b_odd"]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines)
    assert len({line.get_marker() for line in lines[:7]}) == 7
