"""`namm` and its controls: memories that keep as many tokens of a prompt as the NAMM kept.

Even forgetting half of a prompt at random halves its size, so a NAMM must be compared with memories of the same size.
The NAMM decides how much it keeps. So the budget of its controls is what it kept of the same prompt: the mean over its
layers and KV heads at the end of the prompt, rounded.

    namm-random    random tokens, drawn separately for each prompt, layer and head
    namm-recency   the latest tokens
    namm-age       the tokens that the same network scores highest if all features of attention are 0: only age counts
    namm-h2o, namm-snapkv   the methods of these names

A NAMM always keeps the tokens that came after its last decision, and the newest token at that decision. The random
choice and the age network keep these too. Otherwise they would lose tokens that the NAMM did not decide about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval.measures.memories.forgotten import Forgotten
from sinkmodel.cache.inputs import Request
from sinkmodel.memories import H2O, NAMM, Memory, SnapKV
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.namm import NAMMConfig
from sinkmodel.memories.namm.network import token_scores
from sinkmodel.memories.namm.spectrogram import features

KEEPS = {  # the rows of `namm`, with descriptions of the tokens that they keep
    "namm": "what an evolved network wants to keep",
    "namm-random": "as many, drawn by chance",
    "namm-recency": "as many, the latest",
    "namm-age": "as many, the best by age alone",
    "namm-h2o": "as many, by h2o",
    "namm-snapkv": "as many, by snapkv",
}


class Sizes:
    """The number of tokens that a NAMM kept of each prompt: the mean over its layers and KV heads, rounded."""

    def __init__(self, forgotten: Forgotten | None = None):
        self._kept: dict[bytes, int] = {}
        self.forgotten = forgotten

    def note(self, prompt: bytes, memory: NAMM) -> None:
        self._kept[_digest(prompt)] = round(memory.keys_kept)
        if self.forgotten is not None:
            self.forgotten.add(torch.frombuffer(bytearray(prompt), dtype=torch.int64).tolist(), memory)

    def of(self, prompt: bytes) -> int:
        assert _digest(prompt) in self._kept, "the NAMM reads a prompt before its controls"
        return self._kept[_digest(prompt)]


def namm_makers(
    model: Any,
    namm: NAMMConfig,
    parameters: Tensor,
    seed: int = 0,
    forgotten: Forgotten | None = None,
    **settings: Any,
) -> dict[str, Callable[[], Memory]]:
    """For each row a function that makes its empty memory. The NAMM must read each prompt before the others do.

    Args:
        model: the model or its config.
        seed: random seed of namm-random.
        forgotten: counts what the NAMM kept of each prompt; None: it is not counted.
        settings: `sinks` and `window` of the NAMM and its controls.
    """
    sizes = Sizes(forgotten)
    of_namm = {"sinks": settings.get("sinks", 0), "window": settings.get("window", 1)}
    return {
        "namm": partial(Recorded, sizes, model, namm, parameters, **of_namm),
        "namm-random": partial(Random, sizes, model, namm, seed=seed, **of_namm),
        "namm-recency": partial(Recency, sizes, model, sinks=of_namm["sinks"]),
        "namm-age": partial(Age, sizes, model, namm, parameters=parameters, **of_namm),
        "namm-h2o": partial(MatchedH2O, sizes, model, **settings),
        "namm-snapkv": partial(MatchedSnapKV, sizes, model, **settings),
    }


def _digest(prompt: bytes) -> bytes:
    return hashlib.sha256(prompt).digest()


# ----------------------------------------------------------------------------------------------------- what is shared


class OfPrompt(Memory):
    """A memory that records the tokens of its prompt. It reads one row without padding."""

    def _begin(self) -> None:
        super()._begin()
        self.prompt = b""

    def _admit(self, *args: Any) -> Request:
        request = super()._admit(*args)
        assert len(request.tokens) == 1
        if not self.ended:
            self.prompt += request.tokens.long().cpu().numpy().tobytes()
        return request


class Recorded(OfPrompt, NAMM):
    """A NAMM that records its size at the end of each prompt."""

    name = "NAMM"

    def __init__(self, sizes: Sizes, *args: Any, **settings: Any):
        self.sizes = sizes
        super().__init__(*args, **settings)

    def _note_end(self) -> None:
        super()._note_end()
        self.sizes.note(self.prompt, self)


class Matched(OfPrompt):
    """A memory whose budget is the number of tokens that a NAMM kept of the same prompt."""

    def __init__(self, sizes: Sizes, config: Any, **settings: Any):
        self.sizes = sizes
        super().__init__(config, compression_ratio=0.0, **settings)

    def _budgets(self, seen: list[int]) -> list[int]:
        return [self.sizes.of(self.prompt)]

    def windows(self) -> list[int]:
        return [max(0, min(n, budget - self.sinks)) for n, budget in zip(super().windows(), self.budgets)]


class MatchedH2O(Matched, H2O):
    name = "H2O"


class MatchedSnapKV(Matched, SnapKV):
    """SnapKV with a window of at most half of its slots: with a window of all slots it would be recency."""

    name = "SnapKV"

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.widest = self.window

    def _budgets(self, seen: list[int]) -> list[int]:
        budgets = super()._budgets(seen)
        self.window = max(1, min(self.widest, budgets[0] // 2))
        return budgets


class Recency(Matched):
    """Keeps the latest tokens."""

    observes = False

    def scores(self, layer: MemoryLayer) -> Tensor:
        return layer.held_positions().float()


class Decided(Matched):
    """Chooses among the tokens that the NAMM has decided about, and keeps the tokens that the NAMM always keeps."""

    observes = False

    def __init__(self, sizes: Sizes, config: Any, namm: NAMMConfig, *, window: int = 1, **settings: Any):
        self.namm = namm
        super().__init__(sizes, config, window=max(1, window), **settings)

    @property
    def undecided(self) -> int:
        """The number of tokens after the last decision."""
        seen = self.piece.seen if self.piece is not None else self.seen
        return seen[0] % self.namm.interval

    def windows(self) -> list[int]:
        return [max(0, min(self.undecided + self.window, budget - self.sinks)) for budget in self.budgets]


class Random(Decided):
    """Keeps random tokens; they are the same whenever it reads the same prompt."""

    def __init__(self, sizes: Sizes, config: Any, namm: NAMMConfig, *, seed: int = 0, **settings: Any):
        self.seed = seed
        super().__init__(sizes, config, namm, **settings)

    def scores(self, layer: MemoryLayer) -> Tensor:
        content = f"{self.seed} {self.index_of(layer)} ".encode() + _digest(self.prompt)
        generator = torch.Generator().manual_seed(int.from_bytes(_digest(content)[:7], "big"))
        positions = layer.held_positions()
        return torch.rand(positions.shape, generator=generator).to(positions.device)


class Age(Decided):
    """Keeps the tokens that a NAMM's network scores highest if it sees only the age of each token.

    The features of attention are set to 0, their mean during evolution. The ages are those that the NAMM's network saw
    in its last decision.
    """

    def __init__(self, sizes: Sizes, config: Any, namm: NAMMConfig, *, parameters: Tensor, **settings: Any):
        self.parameters = parameters
        super().__init__(sizes, config, namm, **settings)

    def scores(self, layer: MemoryLayer) -> Tensor:
        decided = layer.length - self.undecided
        positions = layer.held_positions()[:, :1, :decided]
        spectrum = torch.zeros(1, 1, self.namm.bins, decided, device=positions.device)
        x_11KF = features(spectrum, decided - 1 - positions, self.namm)
        x_11KF[..., self.namm.age_size :] = 0
        scores = token_scores(x_11KF, self.parameters.to(positions.device), self.namm.hidden)
        return torch.nn.functional.pad(scores, (0, self.undecided))
