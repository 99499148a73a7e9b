"""`NAMM`: after every `interval` tokens of a row, each KV head of each layer evicts tokens with scores below 0.

There is no budget. The number of kept tokens differs by row, layer and head, so a layer has as many slots as its
longest set, and shorter sets have empty slots at the front. Each layer's attention has its own mask. Each row counts
its own tokens, so a padded row decides at the same tokens as it would alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkmodel.cache.inputs import Request
from sinkmodel.checks import one_of
from sinkmodel.errors import UserError
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory, Positions
from sinkmodel.memories.namm.config import NAMMConfig, check_parameters, read_artefact, write_artefact
from sinkmodel.memories.namm.network import token_scores
from sinkmodel.memories.namm.spectrogram import add_hop, features
from sinkmodel.memories.observation import BLOCK_NUMBERS, Observation
from sinkmodel.memories.pieces import Piece, visible
from sinkmodel.memories.selection import EMPTY, best, force, kept

EVERYTHING = 2**62
STATE = ("spectrum", "past", "begun")  # numbers of each slot; the last exists only while a frame is incomplete
Ragged = Literal["true", "fill"]


class NAMM(Memory):
    """A memory that keeps the tokens that an evolved network selects.

    Args:
        config: the model or its config, as for every `Memory`.
        namm: sizes, statistics and origin of the network; None for the defaults.
        parameters: [P], or [B, P] for one network per row, in the order of `network.layout`. None: zeros, which keep
            everything.
        ragged: "true": each row, layer and KV head keeps its own set. "fill", as in the published code: every head of a
            layer keeps as many tokens as the head that keeps most; the others add their best ones below 0.
        sinks: number of leading tokens of each row that are always kept.
        window: number of the last tokens of each row that are always kept; at least 1, the newest.

    A prompt and the text after it are treated alike: the end of the prompt is not an event. Tokens cannot be removed
    again. Keys stay at their positions in the text, since the heads of a layer have sets of different sizes.

    Raises:
        UserError: as for every `Memory`, and for parameters of a wrong size.
    """

    SETTINGS = ("sinks", "window", "ragged", "fingerprint")
    takes_budget = False
    even = False

    def __init__(
        self,
        config: Any,
        namm: NAMMConfig | None = None,
        parameters: Tensor | None = None,
        *,
        ragged: Ragged = "true",
        sinks: int = 0,
        window: int = 1,
        positions: Positions = "text",
    ):
        if positions != "text":
            raise UserError("the heads of a NAMM keep sets of different sizes, so positions can only be 'text'")
        super().__init__(config, EVERYTHING, sinks=sinks, window=max(1, window))
        self.namm = namm or NAMMConfig()
        self.ragged = one_of("ragged", ragged, Ragged)
        self.interval = self.namm.interval
        self.at_once = False  # `observe` computes the attention's output of the running layer from the weights
        self.parameters = self._checked(torch.zeros(self.namm.parameters) if parameters is None else parameters)

    # ---------------------------------------------------------------------------------------- artefacts and candidates

    @classmethod
    def from_pretrained(cls, name: str | Path, config: Any, *, revision: str | None = None, **settings: Any) -> NAMM:
        """The memory of an artefact, which is a folder or a Hub name. `config` and `settings` are as for `NAMM`.

        `revision` is a branch, tag or commit of a repository on the Hub. Raises UserError if there is no such artefact,
        or if it is damaged, of another version or altered.
        """
        return cls(config, *read_artefact(name, revision), **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artefact to a new folder. Raises UserError if it is not empty, or for several networks."""
        write_artefact(folder, self.namm, self.parameters)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters and the statistics, which determine all decisions."""
        content = self.parameters.cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(content + self.namm.statistics_sha256.encode()).hexdigest()

    def with_parameters(self, parameters: Tensor) -> NAMM:
        """A fork that from now on decides with other parameters: [P], or [B, P] for one network per row."""
        if parameters.dim() == 2 and self.seen and len(parameters) != len(self.seen):
            raise UserError(f"parameters are for {len(parameters)} rows, and this {self.name} holds {len(self.seen)}")
        other = self.fork()
        other.parameters = other._checked(parameters)
        return other

    def for_candidates(self, candidates: Tensor) -> NAMM:
        """A fork in which every row is repeated for each candidate of [candidates, P].

        Row r of this memory becomes the rows r · candidates, …, r · candidates + candidates − 1 of the fork.
        """
        if candidates.dim() != 2:
            raise UserError(f"candidates are {list(candidates.shape)}; give [candidates, {self.namm.parameters}]")
        other = self.with_parameters(candidates[0])
        rows = max(1, len(other.seen))
        other.batch_repeat_interleave(len(candidates))
        other.parameters = other._checked(candidates.repeat(rows, 1))
        return other

    def _checked(self, parameters: Tensor) -> Tensor:
        check_parameters(self.namm, parameters)
        return parameters.detach().float()

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen and self.parameters.dim() == 2:
            self.parameters = self.parameters[indices.to(self.parameters.device)]
        super().batch_select_indices(indices)

    @property
    def is_croppable(self) -> bool:
        return False

    def _admit(self, *args: Any) -> Request:
        request = super()._admit(*args)
        rows = len(request.tokens)
        if self.parameters.dim() == 2 and len(self.parameters) != rows:
            self._begin()  # the memory is empty here, else its rows would match
            raise UserError(f"this {self.name} has parameters for {len(self.parameters)} rows, the input has {rows}")
        return request

    # ------------------------------------------------------------------------------------------- when a row decides

    def columns_to_next_event(self, valid_BT: Tensor | None = None) -> int:
        left = [self.namm.interval - n % self.namm.interval for n in self.seen]
        if valid_BT is not None:  # pads come first
            pads = (~valid_BT).sum(dim=1).tolist()
            left = [n + more for n, more in zip(left, pads)]
        columns = min(left, default=self.namm.interval)
        to_end = super().columns_to_next_event() if not self.ended else EVERYTHING
        return min(columns, to_end)

    def evicts_after(self, count: int, seen: list[int]) -> bool:
        return bool(self._deciding(seen))

    def _deciding(self, seen: list[int]) -> list[int]:
        """The rows that decide at the end of a piece, after which they have `seen` tokens."""
        return [
            row for row, (n, before) in enumerate(zip(seen, self.seen)) if n > before and n % self.namm.interval == 0
        ]

    # -------------------------------------------------------------------------------------------------- attention

    def attend(
        self, attention: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: Any
    ) -> tuple[Tensor, Any]:
        piece = self.piece
        assert piece is not None
        plain = attention is ALL_ATTENTION_FUNCTIONS.get("sdpa") and all(
            kwargs.get(name) is None for name in ("s_aux", "softcap")
        )
        self.at_once = plain and piece.valid_BN is None and len(list(self._alike(piece))) == 1
        return super().attend(attention, module, query, key, value, kwargs)

    def visible_in(self, layer: MemoryLayer, piece: Piece) -> tuple[Tensor | None, Tensor | None]:
        """As in `Memory`, but for each head: [B, G, K] and a mask [B, H, N, K]."""
        full, count = layer.held_positions() != EMPTY, piece.end - piece.start
        _, G, K = full.shape
        every = bool(full.all())
        if self.at_once:
            return (None if every else full), None
        if every:
            return None, visible(None, K - count, count, self.implementation, full.device)
        mask = visible(full.flatten(0, 1), K - count, count, self.implementation, full.device)
        assert mask is not None
        return full, mask.view(-1, G, count, K).repeat_interleave(self.config.num_attention_heads // G, dim=1)

    def attend_and_observe(
        self, attention: Callable[..., Any], layer: MemoryLayer, seen: Observation, mask: Tensor | None, kwargs: Any
    ) -> tuple[Tensor, Any]:
        """As in `Memory`. Observing computes all weights, so if possible the output is computed from these."""
        if not self.at_once:
            return super().attend_and_observe(attention, layer, seen, mask, kwargs)
        B, H, N, _ = seen.query_BHND.shape
        output = seen.values_BGKV.new_empty(B, N, H, seen.values_BGKV.shape[-1])
        self.observe(layer, seen, output)
        return output, None

    # ------------------------------------------------------------------------------------------------------- features

    def observe(self, layer: MemoryLayer, seen: Observation, output_BNHV: Tensor | None = None) -> None:
        """As in `Memory`. `output_BNHV` is given only if all rows are alike; it receives the attention's output."""
        piece, config = self.piece, self.namm
        assert piece is not None
        B, G = layer.keys.shape[:2]
        layer.numbers("spectrum", B, G, config.bins)
        layer.numbers("past", B, G, config.window - config.hop)
        for rows, begun, count in self._alike(piece):
            if begun or count % config.hop:
                layer.numbers("begun", B, G, config.hop)
            of_slots = [layer.held_numbers(name) for name in STATE if name in layer.per_slot]
            if len(rows) == B:
                self._add(seen.last(count), output_BNHV, begun, *of_slots)
            else:
                own = [x[rows] for x in of_slots]
                self._add(seen.last(count).of_rows(rows), None, begun, *own)
                for x, changed in zip(of_slots, own):
                    x[rows] = changed
        if not any(n % config.hop for n in piece.seen):
            layer.per_slot.pop("begun", None)

    def _alike(self, piece: Piece) -> Iterator[tuple[list[int], int, int]]:
        """Yield rows with equally many tokens in an incomplete frame and equally many new ones, with both numbers."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (n, before) in enumerate(zip(piece.seen, self.seen)):
            if n > before:
                groups.setdefault((before % self.namm.hop, n - before), []).append(row)
        for (begun, count), rows in groups.items():
            yield rows, begun, count

    def _add(
        self,
        seen: Observation,
        output_BNHV: Tensor | None,
        begun: int,
        spectrum: Tensor,
        past: Tensor,
        begun_BGNK: Tensor | None = None,
    ) -> None:
        """Add the attention of new queries to the spectra. An incomplete frame already has `begun` values."""
        hop, N, K = self.namm.hop, seen.query_BHND.shape[2], seen.keys_BGKD.shape[2]
        done = 0
        if begun:
            assert begun_BGNK is not None
            done = min(N, hop - begun)
            begun_BGNK[:, :, begun : begun + done, : K - N + done] = seen.group_means(0, done, output_BNHV)
            if begun + done == hop:
                of_heads = [x.view(-1, *x.shape[2:]) for x in (spectrum, past, begun_BGNK)]
                add_hop(of_heads[0], of_heads[1], of_heads[2], self.namm)
                begun_BGNK.zero_()
        end = done + (N - done) // hop * hop
        if done < end:
            G = spectrum.shape[1]
            outputs = [None] * G if output_BNHV is None else output_BNHV.chunk(G, dim=2)
            for g, output in enumerate(outputs):
                self._add_hops(seen, output, done, end, g, spectrum[:, g], past[:, g])
        if end < N:
            assert begun_BGNK is not None
            begun_BGNK[:, :, : N - end] = seen.group_means(end, N, output_BNHV)

    def _add_hops(
        self,
        seen: Observation,
        output_BNRV: Tensor | None,
        start: int,
        end: int,
        group: int,
        spectrum: Tensor,
        past: Tensor,
    ) -> None:
        """Add the attention of the queries [start, end), a multiple of hop, to the spectra of one KV head."""
        hop, N = self.namm.hop, seen.query_BHND.shape[2]
        first = 0  # slots before it are empty in every row
        if seen.full_BK is not None:
            full = seen.full_BK[:, group] if seen.full_BK.dim() == 3 else seen.full_BK
            first = int((~full).sum(dim=-1).min())
        head = seen.of_head(group, first)
        B, R, _, _ = head.query_BHND.shape
        K = head.keys_BGKD.shape[2]
        numbers = BLOCK_NUMBERS.get(head.query_BHND.device.type, BLOCK_NUMBERS["cuda"])
        block = max(1, numbers // (B * R * K * hop)) * hop
        for begin in range(start, end, block):
            stop = min(end, begin + block)
            k = K - N + stop  # these queries see no later key
            for rows in head.group_means(begin, stop, output_BNRV)[:, 0].split(hop, dim=1):
                add_hop(spectrum[..., first : first + k], past[..., first : first + k], rows, self.namm)

    # ------------------------------------------------------------------------------------------------------ decisions

    def scores(self, layer: MemoryLayer) -> Tensor:
        rows = list(range(len(layer.keys)))
        seen = self.piece.seen if self.piece is not None else self.seen
        return self._scores(layer, rows, [seen[row] for row in rows])

    def _scores(self, layer: MemoryLayer, rows: list[int], seen: list[int]) -> Tensor:
        """The network's scores of the slots of these rows, [rows, G, K]."""
        spectrum, positions = layer.held_numbers("spectrum"), layer.held_positions()
        parameters = self.parameters.to(spectrum.device)
        if len(rows) < len(spectrum):
            spectrum, positions = spectrum[rows], positions[rows]
            parameters = parameters[rows] if parameters.dim() == 2 else parameters
        newest = torch.tensor(seen, device=positions.device)[:, None, None] - 1
        empty_G = (positions == EMPTY).sum(dim=-1).amin(dim=0).tolist()
        scores = torch.zeros(positions.shape, device=positions.device)
        for g, first in enumerate(empty_G):  # one head at a time, since the work grows with the square of its slots
            head = slice(g, g + 1)
            x_B1KF = features(spectrum[:, head, :, first:].double(), newest - positions[:, head, first:], self.namm)
            scores[:, head, first:] = token_scores(x_B1KF, parameters.double(), self.namm.hidden).float()
        return scores

    def _evict(self, layer: MemoryLayer, piece: Piece) -> None:
        rows = self._deciding(piece.seen)
        positions = layer.held_positions()
        scores = torch.full(positions.shape, float("inf"), device=positions.device)
        decided = self._scores(layer, rows, [piece.seen[row] for row in rows])
        self.check_finite(decided)
        scores[rows] = decided
        scores = force(scores, positions, self.sinks, self.windows(), piece.seen)
        keep = scores >= 0
        if self.ragged == "fill":
            layer.keep(*best(scores, keep.sum(dim=-1).amax(dim=-1).tolist()))
        elif not torch.equal(keep, positions != EMPTY):
            layer.keep(*kept(keep))

    def _compress(self, layer: MemoryLayer, seen: list[int]) -> None:
        """Nothing happens at the end of a prompt."""
