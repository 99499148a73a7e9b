"""Guards: nothing waits for the device between two logged lines; the metrics file continues when a run resumes."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import brentq
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.training.logs.metrics_file import COLUMNS, MetricsFile
from recipes.training.throughput import flops_per_token
from sinkmodel.attention import CAUSAL
from sinkmodel.checkpoint import read_metrics
from sinkmodel.models import build_model
from sinkmodel.shapes import ModelShape
from sinkmodel.sink_metric import COLUMNS as OF_SINKS
from sinkmodel.sink_metric import measure_sink
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig
from tests import tiny
from tests.recipes.runs import train


class Reads(TorchDispatchMode):
    """Counts how often Python asks for the value of a tensor: `item`, `tolist`, `if tensor`. Each waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.tolist = torch.Tensor.tolist  # which no mode sees
        torch.Tensor.tolist = lambda tensor: self.read(tensor)
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def read(self, tensor):
        self.count += 1
        return self.tolist(tensor)


def test_steps_between_two_lines_ask_nothing_of_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.training.trainer.peak_flops", lambda device, dtype: 1e12)  # it times
    data = tiny.prepared(tmp_path / "data")
    never = {"logging__every": 1000, "validation__every": 1000, "checkpoints__every": 1000}

    def reads(steps: int, **changes) -> int:
        with Reads() as mode:
            train(data, tmp_path / f"run{len(list(tmp_path.iterdir()))}", schedule__steps=steps, **changes)
        return mode.count

    few = reads(4, **never)
    assert few == reads(12, **never), "eight more steps, not one more read"
    assert reads(12, **(never | {"logging__every": 3})) > few > 0, "the counter counts"


def even_model(sink: SinkConfig | None = None):
    """Queries of nothing: every key scores alike, and a sink in the softmax with them."""
    shape = ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=64, positions=64)
    model = build_model(shape, 384, seed=1, sink=sink)
    for layer in model.gpt_neox.layers:
        layer.attention.query_key_value.weight.data.zero_()
    return model


@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_the_sink_of_an_even_spread(sinks):
    """The query at the sink counts (Gu et al.); of several sinks the largest α counts, which is that of the first."""
    model, row_1T = even_model(), torch.randint(0, 300, (1, 70))  # cut to 64
    even = sum(1 / (i + 1) for i in range(64)) / 64
    assert measure_sink(model, row_1T, sinks).tolist() == pytest.approx([even, 0], rel=1e-5)
    assert model.config._attn_implementation == "sdpa", "training continues with its fast kernel"


@pytest.mark.parametrize("kind", IN_SOFTMAX)
def test_a_sink_in_the_softmax_counts_and_not_the_first_token(kind):
    model, row_1T = even_model(SinkConfig(kind)), torch.randint(0, 300, (1, 64))
    model.set_attn_implementation(CAUSAL)
    for layer in model.gpt_neox.layers:  # every key scores 6 · 0.5 / √8, over the dimensions that RoPE leaves alone
        queries, keys, _ = layer.attention.query_key_value.bias.data.view(4, 3, 8).unbind(1)
        queries[:, 2:], keys[:, 2:] = 1, 0.5
        if kind != "zero":
            layer.attention.sink.data[..., 2:] = -0.3
            layer.attention.sink.data[..., :2] = {"logit": -0.3, "kv_bias": 0}[kind]
    key = 6 * 0.5 / math.sqrt(8)
    sink = {"zero": 0, "logit": -0.3, "kv_bias": 6 * -0.3 / math.sqrt(8)}[kind]
    share = sum(1 / (1 + (i + 1) * math.exp(key - sink)) for i in range(64)) / 64
    assert measure_sink(model, row_1T, sinks=0).tolist() == pytest.approx([share, 0], rel=1e-5)
    assert model.config._attn_implementation == CAUSAL


def test_heads_whose_sink_takes_more_than_three_tenths_are_counted():
    """Three of eight: a logit for each, by which the α of the sink is just above 0.3, or just below."""
    model, row_1T = even_model(SinkConfig("logit")), torch.randint(0, 300, (1, 64))
    shares = torch.tensor([[0.31, 0.29, 0.9, 0.01], [0.29, 0.5, 0.1, 0.2]])
    queries = torch.arange(64)

    def share_of(logit: float) -> float:
        return (math.exp(logit) / (math.exp(logit) + queries + 1)).mean().item()

    for layer, wanted in zip(model.gpt_neox.layers, shares.tolist()):
        layer.attention.sink.data = torch.tensor([brentq(lambda x, w=w: share_of(x) - w, -20, 20) for w in wanted])
    assert measure_sink(model, row_1T, sinks=0).tolist() == pytest.approx([shares.mean().item(), 3 / 8], rel=1e-4)


def test_flops_of_pythia_160m():
    """0.968 GFLOP a token at T = 2,048: 6 · (85,056,000 + 768 · 50,304) + 12 · 12 · 768 · 2,048."""
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        from sinkmodel.models import transformers_config

        model = AutoModelForCausalLM.from_config(transformers_config(ModelShape(), 50_304))
    assert flops_per_token(model, 2048) == 6 * (85_056_000 + 768 * 50_304) + 12 * 12 * 768 * 2048
    assert round(flops_per_token(model, 2048) / 1e9, 3) == 0.969


def test_metrics_file_drops_what_a_resume_will_write_again(tmp_path):
    log = MetricsFile(tmp_path / "metrics.csv")
    log.rewind(0)
    for step in (5, 10):
        log.log_metrics({"loss": 1 / 3, "tokens": step}, step)
        log.log_metrics({"val_loss": step / 7, "val_ppl": 2.0}, step)
    with log.path.open("a") as file:
        file.write("15,1500,0.2")  # a kill in the middle of a line
    log.rewind(5)
    assert [(row["step"], row["loss"], row["val_loss"]) for row in read_metrics(log.path.parent)] == [
        ("5", repr(1 / 3), ""),
        ("5", "", repr(5 / 7)),
    ]
    log.log_metrics({"loss": 0.25}, 10)
    assert len(read_metrics(log.path.parent)) == 3
    assert log.path.read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_run_of_an_earlier_version_keeps_its_old_columns(tmp_path):
    """Risk: a resume of it fails at a column that it does not know, or fills it with numbers of another definition."""
    log = MetricsFile(tmp_path / "metrics.csv")
    log.path.write_text("step,loss,sink_share,sink_heads\n5,0.5,0.1,0.25\n")
    log.rewind(5)
    log.log_metrics({"loss": 0.25, "sink_alpha": 0.3, "sink_metric": 0.5}, 10)
    old, new = read_metrics(log.path.parent)
    assert (old["loss"], old["sink_share"], old["sink_heads"], old["sink_alpha"], old["sink_metric"]) == (
        *("0.5", "0.1", "0.25", "", ""),
    )
    assert (new["loss"], new["sink_share"], new["sink_heads"], new["sink_alpha"], new["sink_metric"]) == (
        *("0.25", "", "", "0.3", "0.5"),
    )
    log.rewind(10)
    assert log.path.read_text().splitlines()[0] == ",".join([*COLUMNS, "sink_share", "sink_heads"])
    assert set(OF_SINKS) < set(COLUMNS)
