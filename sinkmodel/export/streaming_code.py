"""The folder of a Hub repository with which `generate` streams any model: `custom_generate/generate.py` and a card.

A repository of its own. In a model's, transformers 4.57 takes the file for the way in which that model generates: it
runs it unasked where the model is a local folder, and from the Hub it refuses the model to all who do not trust code.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sinkmodel.files import atomic_folder

CODE = Path(__file__).with_name("custom_generate.py")
CARD = """---
library_name: transformers
license: apache-2.0
tags:
- custom_generate
---

# Text without end, for any model with rotary positions

Attention sinks and a window of recent keys ([StreamingLLM](https://arxiv.org/abs/2309.17453)), constant cost a token:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
prompt = tokenizer("In the beginning", return_tensors="pt")
ids = model.generate(
    **prompt, custom_generate=THIS_REPOSITORY, trust_remote_code=True, budget=1024, sinks=1, max_new_tokens=5000
)
```

`budget` is the number of keys that each token sees, its own counted; `sinks` of them are the first tokens of the text.
A model that was pre-trained with a sink token needs that one and says so in its config; others want up to 4. The result
is that of feeding the text token by token, for long prompts and left-padded batches too. Greedy search and sampling;
no beams. Models whose keys cannot be turned exactly are refused.

One file, `custom_generate/generate.py`, which needs nothing but torch and transformers (4.57 or 5).
"""


def export_streaming_code(output: Path) -> Path:
    """Write the folder `output`, which is there whole or not at all; UserError where it is occupied."""
    with atomic_folder(output) as folder:
        (folder / "custom_generate").mkdir()
        shutil.copyfile(CODE, folder / "custom_generate" / "generate.py")
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    return output
