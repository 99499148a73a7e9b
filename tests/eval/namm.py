"""A tiny NAMM as an artefact, and what all commands have to give for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinkmodel.memories import NAMM
from sinkmodel.memories.namm import NAMMConfig
from tests.models import model_of

CONFIG = NAMMConfig(
    window=4, hop=2, interval=6, hidden=3, age_size=2, mean=(0.02, 0.015, 0.01), variance=(3e-4, 2e-4, 1e-4)
)
PARAMETERS = torch.randn(CONFIG.parameters, generator=torch.Generator().manual_seed(1))
CONTROLS = ["namm-random", "namm-recency", "namm-age", "namm-h2o", "namm-snapkv"]
ROWS = ["namm", *CONTROLS]


def write_artefact(folder: Path, **changes) -> Path:
    NAMM(model_of("llama"), CONFIG.replace(**changes), PARAMETERS).save_pretrained(folder)
    return folder


def check_rows(rows, slots: int):
    """Dense, then the six rows; their shares are those of what they keep, and equal up to a rounded slot."""
    assert [row["label"] for row in rows] == ["dense", *ROWS]
    shares = [row["kept_share"] for row in rows]
    assert shares[0] == 1
    assert 0.1 < shares[1] < 0.95
    assert shares[1] == pytest.approx(rows[1]["bytes_kept"] / rows[0]["bytes_kept"])
    for row, share in zip(rows[2:], shares[2:]):
        assert row["budget"] is None
        assert share == pytest.approx(shares[1], abs=0.5 / slots + 1e-9), row["label"]
