"""transformers' `Trainer` as a side of `bench.peers.training`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.peers.gate import Gate

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
GATE = Gate(JOB["block"])

import numpy as np  # noqa: E402  after the process is pinned
import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        tokens, T = torch.from_numpy(np.load(JOB["tokens"])), JOB["sequence"]
        self.rows_NT = tokens[: len(tokens) // T * T].view(-1, T)

    def __len__(self) -> int:
        return len(self.rows_NT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows_NT[index], "labels": self.rows_NT[index]}


class AtTheGate(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        GATE.step()


torch.manual_seed(0)
fields = dict(JOB["model"])
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=JOB["output"] + "-trainer",
        max_steps=1_000_000,
        per_device_train_batch_size=JOB["micro_rows"],
        gradient_accumulation_steps=JOB["rows"] // JOB["micro_rows"],
        learning_rate=JOB["lr"],
        lr_scheduler_type="cosine",
        adam_beta1=JOB["betas"][0],
        adam_beta2=JOB["betas"][1],
        adam_epsilon=JOB["eps"],
        weight_decay=JOB["weight_decay"],
        max_grad_norm=JOB["clip"],
        optim="adamw_torch_fused",
        logging_steps=JOB["block"],
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        torch_compile=JOB["compiled"],
    ),
    train_dataset=Rows(),
    callbacks=[AtTheGate()],
).train()
