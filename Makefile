# The words of this project; CI calls these and nothing else. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
# A machine with a GPU shows the three models on it; any other shows three tiny ones on the CPU.
FLEET ?= $(if $(shell nvidia-smi -L 2>/dev/null),artifacts/one-gpu-opt,artifacts/tiny-opt-cpu)
# The paper's, on a modelled profile.
PAPER_FLEET ?= artifacts/titan-rtx-opt
# Local evaluation files, if there are any; otherwise lm-eval takes them from the hub.
DATA_DIR ?= $(wildcard ../shared/data/eval)
# The Azure trace, if it is here, for `fidelity`.
AZURE ?= $(wildcard ../shared/data/traces/AzureLLMInferenceTrace_code.csv)
BIN := .venv/bin
SETUP := .venv/.made
BENCH := .venv/.made-bench
# What is locked stays as it is; machines with a GPU have another torch than the locked one.
LOCKED = $(if $(shell nvidia-smi -L 2>/dev/null),,--constraints requirements.lock)

.PHONY: help setup demo paper paper-train fidelity profile-gpu test lint bench-simulator bench-decision bench-router bench-training ablations soak overload format lock clean

help: ## List the words.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(SETUP) ## Install everything into .venv; nothing happens if it is up to date.

$(SETUP): pyproject.toml requirements.lock packaging/setup.sh packaging/cpu-excludes.txt packaging/vllm-metadata/pyproject.toml
	@PYTHON=$(PYTHON) bash packaging/setup.sh
	@touch $@

demo: $(SETUP) ## Profile, score, train, serve and replay a fleet, and compare policies on it.
	@$(BIN)/besteffort demo $(FLEET) $(if $(DATA_DIR),--data-dir $(DATA_DIR))

paper: $(SETUP) ## Run all experiments of the paper in the simulator, and set its numbers beside ours.
	@$(BIN)/besteffort paper $(PAPER_FLEET) --docs docs

paper-train: $(SETUP) ## Train the policies of these experiments anew.
	@$(BIN)/besteffort paper $(PAPER_FLEET) --train

fidelity: $(SETUP) ## Hold the simulator against real vLLM on the tiny fleet: docs/fidelity.md; 90 minutes.
	@$(BIN)/besteffort fidelity artifacts/tiny-opt-cpu --docs docs/fidelity.md $(if $(AZURE),--azure $(AZURE))

profile-gpu: $(SETUP) ## Measure the paper's three models together on the NVIDIA GPU that is here.
	@$(BIN)/besteffort profile artifacts/one-gpu-opt --on-this-gpu --budget 15m --suggest-deadline

test: $(SETUP) ## Run all tests, those on real vLLM servers included.
	@echo "Testing besteffort: the library first, then the stages on real vLLM servers (19 minutes on two cores)"
	@$(BIN)/pytest
	@echo "All passed. Type 'make demo' to see the pipeline run, or see README.md."

lint: $(SETUP) ## Check style, types and import floors.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench-simulator: $(SETUP) ## Time the simulator: routing decisions per second by fleet size.
	@$(BIN)/python -m tests.benchmarks.simulator

bench-decision: $(SETUP) ## Time the router's decisions: by policy and fleet size.
	@$(BIN)/python -m tests.benchmarks.decision

bench-training: $(BENCH) ## Time the paper's recipe beside Stable-Baselines3's DQN, and what both reach.
	@$(BIN)/python -m tests.benchmarks.training $(if $(ITERATIONS),--iterations $(ITERATIONS))

$(BENCH): $(SETUP)
	@echo "Installing Stable-Baselines3"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(LOCKED) -r pyproject.toml --extra bench
	@touch $@

ablations: $(SETUP) ## Train without each part of the default recipe, three seeds each, and compare (40 minutes).
	@$(BIN)/python -m tests.benchmarks.ablations

bench-router: $(SETUP) ## Measure the router beside others, on mock engines: throughput, latency, CPU.
	@$(BIN)/python -m tests.benchmarks.router

soak: $(SETUP) ## Send an hour's requests through the router, faults and all: counts, losses, memory.
	@$(BIN)/python -m tests.benchmarks.soak

overload: $(SETUP) ## Offer the router five times what it can carry for a minute.
	@$(BIN)/python -m tests.benchmarks.overload

format: $(SETUP) ## Put the code into shape.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(SETUP) $(BENCH) ## Write down the versions that are installed and were tested.
	@{ echo "# The versions tested on machines without a GPU (Python 3.11); 'make lock' writes this file."; \
	   $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -vE '^(vllm|uv|pip|setuptools) ?[@=]'; } \
	   > requirements.lock

clean: ## Remove what the stages made; .venv stays.
	@git clean -qfdX artifacts traces
