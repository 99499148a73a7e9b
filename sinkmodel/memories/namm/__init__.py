"""Neural attention memory models (NAMM, arXiv 2410.13166): an evolved network decides what a cache evicts.

    memory = NAMM.from_pretrained("org/namm", model)          # an evolved artefact: a folder, or a name on the Hub
    model.generate(ids, past_key_values=memory)

    config = measure_statistics(model, prompts, NAMMConfig(interval=128))      # before an evolution, with a host model
    start = NAMM(model, config)                                                # parameters of zeros keep everything
    model(ids[:, :127], past_key_values=start)                                 # once for all candidates
    memory = start.for_candidates(candidates)                                  # [candidates, config.parameters]
    model(ids[:, 127:].repeat_interleave(len(candidates), 0), past_key_values=memory)

`spectrogram` turns the attention to a token into features, `network` computes scores from these, `memory` evicts, and
`config` reads and writes the artefact.
"""

from sinkmodel.memories.namm.config import NAMMConfig, read_artefact, write_artefact
from sinkmodel.memories.namm.memory import NAMM
from sinkmodel.memories.namm.network import PARAMETERS, flatten, layout, split
from sinkmodel.memories.namm.statistics import measure_statistics

__all__ = [
    "NAMM",
    "PARAMETERS",
    "NAMMConfig",
    "flatten",
    "layout",
    "measure_statistics",
    "read_artefact",
    "split",
    "write_artefact",
]
