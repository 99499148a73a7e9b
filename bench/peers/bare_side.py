"""The simplest loop in PyTorch as a side of `bench.peers.training`: full logits, cross-entropy, clipping, AdamW.

It reads rows of tokens that are in memory. It has no schedule, no log, no validation and no checkpoints.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from bench.peers.gate import Gate

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
GATE = Gate(JOB["block"])

import numpy as np  # noqa: E402  after the process is pinned
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)
fields = dict(JOB["model"])
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
run = torch.compile(model) if JOB["compiled"] else model
adamw = {"lr": JOB["lr"], "betas": JOB["betas"], "eps": JOB["eps"], "weight_decay": JOB["weight_decay"]}
optimizer = torch.optim.AdamW(model.parameters(), fused=True, **adamw)
tokens, T = torch.from_numpy(np.load(JOB["tokens"])), JOB["sequence"]
rows = [tokens[i * T : (i + 1) * T + 1] for i in range((len(tokens) - 1) // T)]  # a row and the token after it
chosen = itertools.cycle(rows)
parts = JOB["rows"] // JOB["micro_rows"]
while True:
    for _ in range(parts):
        batch = torch.stack([next(chosen) for _ in range(JOB["micro_rows"])])
        logits = run(input_ids=batch[:, :-1], use_cache=False).logits
        (F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / parts).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), JOB["clip"])
    optimizer.step()
    optimizer.zero_grad()
    GATE.step()
