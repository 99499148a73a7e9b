"""Guards `namm` in `sink-eval`: controls of its size on each prompt, in every command, and one line for mistakes."""

from __future__ import annotations

import json
import re
from argparse import Namespace

import pytest
import torch

from eval.cli import main
from eval.measures.memories.choice import check_decides, check_namm, namm_rows
from eval.measures.memories.controls import namm_makers
from eval.measures.memories.forgotten import Forgotten, kinds_of, pieces_of
from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM
from sinkmodel.memories.namm.network import split
from sinkmodel.results.files import content_of, read_result
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.eval.namm import CONFIG, CONTROLS, PARAMETERS, ROWS, check_rows, write_artefact
from tests.models import model_of, tokens


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    return write_artefact(tmp_path_factory.mktemp("artefact") / "namm")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.checkpoint(folder, "llama", SinkConfig("token"))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": tiny.words(200, seed)}) + "\n" for seed in range(6)))
    return path


def read(model, memory, ids):
    memory.reset()
    memory.expect(len(ids))
    model(torch.tensor([ids]), past_key_values=memory)
    assert memory.ended
    return memory


def kept(memory) -> list[list[int]]:
    """The positions that are kept, for each KV head of each layer."""
    return [head for layer in range(len(memory.layers)) for head in memory.kept_positions(layer)]


def mean_kept(memory) -> float:
    heads = kept(memory)
    return sum(map(len, heads)) / len(heads)


# ------------------------------------------------------------------------------------------------------- the controls


@pytest.mark.parametrize("settings", [{}, {"sinks": 3, "window": 2}])
def test_controls_keep_as_many_as_the_namm_kept_of_the_same_prompt(settings):
    """Risk: one budget for all prompts, or that of the prompt before; prompts are read in another order as well."""
    model = model_of("llama")
    memories = {name: make() for name, make in namm_makers(model, CONFIG, PARAMETERS, **settings).items()}
    assert list(memories) == ROWS
    prompts = [tokens(n, seed=n) for n in (40, 57, 33)]
    budgets = [round(mean_kept(read(model, memories["namm"], ids))) for ids in prompts]
    assert len(set(budgets)) > 1
    for name in CONTROLS:
        for ids, budget in reversed(list(zip(prompts, budgets))):
            heads = kept(read(model, memories[name], ids))
            assert {len(head) for head in heads} == {budget}, name
            assert all(set(range(settings.get("sinks", 0))) <= set(head) for head in heads)


def test_the_random_choice_is_drawn_anew_for_each_head_and_prompt_and_the_same_in_each_run():
    """Risk: a control that is one draw, or another one whenever it is measured."""
    model, ids, other = model_of("llama"), tokens(40), tokens(40, seed=5)

    def drawn(ids, seed=0):
        makers = namm_makers(model, CONFIG, torch.zeros_like(PARAMETERS), seed)
        memory = makers["namm-random"]()
        memory._budgets = lambda seen: [20]
        return kept(read(model, memory, ids))

    heads = drawn(ids)
    assert heads == drawn(ids)
    assert heads != drawn(ids, seed=1)
    assert len(set(map(tuple, heads))) == len(heads)
    assert not set(map(tuple, heads)) & set(map(tuple, drawn(other)))
    undecided = set(range(35, 40))  # the newest token of the last decision, and those after it
    assert all(undecided <= set(head) for head in heads)


def test_recency_is_the_latest_tokens():
    model, ids = model_of("llama"), tokens(40)
    memory = namm_makers(model, CONFIG, PARAMETERS)["namm-recency"]()
    memory._budgets = lambda seen: [13]
    assert kept(read(model, memory, ids)) == [list(range(27, 40))] * len(memory.layers) * 2


def test_the_age_network_is_the_namm_without_attention():
    """Risk: another network, ages of another moment, or features that are not 0.

    The reference is a NAMM whose parameters do not read the spectrum: its first decision on the same tokens.
    """
    model, ids = model_of("llama"), tokens(CONFIG.interval * 5 + 4)
    blind = PARAMETERS.clone()
    split(blind, CONFIG.features, CONFIG.hidden)["qkv.weight"][CONFIG.age_size :] = 0
    config = CONFIG.replace(interval=CONFIG.interval * 5)  # one decision for the first 30 tokens
    whole = NAMM(model, config, blind)
    whole._evict = lambda layer, piece: scores.append(scored(whole, layer, piece))
    scores: list[torch.Tensor] = []

    def scored(memory, layer, piece):
        layer.held_numbers("spectrum").copy_(torch.tensor(config.mean)[:, None])  # the features are then 0
        return memory._scores(layer, [0], [piece.seen[0]])[0, 0]

    model(torch.tensor([ids]), past_key_values=whole)
    expected = scores[0]
    assert expected.shape == (30,)
    budget = 17
    memory = namm_makers(model, config, PARAMETERS)["namm-age"]()
    memory._budgets = lambda seen: [budget]
    heads = kept(read(model, memory, ids))
    order = expected[:29].argsort(descending=True).tolist()
    assert heads == [sorted([*order[: budget - 5], *range(29, 34)])] * len(heads)


