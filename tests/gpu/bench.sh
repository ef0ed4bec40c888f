#!/usr/bin/env bash
# The speed of the 95M job on one GPU, in one call of under 9 minutes.
#
# NOT YET RUN ON A GPU: only tried on a CPU, with small numbers. Expect to mend it at the first real run.
#
#   tests/gpu/bench.sh [OUT]
#
# In this order: `train bench` (BitNet, the same without deterministic mode, the twin, the textbook in bf16 and fp32, in
# turns); the same in the micro-batch that a card of 8 GB takes, whose memory is printed; the tests marked gpu.
# The objects of --json go to OUT (also an environment variable).
# It needs torch (2.11 is what it was written for), pyarrow, sentencepiece, safetensors, click, numpy and pytest with
# hypothesis, but neither datasets nor zstandard, and no data.
#
# Smaller, on a CPU:  PYTHON=.venv/bin/python PRESET=tiny ROUNDS=1 TESTS=tests/train/test_bench.py \
#                     ARGS='--set model.vocab_size=500 --set batch.sequences=4' tests/gpu/bench.sh OUT
set -uo pipefail

fail() { echo "error: $*" >&2; exit 2; }
out=${1:-${OUT:-}}
[[ -n $out ]] || fail "say where the numbers go: tests/gpu/bench.sh OUT"
mkdir -p "$out" && out=$(realpath "$out")
PYTHON=$(command -v "${PYTHON:-python3}") && PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") || fail "no such PYTHON"
PRESET=${PRESET:-95m} ROUNDS=${ROUNDS:-20} ARGS=${ARGS:-} TESTS=${TESTS:-tests/train}
MOST=510 # seconds for everything
cd "$(dirname "$0")/../.." || exit 1
bad=0
part() { echo; echo "== $* (after $SECONDS s)"; }
check() { "$@" || { bad=1; echo "FAILED: $*" >&2; return 1; }; }
within() { timeout --foreground $((MOST > SECONDS ? MOST - SECONDS : 1)) "$@"; }
# shellcheck disable=SC2086
bench() { within "$PYTHON" -m train bench --preset "$PRESET" $ARGS "$@"; }
show() { "$PYTHON" -c 'import json, sys; from train.bench import table; print(*table(json.load(open(sys.argv[1]))), sep="\n")' "$1"; }

part "what this is"
"$PYTHON" -c 'import torch; print("torch", torch.__version__, *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))' || exit 1
nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader 2>/dev/null || echo "no GPU here"

part "the speed, as a run would choose it"
check bench --rounds "$ROUNDS" --json > "$out/bench.json" && show "$out/bench.json"

part "the speed in the micro-batch that the plan gives a card of 8 GB"
micro=$("$PYTHON" -m train plan --preset 95m --json | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["fits"]["8"])')
[[ $PRESET == 95m ]] || micro=2
check bench --rounds 3 --set "batch.micro=$micro" --json > "$out/bench-8gb.json" && show "$out/bench-8gb.json"

part "tests marked gpu"
# shellcheck disable=SC2086
check within "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider $TESTS

part "done: $([[ $bad -eq 0 ]] && echo all well || echo SOMETHING FAILED, see above); the numbers are in $out"
exit $bad
