# Everything a user does is a target here; CI calls nothing else.  make help lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

SOURCE ?=
TOKENIZER ?=
DATA ?= data/fineweb-edu
RUN ?= runs/95m
PRESET ?= 95m
STEPS ?=
GPUS ?= 1
WORKERS ?=
EXECUTOR ?=
ARGS ?=
PROMPT ?= The sun
FORMAT ?= hf
VARIANT ?=
EXPORT ?= $(RUN)$(if $(filter gguf,$(FORMAT)),.gguf,-$(or $(VARIANT),hf))
TASKS ?= plain_facts,last_word

# PYTHON= names an environment that already has what is needed; otherwise .venv is made from requirements.lock.
ifdef PYTHON
PY := $(PYTHON)
CORE :=
CLUSTER :=
TEST :=
BENCH :=
LLAMA :=
LM_EVAL :=
EXTRA :=
else
PY := .venv/bin/python
CORE := .venv/.core
CLUSTER := .venv/.cluster
TEST := .venv/.test
BENCH := .venv/.test .venv/.bench
LLAMA := .venv/.test .venv/.llama
LM_EVAL := .venv/.hf .venv/.lm-eval
EXTRA = .venv/.$(FORMAT)
endif
BASE_PYTHON ?= python3
# The packages of pyproject.toml: the core, and the extras named; at the versions of the lock.
NEEDS = import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *(r for e in sys.argv[1:] for r in p["optional-dependencies"][e]), sep="\n")

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

.venv/.core: pyproject.toml requirements.lock
	$(BASE_PYTHON) -m venv .venv
	$(PY) -c '$(NEEDS)' report > .venv/needs.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -r .venv/needs.txt
	touch $@

# An extra of pyproject.toml. llama compiles llama.cpp: needs cmake, a C++ compiler and some 10 minutes on two cores.
.venv/.%: .venv/.core
	$(PY) -c '$(NEEDS)' $* > .venv/needs.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c requirements.lock -r .venv/needs.txt
	touch $@

FROM = $(if $(SOURCE),--source '$(SOURCE)') $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)')

.PHONY: plan
plan: $(CORE) ## tell what make tokenize with the same variables would read, download, write and take
	exec $(PY) -m prep plan $(FROM) $(if $(WORKERS),--workers $(WORKERS)) --out '$(DATA)' $(ARGS)

.PHONY: tokenize
tokenize: $(CORE) $(if $(EXECUTOR),$(CLUSTER))
tokenize: ## build DATA from SOURCE with TOKENIZER (WORKERS processes, or EXECUTOR=dask://HOST:8786); again after an interruption
	exec $(PY) -m prep tokenize $(FROM) $(if $(WORKERS),--workers $(WORKERS)) $(if $(EXECUTOR),--executor $(EXECUTOR)) \
		--out '$(DATA)' $(ARGS)

.PHONY: verify
verify: $(CORE) ## re-hash and check every file of DATA
	exec $(PY) -m prep verify '$(DATA)' $(ARGS)

.PHONY: repair
repair: $(CORE) ## make what verify finds bad in DATA anew, each file as its manifest states it
	exec $(PY) -m prep repair '$(DATA)' $(if $(SOURCE),--source '$(SOURCE)') $(ARGS)

# torchrun takes --run for its own, so our arguments stand behind "--".
TRAIN = $(if $(filter-out 1,$(GPUS)),$(PY) -m torch.distributed.run --standalone --nproc-per-node $(GPUS) -m -- train,$(PY) -m train)

.PHONY: train
train: $(CORE) ## train PRESET on DATA as RUN (STEPS to stop earlier, GPUS processes); again to go on
	exec $(TRAIN) run --preset $(PRESET) --data '$(DATA)' --run '$(RUN)' $(if $(STEPS),--steps $(STEPS)) $(ARGS)

# The pilot takes the full data set. Where DATA is not built it rehearses on a small one, made first: such a run shows
# that all works and what it costs, and cannot go on with the full set, since a run has one data set.
PILOT_SIZE ?= --train-sequences 32000 --val-sequences 512
FULL := $(shell test -e '$(DATA)/manifest.json' && echo yes)
PILOT_DATA = $(if $(FULL),$(DATA),data/pilot)
PILOT_SAYS = echo 'pilot on $(PILOT_DATA)$(if $(FULL),; make train RUN=$(RUN) goes on with it,: a rehearsal$(,) for $(DATA) is not built)'
, := ,

.PHONY: rehearsal
rehearsal: $(CORE)
	exec $(PY) -m prep tokenize $(if $(SOURCE),--source '$(SOURCE)') $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)') \
		$(if $(WORKERS),--workers $(WORKERS)) --out data/pilot $(PILOT_SIZE)