# -------------------------------------------------------------------------------------------------- what it forgets


def test_what_is_forgotten_is_counted_by_kind_age_and_head():
    """Risk: shares that belong to the token beside it, or to another head."""
    pieces = ["<sink>", "The", " old", " Ann", "a", " saw", " 42", ",", "\n", " # see", " it", "\n"]

    class Letters:
        decode = staticmethod(lambda ids: "".join(pieces[i] for i in ids))

    class Layer:
        def __init__(self, *heads):
            self.heads = heads

        def held_positions(self):
            return torch.tensor([self.heads])

    memory = type(
        "Held", (), {"layers": [Layer([0, 3, 9, 11], [-1, 3, 10, 11]), Layer([-1, -1, -1, 3], [1, 2, 3, 11])]}
    )
    found = Forgotten(Letters, 1)
    found.add(range(12), memory)
    table = found.table()
    assert table.heads == [[pytest.approx(n / 12) for n in layer] for layer in ([4, 3], [1, 4])]
    assert [(row.kind, row.tokens, row.kept_share) for row in table.kinds] == [
        ("sink", 1, 0.25), ("blank", 2, 3 / 8), ("comment", 2, 0.25), ("number", 1, 0), ("function word", 1, 0.25),
        ("name", 2, 0.5), ("other word", 2, 1 / 8), ("punctuation", 1, 0),
    ]  # fmt: skip
    assert [(row.start, row.tokens) for row in table.ages] == [(0, 12)]
    found.add([8] * 20, memory)
    table = found.table()
    assert [(row.start, row.tokens) for row in table.ages] == [(0, 28), (16, 4)]
    kept_of_ages = [row.tokens * row.kept_share for row in table.ages]
    assert kept_of_ages == pytest.approx([12 / 4 + 5 / 4, 7 / 4])  # of the second prompt 9, 10, 11 and 0 … 3
    assert table.heads[0] == [pytest.approx((n / 12 + n / 20) / 2) for n in (4, 3)]
    assert table.prompts == 2


def test_the_text_of_a_token_is_what_it_adds_to_the_one_before():
    """Risk: a tokenizer that drops the blank of a first token, so that words run together."""

    class Words:
        @staticmethod
        def decode(ids):
            return "".join((" old", " Ann", "a", "\n")[i] for i in ids).removeprefix(" ")

    assert pieces_of(Words, [0, 1, 2, 3, 1]) == ["old", " Ann", "a", "\n", " Ann"]


def test_a_tokens_age_is_that_of_its_bin():
    """Guards the start of a bin: the token before the last one has age 1, and 16 is in the bin from 16 on."""

    class Letters:
        decode = staticmethod(lambda ids: "a" * len(ids))

    held = torch.arange(66)[None, None].roll(1, -1)
    held[held < 2] = -1  # the two oldest are forgotten
    found = Forgotten(Letters, 0)
    found.add(range(66), type("Held", (), {"layers": [type("Layer", (), {"held_positions": lambda self: held})()]}))
    assert [(row.start, row.tokens, row.kept_share) for row in found.table().ages] == [
        (0, 16, 1.0), (16, 48, 1.0), (64, 2, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "He met Anna. Then|they|left",
            "function word,other word,name,punctuation,function word,function word,other word",
        ),
        ("x = 3 // old\ny", "other word,punctuation,number,comment,comment,other word"),
        ("a#b", "function word,punctuation,other word"),
        ("/* a\nb */ c", "comment,comment,comment,comment,other word"),
        ("/* a */ b /* c */", "comment,comment,comment,other word,comment,comment,comment"),
        ("x // a\n# b\nc", "other word,comment,comment,comment,comment,other word"),
        ("The old UN saw Ann", "function word,other word,name,other word,name"),
        ("Don’t go, o’er", "other word,other word,punctuation,other word"),
        ("end.' Go", "other word,punctuation,punctuation,other word"),
        ("a\n  Go: “Go (Go", "function word,other word,punctuation,punctuation,other word,punctuation,other word"),
    ],
)
def test_kinds_of_tokens(text, expected):
    """Guards the rules: a capital that begins a sentence is not a name, and # inside of a word begins no comment."""
    pieces = re.findall(r"\s*(?:/\*|\*/|//|\w+(?:’\w+)?|[^\w\s])", text.replace("|", " "))
    assert kinds_of(pieces) == expected.split(",")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["#", " ", "a", "\n"], ["comment", "blank", "comment", "blank"]),
        ([" go,", "", "’s"], ["other word", "blank", "punctuation"]),
        (["it", "’s"], ["other word", "other word"]),
    ],
)
def test_a_token_has_the_kind_of_its_first_letter(pieces, expected):
    """Guards tokens that are no words: a blank in a comment, a word with its comma, a part of a word."""
    assert kinds_of(pieces) == expected


# ------------------------------------------------------------------------------------------------------- the commands


def command(capsys, name, *arguments) -> tuple[int, str, str]:
    return main([*name.split(), *map(str, arguments)]), *capsys.readouterr()


