# Everything a user does is a target here; CI calls nothing else.  make help lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

SOURCE ?=
TOKENIZER ?=
DATA ?= data/fineweb-edu
WORKERS ?=

# PYTHON= names an environment that already has what is needed; otherwise .venv is made from requirements.lock.
ifdef PYTHON
PY := $(PYTHON)
CORE :=
TEST :=
else
PY := .venv/bin/python
CORE := .venv/.core
TEST := .venv/.test
endif
BASE_PYTHON ?= python3
# The packages of pyproject.toml ("" is the core, other words are extras), at the versions of the lock.
NEEDS = import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *(r for e in sys.argv[1:] for r in p["optional-dependencies"][e]), sep="\n")

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

.venv/.core: pyproject.toml requirements.lock
	$(BASE_PYTHON) -m venv .venv
	$(PY) -c '$(NEEDS)' > .venv/needs.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -r .venv/needs.txt
	touch $@

.venv/.test: .venv/.core
	$(PY) -c '$(NEEDS)' test > .venv/needs.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -r .venv/needs.txt
	touch $@

.PHONY: tokenize
tokenize: $(CORE) ## build DATA from SOURCE with TOKENIZER (WORKERS processes); again after an interruption
	exec $(PY) -m prep tokenize $(if $(SOURCE),--source '$(SOURCE)') $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)') \
		$(if $(WORKERS),--workers $(WORKERS)) --out '$(DATA)' $(ARGS)

.PHONY: verify
verify: $(CORE) ## re-hash and check every file of DATA
	exec $(PY) -m prep verify '$(DATA)' $(ARGS)

.PHONY: test
test: $(TEST) ## all tests (no network, no GPU, nothing outside this folder needed)
	exec $(PY) -m pytest $(ARGS)

.PHONY: lint
lint: $(TEST) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.PHONY: bench
bench: $(TEST) ## measure against what one would use instead; on ../shared/corpus where it is present
	exec $(PY) -m tests.bench $(ARGS)

.PHONY: clean
clean: ## remove caches and .venv; never data/ or runs/
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find prep shared train tests -name __pycache__ -type d -prune -exec rm -rf {} +
