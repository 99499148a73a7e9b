"""Stand-ins for `sinkmodel.memories`: a cache that keeps all, one that drops the middle, and memories of tokens.

The last two belong together: a `Scripted` model reads a memory of tokens as text and answers needles perfectly, as long
as the needle is whole in what the memory kept.
"""

from __future__ import annotations

import copy
import re
import types

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel, encode

FRONT = 2  # first keys that the forgetful memory keeps


class Everything(DynamicCache):
    """A memory that forgets nothing."""

    def __init__(self, budget: int | None = None):
        super().__init__()
        self.budget, self.ended, self.reads = budget, False, []

    def reset(self):
        self.layers, self.ended, self.expected = [], False, None
        DynamicCache.__init__(self)

    def expect(self, columns: int):
        assert not self.ended
        self.expected = columns

    def end_prompt(self):
        assert not self.ended, "a prompt ends once"
        assert self.get_seq_length() == self.expected
        self.ended = True
        self.reads.append(self.expected)
        self.compress()

    def compress(self):
        pass

    def fork(self):
        assert self.ended
        other = copy.copy(self)
        other.layers = copy.deepcopy(self.layers)
        return other

    @property
    def bytes_held(self):
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.keys, layer.values))

    bytes_kept = bytes_held


class Forgetful(Everything):
    """Keeps the first two keys and the latest of the prompt."""

    def compress(self):
        drop = self.expected - self.budget
        for layer in self.layers if drop > 0 else ():
            layer.keys, layer.values = (
                torch.cat([x[:, :, :FRONT], x[:, :, FRONT + drop :]], dim=2) for x in (layer.keys, layer.values)
            )


MEMORIES = {"dense": Everything, "snapkv": Forgetful, "tova": Forgetful}


def make_memory(name, model, budget=None, positions="text"):
    if name != "dense" and budget <= FRONT:
        raise UserError(f"budget is {budget}; make {name} at least {FRONT + 1}")
    return MEMORIES[name](budget)


def module() -> types.ModuleType:
    """A module that takes the place of `sinkmodel.memories` in `sys.modules`."""
    found = types.ModuleType("sinkmodel.memories")
    found.MEMORIES, found.make_memory = MEMORIES, make_memory
    found.BUDGETED = [name for name in MEMORIES if name != "dense"]
    return found


# ---------------------------------------------------------------------------------- a model with a memory of tokens


class TokenMemory:
    """The tokens that it read; of a prompt the latest `budget`. `prompts` has what was read when each prompt ended."""

    def __init__(self, budget: int = 10**9):
        self.budget, self.ids, self.ended, self.prompts = budget, [], False, []

    def reset(self):
        self.ids, self.ended = [], False

    def expect(self, columns):
        self.expected = columns

    def end_prompt(self):
        assert len(self.ids) == self.expected
        assert not self.ended
        self.ended = True
        self.prompts.append(list(self.ids))
        self.ids = self.ids[-self.budget :]

    def fork(self):
        other = copy.copy(self)
        other.ids = list(self.ids)
        return other

    @property
    def bytes_held(self):
        return 2 * len(self.ids)

    @property
    def bytes_kept(self):
        return len(self.ids)


class Scripted:
    """Answers what RULER asks of needles from the text in the memory, with a full stop after it; else it gives `?`."""

    def __init__(self, loaded: LoadedModel):
        self.loaded, self.real = loaded, loaded.model

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        memory = past_key_values or TokenMemory()
        logits = []
        for token in input_ids[0].tolist():
            memory.ids.append(token)
            logits.append(9.0 * F.one_hot(torch.tensor(self.next_token(memory.ids)), self.rows).float())
        return types.SimpleNamespace(logits=torch.stack(logits)[None, -logits_to_keep:])

    @property
    def rows(self):
        return self.real.get_input_embeddings().num_embeddings

    def next_token(self, ids):
        text = self.loaded.tokenizer.decode(ids)
        question = re.search(r"The special magic (\w+?)s? for (\S+) mentioned in the provided text is( [\w-]*)?$", text)
        needle = question and re.search(rf"One of the special magic {question[1]}s for {question[2]} is: (\S+)\.", text)
        answer = encode(self.loaded, f" {needle[1]}. " if needle else " ?")
        given = question[3] or "" if question else ""
        for count in range(len(answer)):
            if self.loaded.tokenizer.decode(answer[:count]) == given:
                return answer[count]
        return answer[0]
