"""KV memories: caches that read a whole prompt and keep its important tokens.

| name | class | keeps |
|---|---|---|
| `dense` | `Dense` | everything |
| `snapkv` | `SnapKV` | tokens to which the last queries of the prompt attend |
| `h2o` | `H2O` | tokens with the most attention so far, and the recent tokens |
| `tova` | `TOVA` | tokens to which the latest query attends most |
| `expected-attention` | `ExpectedAttention` | tokens to which future queries are expected to attend |
| `gemfilter` | `GemFilter` | tokens that an early layer chooses; the whole model then reads these again |
| `namm` | `NAMM` | tokens that an evolved network wants to keep; it needs an `artefact` and has no budget |
| | `Scored` | tokens that a user's own scorer chooses |
"""

from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.memories.dense import Dense
from sinkmodel.memories.expected_attention import ExpectedAttention
from sinkmodel.memories.gemfilter import GemFilter
from sinkmodel.memories.h2o import H2O
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.namm import NAMM
from sinkmodel.memories.scored import Scored
from sinkmodel.memories.snapkv import SnapKV
from sinkmodel.memories.tova import TOVA

MEMORIES: dict[str, type[Memory]] = {
    "dense": Dense,
    "snapkv": SnapKV,
    "h2o": H2O,
    "tova": TOVA,
    "expected-attention": ExpectedAttention,
    "gemfilter": GemFilter,
    "namm": NAMM,
}
BUDGETED = [name for name, memory in MEMORIES.items() if memory.takes_budget]  # memories that need only a budget

__all__ = [
    "BUDGETED",
    "H2O",
    "MEMORIES",
    "NAMM",
    "TOVA",
    "Dense",
    "ExpectedAttention",
    "GemFilter",
    "Memory",
    "Scored",
    "SnapKV",
    "make_memory",
]


def make_memory(name: str, config: Any, budget: int | None = None, **settings: Any) -> Memory:
    """The memory of that name, for a model or its config.

    Args:
        name: a key of MEMORIES.
        config: the model, or its config.
        budget: slots per KV head; "dense" and "namm" take none.
        settings: other arguments of the memory's class. "namm" needs `artefact`, the folder or Hub name of an evolved
            network.

    Raises UserError for an unknown name, and for settings that do not fit.
    """
    if name not in MEMORIES:
        raise UserError(f"there is no memory {name!r}; choose one of {', '.join(MEMORIES)}")
    if name == "dense":
        return Dense(config, **settings)
    if name == "namm":
        if budget is not None:
            raise UserError("a NAMM itself decides how much it keeps; leave out the budget")
        if "artefact" not in settings:
            raise UserError("a NAMM needs an evolved network; give artefact, a folder or a name on the Hub")
        return NAMM.from_pretrained(settings.pop("artefact"), config, **settings)
    return MEMORIES[name](config, budget, **settings)