.PHONY: pilot
pilot: RUN := $(if $(filter file,$(origin RUN)),runs/pilot,$(RUN))
pilot: STEPS := $(or $(STEPS),1000)
pilot: $(CORE) $(if $(FULL),,$(if $(SOURCE)$(TOKENIZER),rehearsal,$(if $(wildcard data/pilot/manifest.json),,rehearsal)))
pilot: ## the first STEPS (1000) on DATA, or a rehearsal where that is not built; evaluation, samples, summary
	@$(PILOT_SAYS)
	exec $(TRAIN) run --preset $(PRESET) --data '$(PILOT_DATA)' --run '$(RUN)' --steps $(STEPS) $(ARGS)
	exec $(PY) -m train eval '$(RUN)' --sequences 256
	exec $(PY) -m train sample '$(RUN)' --prompt '$(PROMPT)' --seed 0
	exec $(PY) -m train summary '$(RUN)'
	@$(PILOT_SAYS)

.PHONY: eval
eval: $(CORE) ## loss of RUN on the whole validation split
	exec $(PY) -m train eval '$(RUN)' $(ARGS)

.PHONY: sample
sample: $(CORE) ## let RUN go on with PROMPT
	exec $(PY) -m train sample '$(RUN)' --prompt '$(PROMPT)' $(ARGS)

.PHONY: report
report: $(CORE) ## write RUN/report.html, also of a run in progress: curves, ternary health, anomalies, samples
	exec $(PY) -m train report '$(RUN)' $(ARGS)

# DATA only where it is given: by default the data set is that of RUN's last start.
.PHONY: twin
twin: $(CORE) ## train RUN's full-precision twin as far as RUN has come, and compare the two
	exec $(TRAIN) twin '$(RUN)' $(if $(filter file,$(origin DATA)),,--data '$(DATA)')
	exec $(PY) -m train compare '$(RUN)' '$(RUN)-twin' $(ARGS)

.PHONY: export
export: $(CORE) $(EXTRA) ## write RUN as EXPORT for Transformers (FORMAT=hf) or llama.cpp (FORMAT=gguf); VARIANT as for the command
	exec $(PY) -m train export '$(RUN)' --format '$(FORMAT)' $(if $(VARIANT),--variant '$(VARIANT)') --out '$(EXPORT)' $(ARGS)

# TASKS of train/export/tasks need no network; hellaswag, arc_easy, piqa, lambada_openai and others fetch their data.
.PHONY: eval-tasks
eval-tasks: $(CORE) $(LM_EVAL) ## ask lm-evaluation-harness how RUN's export EXPORT does on TASKS; makes the export if need be
	test -e '$(EXPORT)' || $(PY) -m train export '$(RUN)' --format hf $(if $(VARIANT),--variant '$(VARIANT)') --out '$(EXPORT)'
	exec env TORCHDYNAMO_DISABLE=1 $(PY) -m lm_eval --model hf --model_args 'pretrained=$(EXPORT),dtype=float32' \
		--include_path train/export/tasks --tasks '$(TASKS)' --batch_size 16 $(ARGS)

# Everything once, small and offline: a corpus from this Python's own documentation, the tiny preset.
.PHONY: demo
demo: $(CORE) ## everything once: corpus, tokenize, verify, train the tiny preset, evaluate, sample (5 minutes)
	$(PY) -m prep sample-corpus --out data/demo-source
	$(PY) -m prep tokenize --source data/demo-source --tokenizer data/demo-source/tokenizer.model --out data/demo \
		--train-sequences 2400 --val-sequences 64 --seq-len 256
	$(PY) -m prep verify data/demo
	$(PY) -m train run --preset tiny --data data/demo --run runs/demo
	$(PY) -m train eval runs/demo
	$(PY) -m train sample runs/demo --prompt 'Return the number of' --tokens 60 --seed 0

.PHONY: test
test: $(TEST) ## all tests (no network, no GPU, nothing outside this folder needed)
	exec $(PY) -m pytest -n auto $(ARGS)

.PHONY: test-gguf
test-gguf: $(LLAMA) ## the tests that ask llama.cpp, which is compiled first (10 minutes)
	exec $(PY) -m pytest -n auto tests/train/export/test_gguf_llama.py $(ARGS)

.PHONY: test-eval-tasks
test-eval-tasks: $(TEST) $(LM_EVAL) ## the tests that ask lm-evaluation-harness
	exec $(PY) -m pytest tests/train/export/test_eval_tasks.py $(ARGS)

.PHONY: lint
lint: $(TEST) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.PHONY: bench
bench: $(BENCH) ## measure against what one would use instead (ARGS=profile: where the time goes); on ../shared/corpus if present
	exec $(PY) -m tests.bench $(ARGS)
	exec $(PY) -m train bench --preset $(PRESET)

.PHONY: clean
clean: ## remove caches and .venv; never data/ or runs/
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find prep shared train tests -name __pycache__ -type d -prune -exec rm -rf {} +
