"""Write a Hub repository with which `generate` streams any model: `custom_generate/generate.py` and a card.

It must be a repository of its own. Inside a model's repository, transformers 4.57 takes the file for that model's way
to generate. From a local folder it runs the code unasked. From the Hub it refuses the model to everyone who does
not trust its code.
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

# Endless text, for any model with rotary positions

Attention sinks and a window of recent keys ([StreamingLLM](https://arxiv.org/abs/2309.17453)), constant cost per token:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
prompt = tokenizer("In the beginning", return_tensors="pt")
ids = model.generate(
    **prompt, custom_generate=THIS_REPOSITORY, trust_remote_code=True, budget=1024, sinks=1, max_new_tokens=5000
)
```

`budget` is the number of keys that each token sees, its own included; `sinks` of them are the first tokens of the text.
A model that was pre-trained with sink tokens needs just these, and its config states their number. Other models need up
to 4. The result equals that of feeding the text token by token, also for long prompts and left-padded batches. Greedy
search and sampling are supported, beams are not. Models whose keys cannot be turned exactly are refused.

The only file is `custom_generate/generate.py`. It needs only torch and transformers (4.57 or 5).
"""


def export_streaming_code(output: Path) -> Path:
    """Write the folder `output` atomically. Raises UserError if it is occupied."""
    with atomic_folder(output) as folder:
        (folder / "custom_generate").mkdir()
        shutil.copyfile(CODE, folder / "custom_generate" / "generate.py")
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    return output
