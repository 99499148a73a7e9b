"""`litgpt.pretrain` as a side of `bench.peers.training`; runs in an environment with litgpt and without our packages.

Its loop has no callback at the end of a step, so the gate is where it asks for the next batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.peers.gate import Gate

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
GATE = Gate(JOB["block"])

import numpy as np  # noqa: E402  after the process is pinned
import torch  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.config import Config  # noqa: E402
from litgpt.data import DataModule  # noqa: E402
from litgpt.pretrain import setup  # noqa: E402


class GatedLoader(torch.utils.data.DataLoader):
    """Asking for a batch ends the step before it, except at the start of an epoch."""

    steps = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch
            GatedLoader.steps += 1
            if GatedLoader.steps % (JOB["rows"] // JOB["micro_rows"]) == 0:
                GATE.step()


class Rows(DataModule):
    def connect(
        self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **more: Any
    ) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        tokens, T = torch.from_numpy(np.load(JOB["tokens"])), JOB["sequence"]
        count = (len(tokens) - 1) // T
        rows = [tokens[i * T : (i + 1) * T + 1] for i in range(count)]  # a row and the token after it
        return GatedLoader(rows, batch_size=self.batch_size, shuffle=True, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        rows = torch.zeros(1, JOB["sequence"] + 1, dtype=torch.long)
        return torch.utils.data.DataLoader(list(rows), batch_size=1)  # type: ignore[arg-type]


def config() -> Config:
    """litgpt's config of the same GPT-NeoX."""
    model = JOB["model"]
    return Config(
        name="tiny",
        block_size=JOB["sequence"],
        n_layer=model["num_hidden_layers"],
        n_embd=model["hidden_size"],
        n_head=model["num_attention_heads"],
        intermediate_size=model["intermediate_size"],
        vocab_size=model["vocab_size"],
        padded_vocab_size=model["vocab_size"],
        rotary_percentage=model["rope_parameters"]["partial_rotary_factor"],
        norm_eps=model["layer_norm_eps"],
    )


torch.set_num_threads(1)
adamw = {"lr": JOB["lr"], "betas": JOB["betas"], "eps": JOB["eps"], "weight_decay": JOB["weight_decay"]}
setup(
    "tiny",
    model_config=config(),
    out_dir=Path(JOB["output"] + "-litgpt"),
    precision="32-true",
    data=Rows(),
    train=TrainArgs(
        save_interval=None,
        log_interval=JOB["block"],
        global_batch_size=JOB["rows"],
        micro_batch_size=JOB["micro_rows"],
        max_tokens=1_000_000 * JOB["rows"] * JOB["sequence"],
        max_norm=JOB["clip"],
        min_lr=JOB["min_lr"],
        lr_warmup_steps=100,
        tie_embeddings=False,
    ),
    eval=EvalArgs(interval=1_000_000_000, initial_validation=False),
    optimizer={"class_path": "torch.optim.AdamW", "init_args": adamw},
    devices=1,
    logger_name="csv",
)