def test_memories(run, texts, artefact, tmp_path, capsys):
    code, out, err = command(
        capsys, "memories", "--model", run, "--text", texts, "--documents", 2, "--prompt", 40, "--continue", 6,
        "--memories", "namm", "--artefact", artefact, "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv",
        "--plot", tmp_path / "o.png",
    )  # fmt: skip
    assert code == 0, err
    content = json.loads((tmp_path / "o.json").read_text())
    check_rows(content["rows"], 41)
    assert content["artefact"] == str(artefact)
    assert len({row["nll"] for row in content["rows"]}) == 7
    assert all(name in out for name in ROWS)
    assert content_of(read_result(tmp_path / "o.json")) == content  # a report reads it, and nothing is lost
    forgets = content["forgets"]
    assert forgets["prompts"] == 2
    assert (forgets["kinds"][0]["kind"], forgets["kinds"][0]["tokens"]) == ("sink", 2)
    assert "age from 16" in out
    for name in ("kinds", "ages"):
        kept_tokens = sum(row["tokens"] * row["kept_share"] for row in forgets[name])
        assert sum(row["tokens"] for row in forgets[name]) == 2 * 41
        assert kept_tokens / (2 * 41) == pytest.approx(content["rows"][1]["kept_share"])
    shares = [share for layer in forgets["heads"] for share in layer]
    assert sum(shares) / len(shares) == pytest.approx(content["rows"][1]["kept_share"])


def test_latency(run, artefact, tmp_path, capsys):
    code, out, err = command(
        capsys, "latency --prefill", "--model", run, "--length", 40, "--memories", "namm", "--artefact", artefact,
        "--answers", 1, 3, "--rounds", 2, "--json", tmp_path / "o.json",
    )  # fmt: skip
    assert code == 0, err
    check_rows(json.loads((tmp_path / "o.json").read_text())["rows"], 41)
    assert all(name in out for name in ROWS)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_options_reach_the_rows(artefact):
    """Risk: --seed, --sinks or --window of the command has no effect on a row, or None replaces a default."""
    model, names = model_of("llama"), ("seed", "sinks", "window")
    rows = namm_rows(Namespace(artefact=artefact, seed=3, sinks=2, window=5), model)
    made = {name: make() for name, make in rows.items()}
    assert {memory.sinks for memory in made.values()} == {2}
    assert {made[name].window for name in ("namm", "namm-random", "namm-age", "namm-snapkv")} == {5}
    assert made["namm-random"].seed == 3
    made = {
        name: make() for name, make in namm_rows(Namespace(artefact=artefact, **dict.fromkeys(names)), model).items()
    }
    assert (made["namm"].sinks, made["namm"].window, made["namm-random"].seed) == (0, 1, 0)
    assert made["namm-snapkv"].window > 5, "the method's own"


def test_a_prompt_may_end_with_the_first_decision(artefact):
    options = Namespace(artefact=artefact)
    check_decides(options, ["namm"], "--prompt", CONFIG.interval)
    with pytest.raises(UserError, match=f"--prompt 5 ends before the first decision .* after {CONFIG.interval} tokens"):
        check_decides(options, ["namm"], "--prompt", CONFIG.interval - 1)
    assert check_namm(options, ["h2o", "namm"]) == CONFIG.interval
    assert check_namm(Namespace(artefact=None), ["h2o"]) == 0


COMMANDS = {
    "memories": ["--text", "TEXT", "--prompt", 40, "--continue", 8],
    "longcontext": ["--tasks", "niah_single_1"],
    "latency --prefill": ["--length", 40],
}
MISTAKES = [
    (["--memories", "namm"], "namm needs an evolved network; give --artefact"),
    (["--memories", "h2o", "--artefact", "ARTEFACT"], "add namm to --memories, or leave --artefact out"),
    (["--memories", "namm", "--artefact", "none/such/folder"], "is not a folder with a NAMM"),
]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_one_line_before_a_model_is_loaded(texts, artefact, tmp_path, capsys, name, changes, message):
    words = {"TEXT": texts, "ARTEFACT": artefact}
    given = [words.get(word, word) for word in (*COMMANDS[name], "--budgets", 8, *changes)]
    code, out, err = command(capsys, name, "--model", "no-such-model", *given, "--json", tmp_path / "o.json")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["memories", "latency --prefill"])
def test_a_prompt_that_ends_before_the_first_decision(texts, tmp_path, capsys, name):
    """Risk: rows in which nothing is forgotten, and which say that it costs nothing."""
    folder = write_artefact(tmp_path / "namm", interval=48)
    given = [texts if word == "TEXT" else word for word in COMMANDS[name]]
    code, out, err = command(
        capsys, name, "--model", "no-such-model", *given, "--memories", "namm", "--artefact", folder
    )
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search("--(prompt|length) 40 ends before the first decision of --artefact, after 48 tokens", err)


@pytest.mark.parametrize("name", ["memories", "longcontext"])
def test_positions_of_the_cache_are_refused(texts, artefact, capsys, name):
    given = [texts if word == "TEXT" else word for word in COMMANDS[name]]
    words = ["--memories", "namm", "--artefact", artefact, "--positions", "cache"]
    code, out, err = command(capsys, name, "--model", "no-such-model", *given, *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "--positions cache is not for namm" in err
