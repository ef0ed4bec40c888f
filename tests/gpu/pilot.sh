#!/usr/bin/env bash
# The pilot of the 95M job on one GPU, in one call of under 9 minutes.
#
# NOT YET RUN ON A GPU: only tried on a CPU, with small numbers. Expect to mend it at the first real run.
#
#   tests/gpu/pilot.sh CORPUS [OUT]
#
# CORPUS is a folder of .parquet files and a tokenizer.model, together 33 million tokens or more. In a copy of this tree:
# the tests marked gpu; the rehearsal set; the first 50 steps twice, and once more with a stop and a resume in between,
# whose checkpoints must have the same bytes; then `make pilot`. Deterministic mode is on, as in every run.
# The figures (tokens/s, MFU, memory, losses) are printed; the loss curve (metrics.jsonl), config.json, samples.jsonl and
# the figures go to OUT (also an environment variable). It needs torch, pyarrow, sentencepiece, safetensors, click, numpy
# and pytest with hypothesis, but neither datasets nor zstandard.
#
# Smaller, on a CPU:  PYTHON=.venv/bin/python PRESET=tiny STEPS=4 COMPARED=2 ARGS='--set batch.sequences=2' \
#                     PILOT_SIZE='--train-sequences 64 --val-sequences 256 --seq-len 32' tests/gpu/pilot.sh CORPUS OUT
set -uo pipefail

fail() { echo "error: $*" >&2; exit 2; }
[[ $# -ge 1 && -d $1 ]] || fail "name the folder of the corpus: tests/gpu/pilot.sh CORPUS [OUT]"
corpus=$(realpath "$1")
TOKENIZER=${TOKENIZER:-$corpus/tokenizer.model}
[[ -f $TOKENIZER ]] || fail "$TOKENIZER is not there: put the tokenizer beside the corpus, or give TOKENIZER="
TOKENIZER=$(realpath "$TOKENIZER")
out=${2:-${OUT:-}}
[[ -n $out ]] || fail "say where the loss curve goes: tests/gpu/pilot.sh CORPUS OUT"
mkdir -p "$out" && out=$(realpath "$out")
PYTHON=$(command -v "${PYTHON:-python3}") && PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") || fail "no such PYTHON"
PRESET=${PRESET:-95m} STEPS=${STEPS:-1000} COMPARED=${COMPARED:-50} ARGS=${ARGS:-}
SIZE=${PILOT_SIZE:---train-sequences 32000 --val-sequences 512}
MOST=510 # seconds for the training; what takes longer is stopped by a signal, and what it has reached is shown

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$(dirname "$0")/../.." && cp -R prep shared train tests Makefile pyproject.toml "$work" && cd "$work" || exit 1
bad=0
part() { echo; echo "== $* (after $SECONDS s)"; }
check() { "$@" || { bad=1; echo "FAILED: $*" >&2; return 1; }; }
# --foreground: the signal goes to the command alone; a second one, by way of make, would end the run without a save.
within() { timeout --foreground $((MOST > SECONDS ? MOST - SECONDS : 1)) "$@"; }
train() { # RUN STEPS
	# shellcheck disable=SC2086
	within "$PYTHON" -m train run --preset "$PRESET" --data data/pilot --run "runs/$1" --steps "$2" $ARGS
}

part "what this is"
"$PYTHON" -c 'import torch; print("torch", torch.__version__, *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))' || exit 1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU here"

part "tests marked gpu"
check "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/train

part "the rehearsal set"
make --no-print-directory rehearsal PYTHON="$PYTHON" SOURCE="$corpus/*.parquet" TOKENIZER="$TOKENIZER" PILOT_SIZE="$SIZE" || exit 1

part "the first $COMPARED steps twice, and stopped in the middle"
check train once "$COMPARED"
check train twice "$COMPARED"
check train stopped $((COMPARED / 2))
check train stopped "$COMPARED"
last=$(printf 'checkpoints/step-%08d' "$COMPARED")
for other in twice stopped; do
	check diff -rq "runs/once/$last" "runs/$other/$last" && echo "once and $other: the same bytes"
done
sha256sum runs/*/"$last"/model.safetensors
rm -rf runs/once runs/twice runs/stopped

part "make pilot"
check within make --no-print-directory pilot PYTHON="$PYTHON" PRESET="$PRESET" STEPS="$STEPS" ARGS="$ARGS"

part "figures"
"$PYTHON" -m train summary runs/pilot | tee "$out/summary.txt" || bad=1
"$PYTHON" -c 'import json; print("runtime   ", json.load(open("runs/pilot/config.json"))["runtime"])' | tee -a "$out/summary.txt"
speed=$(sed -n 's/^speed *\([0-9,]*\) tokens.*/\1/p' "$out/summary.txt" | tr -d ,)
"$PYTHON" -m train plan --preset "$PRESET" --set model.vocab_size=32000 --speed "${speed:-1}" | tee "$out/plan.txt" || bad=1
cp runs/pilot/{metrics.jsonl,config.json,run.json,samples.jsonl} "$out" || bad=1
part "done: $([[ $bad -eq 0 ]] && echo all well || echo SOMETHING FAILED, see above); the loss curve is $out/metrics.jsonl"
exit $bad
