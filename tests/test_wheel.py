"""Guards: the wheel is whole, works away from the checkout, and streams if there is only torch and transformers."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
STREAM = """
import sys; sys.path[:0] = [sys.argv[1]]
import json, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
before = set(sys.modules)
from sinkmodel import StreamingCache
imported = sorted(set(sys.modules) - before)
torch.manual_seed(0)
small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
model = AutoModelForCausalLM.from_config(LlamaConfig(**small)).eval()
cache = StreamingCache(model.config, budget=16, sinks=1)
ids = model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=50, do_sample=False)
logits = model(input_ids=ids[:, -1:], past_key_values=cache).logits
print(json.dumps([imported, StreamingCache.__module__, cache.seen, cache.layers[0].keys.shape[2], list(logits.shape)]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(place), str(ROOT)]
    subprocess.run(build, check=True, cwd=place)
    (path,) = place.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_rooms_and_the_configs_and_works_away_from_the_checkout(wheel, tmp_path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"recipes/pretrain.py", "eval/cli.py", "recipes/configs/models/tiny.yaml"} <= names
    assert {"sinkmodel/export/custom_generate.py", "eval/report/templates/page.html"} <= names
    assert {"eval/report/templates/page.css"} <= names
    assert (
        not {name.split("/")[0] for name in names}
        - {"sinkmodel", "recipes", "eval"}
        - {f"{wheel.name.split('-')[0]}-{wheel.name.split('-')[1]}.dist-info"}
    )
    away = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(away)
    program = (
        "import recipes, sys; assert recipes.__file__.startswith(sys.argv[1]), recipes.__file__;"
        "from recipes.config import find_config; print(find_config('pythia-160m'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(away)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(away), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(away / "recipes" / "configs" / "models" / "pythia-160m.yaml")


@pytest.fixture(scope="module")
def streamed(wheel, tmp_path_factory):
    """What ten lines with the wheel print if nothing else is installed, and which modules its import brought."""
    site = tmp_path_factory.mktemp("empty") / "site"
    link_distributions(site, needed("torch", "transformers"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    # -S: without the packages of this environment.
    command = [sys.executable, "-I", "-S", "-c", STREAM, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=site.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_stream_runs_where_there_is_only_torch_and_transformers(streamed):
    _, module, seen, slots, shape = streamed
    assert module == "sinkmodel.cache.cache"
    assert seen == [53]
    assert slots == 16
    assert shape == [1, 1, 64]


@pytest.mark.slow
def test_importing_the_cache_brings_little_beside_itself(streamed):
    """Guards the time that an import takes: the modelling code of transformers, seconds, waits for the first cache."""
    imported = streamed[0]
    assert "sinkmodel.cache.cache" in imported
    others = [name for name in imported if not name.startswith("sinkmodel")]
    assert not [name for name in others if name.startswith(("transformers.model", "transformers.gen", "torch._dynamo"))]
    assert len(others) < 20, others


def needed(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """These distributions and all that they ask for, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        wanted = [Requirement(line) for line in found[name].requires or []]
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def link_distributions(site: Path, distributions: dict[str, importlib.metadata.Distribution]) -> None:
    """A folder of packages that has these distributions alone."""
    site.mkdir()
    assert not {"lightning", "accelerate", "datasets"} & set(distributions)
    for distribution in distributions.values():
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
