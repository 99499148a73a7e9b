"""What we use of other packages that they do not promise to keep, in one place: private names, and undocumented ones.

An upgrade can take any of it away, or give it another meaning. `tests/test_private_parts.py` checks that each part is
still there, and that the code uses no other private name. `docs/private_parts.md` is this table as a page, made with

    python -m tests.private_parts > docs/private_parts.md

To upgrade a package, read what its parts do in the new version, then change its version in `READ_IN`. The table is in
`libraries` (torch, transformers), `training` (what trains) and `tools` (the rest).
"""

from __future__ import annotations

from tests.private_parts.libraries import TORCH, TRANSFORMERS
from tests.private_parts.tools import TOOLS
from tests.private_parts.training import TRAINING

# The version of each package whose source was read for this table; "python" is the standard library.
READ_IN = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "lightning": "2.6.6",
    "deepspeed": "0.19.8",
    "wandb": "0.31.0",
    "datasets": "5.2.0",
    "huggingface_hub": "2.4.0",
    "gguf": "0.19.0",
    "cmaes": "0.13.1",
    "lm_eval": "0.4.13",
    "python": "3.11",
}


PRIVATE_PARTS = [*TORCH, *TRANSFORMERS, *TRAINING, *TOOLS]
