"""Guards `sink-eval sinks`: the numbers on attention made by hand, the texts read, and the command on tiny models."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import sys

import pytest
import torch

from eval.cli import main
from eval.measures.attention import sinks as command
from eval.measures.attention.shares import Tally, largest, layer_sums, results, shares
from eval.measures.attention.sinks import in_turns, pieces, read_sequences
from sinkmodel.architectures import attentions_of
from sinkmodel.attention_maps import Seen, watch
from sinkmodel.errors import UserError
from sinkmodel.loading import encode, load_model
from sinkmodel.sink_metric import alpha, born, measure_sink
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.models import build, tokens

LENGTH, SEQUENCES = 20, 6


# ------------------------------------------------------------------------------------------------- attention by hand


def even(T: int) -> torch.Tensor:
    """[1, 1, T, T]: every query spreads its attention over all keys so far."""
    return (torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None])[None, None]


def to_key(k: int, T: int) -> torch.Tensor:
    """[1, 1, T, T]: all look at key k, from its own query on; before that at the first."""
    weights = torch.zeros(1, 1, T, T)
    weights[..., :k, 0] = weights[..., k:, k] = 1
    return weights


def seen(weights_BHTT: torch.Tensor, sink_BHT: torch.Tensor | None = None, layer: int = 0) -> Seen:
    B, T = len(weights_BHTT), weights_BHTT.shape[-1]
    key_BGTD = torch.zeros(B, 1, T, 4)
    key_BGTD[..., 0], key_BGTD[..., 1] = 3 * torch.arange(T), 4 * torch.arange(T)  # norm 5t at place t
    score = None if sink_BHT is None else sink_BHT.log()
    return Seen(layer, key_BGTD, key_BGTD, key_BGTD + 0, weights_BHTT.log(), weights_BHTT, score, sink_BHT)


def test_an_even_spread_gives_the_mean_of_one_over_the_keys_in_sight():
    """Guards the divisor: α_k is a mean over the queries from k on, its own among them (Gu et al.)."""
    expected = [(1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, (1 / 2 + 1 / 3 + 1 / 4) / 3, (1 / 3 + 1 / 4) / 2, 1 / 4]
    assert alpha(even(4))[0, 0].tolist() == pytest.approx(expected)
    sink, first, rest = (part.item() for part in shares(even(4), None, 0))
    assert (sink, first, rest) == pytest.approx((0, (1 / 2 + 1 / 3 + 1 / 4) / 3, (1 / 2 + 2 / 3 + 3 / 4) / 3))
    sink, first, rest = (part.item() for part in shares(even(4), None, 2))  # places 0 and 1 are sinks; one query counts
    assert (sink, first, rest) == pytest.approx((2 / 4, 1 / 4, 1 / 4))


def test_a_head_that_looks_at_one_key_has_its_sink_there_and_nowhere_else():
    assert alpha(to_key(0, 4))[0, 0].tolist() == [1, 0, 0, 0]
    assert alpha(to_key(2, 4))[0, 0].tolist() == [0.5, 0, 1, 0]
    for sinks, name in ((0, "first"), (1, "sink")):
        sums = layer_sums(seen(to_key(0, 4)), sinks, 0.3)
        assert sums[f"{name}_alpha"].tolist() == sums[f"{name}_heads"].tolist() == sums[f"{name}_share"].tolist() == [1]
        assert sums["heads_by_place"].tolist() == [[1, 0, 0, 0]]
    assert "sink_alpha" not in layer_sums(seen(even(4)), 0, 0.3)


def test_a_head_counts_by_the_sequence_and_only_above_epsilon():
    """Risk: the metric of the mean map in place of the mean over sequences, which is another number (Gu et al.)."""
    both = torch.cat([to_key(0, 4), to_key(3, 4)])  # α_0 is 1 and 3/4
    assert layer_sums(seen(both), 0, 0.75)["first_heads"].tolist() == [1]
    assert layer_sums(seen(both), 0, 0.74)["first_heads"].tolist() == [2]
    assert layer_sums(seen(both), 0, 0.75)["first_alpha"].tolist() == [1.75]


def test_of_several_sink_tokens_the_one_that_is_looked_at_counts():
    sums = layer_sums(seen(to_key(1, 4)), 2, 0.3)
    assert (sums["sink_alpha"].item(), sums["sink_heads"].item(), sums["sink_share"].item()) == (1, 1, 1)
    assert sums["first_alpha"].item() == 0


def test_a_sink_in_the_softmax_has_the_mean_share_that_it_takes():
    sink_BHT = torch.tensor([[[0.9, 0.5, 0.2, 0.8]]])
    sums = layer_sums(seen(even(4) * (1 - sink_BHT[..., None]), sink_BHT), 0, 0.3)
    assert sums["sink_alpha"].item() == pytest.approx(0.6), "over all queries"
    assert sums["sink_heads"].item() == 1
    assert sums["sink_share"].item() == pytest.approx((0.5 + 0.2 + 0.8) / 3)
    assert sums["first_alpha"].item() == pytest.approx((0.1 + 0.5 / 2 + 0.8 / 3 + 0.2 / 4) / 4)
    assert sum(sums[f"{name}_share"].item() for name in ("sink", "first", "rest")) == pytest.approx(1)


@pytest.mark.parametrize(("score", "share"), [(1e4, 1.0), (-1e4, 0.0)])
def test_a_huge_logit_takes_everything_and_a_tiny_one_nothing(score, share):
    model, ids_BT = build("llama-logit"), torch.tensor([tokens(12)])
    for module in attentions_of(model):
        module.sink.data.fill_(score)
    tally = Tally(0, 0.3)
    output = watch(model, ids_BT, tally.see, output_hidden_states=True)
    tally.end_batch(1, output.hidden_states[:-1])
    for row in results(tally.means(), 0, [None, None])[0]:
        assert [row.sink_alpha, row.sink_heads, row.sink_share] == [share] * 3
        assert row.first_share + row.rest_share == pytest.approx(1 - share)
        assert (row.value_norm_sink, row.key_norm_sink) == (0, None)


def test_norms_are_taken_at_the_sinks_the_first_token_and_behind_it():
    tally = Tally(2, 0.3)
    tally.see(seen(even(6)))
    tally.end_batch(1, [torch.ones(1, 6, 3)])
    ((row,), *_) = results(tally.means(), 2, [None])
    for name in ("key_norm", "value_norm"):
        norms = [getattr(row, f"{name}_{at}") for at in ("sink", "first", "rest")]
        assert norms == [2.5, 10, 20]  # 5t at 0, 1; 2; 3, 4, 5


def test_the_largest_activation_has_its_place_dimension_and_the_median_of_its_own_sequence():
    hidden_BTD = torch.ones(2, 3, 4)
    hidden_BTD[0] *= 5
    hidden_BTD[1, 2, 1] = -3000
    assert largest(hidden_BTD).tolist() == [3000, 2, 1, 1]


@pytest.mark.parametrize(("size", "times", "massive"), [(100, 2000, False), (101, 999, False), (101, 1001, True)])
def test_massive_is_both_large_and_a_thousand_medians(size, times, massive):
    hidden_BTD = torch.full((1, 4, 3), size / times)
    hidden_BTD[0, 1, 2] = size
    tally = Tally(0, 0.3)
    tally.see(seen(even(4)))
    tally.end_batch(1, [hidden_BTD])
    _, overall, _ = results(tally.means(), 0, [None])
    assert (overall.largest, overall.largest_place, overall.largest_dimension) == (size, 1, 2)
    assert overall.times_median == pytest.approx(times, rel=1e-4)
    assert overall.massive is massive


def test_batches_of_any_size_give_the_same_means():
    generator = torch.Generator().manual_seed(0)
    weights = (
        torch.randn(5, 3, 18, 18, generator=generator).masked_fill(torch.ones(18, 18).triu(1) > 0, -1e9).softmax(-1)
    )
    hidden = torch.randn(5, 18, 4, generator=generator)
    means = []
    for sizes in ([5], [1, 3, 1]):
        tally = Tally(1, 0.3)
        for part, states in zip(weights.split(sizes), hidden.split(sizes)):
            tally.see(seen(part))
            tally.end_batch(len(part), [states])
        means.append(tally.means()[0])
    assert means[0]["weight"].shape == (3, 16, 16)
    for name, value in means[0].items():
        torch.testing.assert_close(means[1][name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means[0]["weight"], weights.mean(0)[:, :16, :16].double())


@pytest.mark.parametrize(("name", "sinks"), [("llama", 0), ("llama", 2), ("llama-logit", 0)])
def test_a_run_logs_the_metric_that_this_command_measures(name, sinks):
    """Risk: one name with two definitions, in metrics.csv and in the result of `sink-eval sinks`."""
    model, ids_BT = build(name), torch.tensor([tokens(64)])
    tally = Tally(sinks, 0.3)
    output = watch(model, ids_BT, tally.see, output_hidden_states=True)
    tally.end_batch(1, output.hidden_states[:-1])
    _, overall, _ = results(tally.means(), sinks, [None, None])
    target = "first" if overall.sink_alpha is None else "sink"
    expected = [overall.shares[f"{target}_alpha"], overall.shares[f"{target}_heads"]]
    assert measure_sink(model, ids_BT, sinks).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_sink_is_born_where_it_stays():
    at = [1, 2, 3, 4]
    assert born(list(zip(at, [0, 0.5, 0, 0.2])), 0.1) == 4
    assert born(list(zip(at, [0, 0.2, 0.3, 0.2])), 0.1) == 2
    assert born(list(zip(at, [0.2, 0.2, 0.3, 0.2])), 0.1) == 1
    assert born(list(zip(at, [0.2, 0.2, 0.3, 0.1])), 0.1) is None, "above, not at"


# ------------------------------------------------------------------------------------------------- which texts are read


def test_pieces_follow_each_other_and_sources_take_turns():
    assert pieces(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert pieces(range(2), 3) == []
    assert list(in_turns(["ad", "", "bef", "c"])) == ["a", "b", "c", "d", "e", "f"]


def test_more_files_than_a_process_may_open(runs, tmp_path):
    """Risk: each file stays open until its next turn."""
    loaded = load_model(str(runs["llama", "none"]))
    files = [tmp_path / f"{number}.jsonl" for number in range(60)]
    for number, file in enumerate(files):
        texts = [tiny.words(20, seed=number * 10 + place) for place in range(5 if number % 20 == 0 else 1)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    try:
        taken, sequences = read_sequences(loaded, files, 66, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(sequences) == 66
    assert [each.sequences for each in taken] == [3 if number % 20 == 0 else 1 for number in range(60)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folder of a model of each architecture and sink."""
    folders = {}
    for family in ("gpt_neox", "llama"):
        for sink in (SinkConfig("none"), SinkConfig("token", 2), SinkConfig("kv_bias")):
            folders[family, sink.kind] = tmp_path_factory.mktemp(f"{family}-{sink.kind}")
            tiny.checkpoint(folders[family, sink.kind], family, sink)
    return folders


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A book, and a file of documents of which one is too short."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "book.txt").write_text(tiny.words(100))
    many = [tiny.words(60, seed=1), "short", tiny.words(9, seed=2)]
    (folder / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    return [folder / "book.txt", folder / "many.jsonl"]


def test_files_and_documents_take_turns_and_twins_read_the_same_text(runs, texts):
    vanilla, sink = (load_model(str(runs["llama", kind])) for kind in ("none", "token"))
    book = encode(vanilla, tiny.words(100))
    one, two = (encode(vanilla, tiny.words(count, seed)) for count, seed in ((60, 1), (9, 2)))
    taken, sequences = read_sequences(vanilla, texts, SEQUENCES, LENGTH)
    assert LENGTH <= len(two) < 2 * LENGTH, "else the third document has a second turn"
    places = [(book, 0), (one, 0), (two, 0), (book, 1), (one, 1), (book, 2)]
    assert sequences == [ids[n * LENGTH : (n + 1) * LENGTH] for ids, n in places]
    assert [text.sequences for text in taken] == [3, 3]
    _, with_sinks = read_sequences(sink, texts, SEQUENCES, LENGTH)
    assert with_sinks == [(sink.sink_ids + ids)[:LENGTH] for ids in sequences]
    assert len(sink.sink_ids) == 2


def test_a_long_document_gives_what_short_ones_cannot_and_too_few_are_said(runs, texts, capsys):
    loaded = load_model(str(runs["llama", "none"]))
    all_of_them = sum(len(encode(loaded, tiny.words(*of))) // LENGTH for of in ((100, 0), (60, 1), (9, 2)))
    assert len(read_sequences(loaded, texts, all_of_them, LENGTH)[1]) == all_of_them
    assert capsys.readouterr().err == ""
    assert len(read_sequences(loaded, texts, all_of_them + 1, LENGTH)[1]) == all_of_them
    assert f"{all_of_them} sequences of {LENGTH} tokens, fewer than" in capsys.readouterr().err
    with pytest.raises(UserError, match="no document of .*book.txt, .*many.jsonl has 4000 tokens"):
        read_sequences(loaded, texts, 2, 4000)


# ------------------------------------------------------------------------------------------------------- the command


def sinks(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["sinks", *map(str, arguments)])
    return (code, *capsys.readouterr())


def base(run, texts) -> list:
    return ["--model", run, "--text", *texts, "--sequences", SEQUENCES, "--length", LENGTH]


@pytest.mark.parametrize("kind", ["none", "token"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_all_numbers_are_those_of_transformers_own_eager_maps(runs, texts, tmp_path, capsys, family, kind, monkeypatch):
    """Guards every number of the JSON by a computation that shares no code with it; batches of 2 and 1 sequences."""
    monkeypatch.setattr(command, "TOKENS_AT_ONCE", 2 * LENGTH)
    run, epsilon = runs[family, kind], {"none": 0.18, "token": 0.12}[kind]
    code, out, err = sinks(capsys, *base(run, texts), "--epsilon", epsilon, "--json", tmp_path / "o.json")
    assert code == 0, err
    result = json.loads((tmp_path / "o.json").read_text())
    loaded = load_model(str(run))
    loaded.model.set_attn_implementation("eager")
    S = len(loaded.sink_ids)
    _, ids = read_sequences(loaded, texts, SEQUENCES, LENGTH)
    output = loaded.model(torch.tensor(ids), output_attentions=True, output_hidden_states=True, use_cache=True)
    counts = []
    for row, maps, hidden, cached in zip(
        result["rows"], output.attentions, output.hidden_states, output.past_key_values.layers
    ):
        of_place = [maps[:, :, k:, k].mean(-1) for k in range(S + 1)]
        targets = {"first": of_place[S], **({"sink": torch.stack(of_place[:S]).amax(0)} if S else {})}
        for name, values in targets.items():
            assert row[f"{name}_alpha"] == pytest.approx(values.mean().item(), abs=1e-5)
            assert row[f"{name}_heads"] == pytest.approx((values > epsilon).float().mean().item(), abs=1e-6)
            of_heads = [head[f"{name}_alpha"] for head in row["heads"]]
            assert of_heads == pytest.approx(values.mean(0).tolist(), abs=1e-5)
            counts.append(row[f"{name}_heads"])
        late = maps[:, :, S + 1 :]
        assert row["first_share"] == pytest.approx(late[..., S].mean().item(), abs=1e-5)
        assert row["rest_share"] == pytest.approx(late[..., S + 1 :].sum(-1).mean().item(), abs=1e-5)
        assert row["sink_share"] == (pytest.approx(late[..., :S].sum(-1).mean().item(), abs=1e-5) if S else None)
        for name, states in (("key_norm", cached.keys), ("value_norm", cached.values)):
            norms = states.norm(dim=-1).mean((0, 1))
            assert row[f"{name}_first"] == pytest.approx(norms[S].item(), rel=1e-4)
            assert row[f"{name}_rest"] == pytest.approx(norms[S + 1 :].mean().item(), rel=1e-4)
            assert row[f"{name}_sink"] == (pytest.approx(norms[:S].mean().item(), rel=1e-4) if S else None)
        b, place, dimension = (x.item() for x in torch.unravel_index(hidden.abs().argmax(), hidden.shape))
        assert (row["largest_place"], row["largest_dimension"]) == (place, dimension)
        assert row["largest"] == pytest.approx(hidden.abs().max().item(), rel=1e-4)
        assert row["median"] == pytest.approx(hidden[b].abs().flatten().median().item(), rel=1e-3)
    assert 0 < sum(counts) < len(counts), "else ε proves little"
    for name in ("first_alpha", "first_heads", "rest_share"):
        assert result["overall"][name] == pytest.approx(sum(row[name] for row in result["rows"]) / 2)
    assert result["heads_by_place"][S] == pytest.approx(result["overall"]["first_heads"])
    assert len(result["heads_by_place"]) == 10
    assert ("α sink" in out) is (S > 0)


def test_a_sink_in_the_softmax_is_measured_and_drawn(runs, texts, tmp_path, capsys):
    code, out, err = sinks(capsys, *base(runs["llama", "kv_bias"], texts), "--maps", tmp_path / "maps",
                           "--heads", "1.3", "--json", tmp_path / "o.json")  # fmt: skip
    assert code == 0, err
    for row, module in zip(
        json.loads((tmp_path / "o.json").read_text())["rows"],
        attentions_of(load_model(str(runs["llama", "kv_bias"])).model),
    ):
        assert 0 < row["sink_share"] < 1
        assert row["sink_share"] + row["first_share"] + row["rest_share"] == pytest.approx(1)
        assert row["value_norm_sink"] == 0
        assert row["key_norm_sink"] == pytest.approx(module.sink.norm(dim=-1).mean().item())
    rows = list(csv.DictReader((tmp_path / "maps" / "maps.csv").open()))
    assert len(rows) == 2 * 4 * (16 * 17 // 2 + 16), "layers × heads × (keys in sight and the sink, of each query)"
    for query in range(16):
        weights = [float(r["weight"]) for r in rows if (r["layer"], r["head"], r["query"]) == ("1", "3", str(query))]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert "α sink" in out


def test_maps_are_means_over_sequences_of_weights_and_logits(runs, texts, tmp_path, capsys):
    code, _, err = sinks(capsys, *base(runs["gpt_neox", "token"], texts), "--maps", tmp_path / "maps")
    assert code == 0, err
    loaded = load_model(str(runs["gpt_neox", "token"]))
    shown: list[Seen] = []
    watch(loaded.model, torch.tensor(read_sequences(loaded, texts, SEQUENCES, LENGTH)[1]), shown.append)
    rows = list(csv.DictReader((tmp_path / "maps" / "maps.csv").open()))
    assert len(rows) == 2 * 4 * 16 * 17 // 2
    for row in rows[:: len(rows) // 40]:
        layer, head, query, key = (int(row[name]) for name in ("layer", "head", "query", "key"))
        assert float(row["weight"]) == pytest.approx(
            shown[layer].weights_BHTT[:, head, query, key].mean().item(), abs=1e-5
        )
        assert float(row["logit"]) == pytest.approx(
            shown[layer].score_BHTT[:, head, query, key].mean().item(), abs=1e-4
        )
    assert (tmp_path / "maps" / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_the_heads_drawn_are_the_papers():
    from eval.report.maps import papers_heads

    assert papers_heads(32) == [(layer, 0) for layer in (0, 1, 2, 9, 16, 23, 31)]
    assert papers_heads(2) == [(0, 0), (1, 0)]
    assert papers_heads(12)[-1] == (11, 0)
    assert papers_heads(1) == [(0, 0)]


def test_the_same_call_gives_the_same_bytes(runs, texts, tmp_path, capsys):
    contents = []
    for name in ("a", "b"):
        arguments = [
            *base(runs["llama", "token"], texts),
            "--json",
            tmp_path / f"{name}.json",
            "--maps",
            tmp_path / name,
        ]
        assert sinks(capsys, *arguments)[0] == 0
        text = re.sub(r'"date": "[^"]*"', "", (tmp_path / f"{name}.json").read_text())
        contents.append((text, *((tmp_path / name / file).read_bytes() for file in ("maps.csv", "maps.png"))))
    assert contents[0] == contents[1]


def aged(folder, steps: dict[int, float]):
    """A run whose checkpoints differ in how much each token looks at itself: 0 spreads attention evenly."""
    for step, itself in steps.items():
        path = tiny.checkpoint(folder, "gpt_neox", SinkConfig("none"), step)
        content = torch.load(path, weights_only=True)
        for name, value in content["state_dict"].items():
            if "query_key_value" in name:
                value.zero_()
                if name.endswith("bias"):
                    value.view(4, 3, 8)[:, :2, 0] = itself  # the rotated dimension of queries and keys
        torch.save(content, path)
    return folder


def test_checkpoints_are_rows_in_order_of_step_and_say_when_the_sink_is_born(texts, tmp_path, capsys):
    """An even spread has α = (1 + 1/2 + … + 1/8)/8 = 0.34 at the first token, a look at oneself about 1/8."""
    run = aged(tmp_path / "run", {100: 20.0, 20: 0.0, 1000: 0.0, 7: 20.0})
    arguments = ["--model", run, "--text", *texts, "--sequences", 4, "--length", 8, "--checkpoints"]
    code, out, err = sinks(capsys, *arguments, "--json", tmp_path / "o.json")
    assert code == 0, err
    result = json.loads((tmp_path / "o.json").read_text())
    assert [(row["step"], row["tokens"]) for row in result["rows"]] == [(s, 1000 * s) for s in (7, 20, 100, 1000)]
    assert [row["first_heads"] for row in result["rows"]] == [0, 1, 0, 1]
    assert result["rows"][1]["first_alpha"] == pytest.approx(sum(1 / i for i in range(1, 9)) / 8)
    assert result["born"] == {"target": "first", "threshold": 0.05, "step": 1000, "tokens": 1000000}
    assert "the sink is born at step 1000 (1,000,000 tokens)" in out
    for row in result["rows"]:
        assert [len(layer["heads"]) for layer in row["layers"]] == [4, 4]
        assert {head["first_heads"] for layer in row["layers"] for head in layer["heads"]} == {row["first_heads"]}
        assert len(row["heads_by_place"]) == 8, "the first places, one by one"
        assert row["heads_by_place"][0] == row["first_heads"]
    (run / "checkpoints" / "step1000.ckpt").unlink()
    assert "no sink is born" in sinks(capsys, *arguments)[1]
    (run / "checkpoints" / "step7.ckpt").unlink()
    (run / "checkpoints" / "step100.ckpt").unlink()
    assert "the sink is there at the first checkpoint, step 20 (20,000 tokens)" in sinks(capsys, *arguments)[1]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("somebody's")
    aged(tmp_path / "broken", {1: 0.0, 2: 0.0})
    (tmp_path / "broken" / "checkpoints" / "step2.ckpt").write_bytes(b"half a file")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--sequences", 0], "--sequences"),
        (["--length", 1], "--length 1 is too short"),
        (["--length", 3], "--length 3 leaves too little text after the model's 2 sink tokens; use at least 4"),
        (["--length", 129], "--length 129 is longer than the 128 positions"),
        (["--epsilon", 1], "--epsilon: '1' is not a number from 0 to below 1"),
        (["--epsilon", "nan"], "--epsilon"),
        (["--text", "BAD/short.txt"], "no document of .*short.txt has 20 tokens"),
        (["--text", "BAD/none.txt"], "none.txt does not exist"),
        (["--text", "BAD/short.txt", "BAD/short.txt"], "--text has .*short.txt twice"),
        (["--model", "BAD/none"], "none is not a folder"),
        (["--json", "BAD/none/o.json"], "none does not exist"),
        (["--maps", "BAD/folder"], "folder already holds something else"),
        (["--maps", "BAD/short.txt/maps"], "maps cannot be made: .*short.txt is a file"),
        (["--heads", "0.1"], "--heads chooses what --maps draws"),
        (["--maps", "BAD/m", "--heads", "0"], "'0' is not LAYER.HEAD"),
        (["--maps", "BAD/m", "--heads", "0.4"], "--heads 0.4: .* has layers 0 to 1 with heads 0 to 3"),
        (["--maps", "BAD/m", "--heads", "2.0"], "--heads 2.0"),
        (["--maps", "BAD/m", "--checkpoints"], "--maps draws one model"),
        (["--born", 0.1], "--born needs --checkpoints"),
        (["--checkpoints", "--model", "BAD/short.txt"], "needs a run folder"),
        (["--checkpoints", "--model", "BAD/folder"], "holds no checkpoints"),
        (["--checkpoints", "--model", "BAD/broken"], "step2.ckpt is not a complete checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(runs, texts, bad, capsys, changes, message):
    given = {"--model": [runs["llama", "token"]], "--text": texts, "--length": [LENGTH], "--json": [bad / "o.json"]}
    changes = [str(part).replace("BAD", str(bad)) for part in changes]
    for part in changes:
        given.pop(part, None)
    before = sorted(bad.rglob("*"))
    code, out, err = sinks(capsys, *changes, *(part for key, values in given.items() for part in (key, *values)))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("sink-eval: ")
    assert re.search(message, err), err
    assert sorted(bad.rglob("*")) == before


def test_a_model_that_cannot_be_watched_and_one_that_gives_nan_leave_no_file(texts, tmp_path, capsys):
    from sinkmodel.tokenizer import load_tokenizer

    for family, settings, message in (("Bloom", {}, "'bloom' does not send"), ("llama", {"break": True}, "not finite")):
        broken = settings.pop("break", False)
        model = build(family, vocab_size=400, **settings)
        if broken:
            model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
        model.save_pretrained(tmp_path / family)
        load_tokenizer(tiny.tokenizer(), SinkConfig("none"), 128).save_pretrained(tmp_path / family)
        capsys.readouterr()
        code, _, err = sinks(capsys, *base(tmp_path / family, texts), "--json", tmp_path / "o.json")
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
        assert not (tmp_path / "o.json").exists()


def test_a_missing_matplotlib_is_said_before_anything_is_loaded(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "eval.report.maps", raising=False)
    code, _, err = sinks(capsys, "--model", tmp_path / "none", "--text", *texts, "--maps", tmp_path / "maps")
    assert code == 2
    assert "sinkmodel[plots]" in err
