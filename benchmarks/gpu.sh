#!/usr/bin/env bash
# Tests the kernels and times everything on this machine's GPU: one call, no network, under ten minutes.
#
#   benchmarks/gpu.sh                  the parts in order, as far as the time goes
#   benchmarks/gpu.sh tests            the kernel tests, compiled for the GPU instead of interpreted
#   benchmarks/gpu.sh attention        bench_dot_product_attention.py, on a GPU in bfloat16
#   benchmarks/gpu.sh float32          the same in float32
#   benchmarks/gpu.sh others           every other benchmark
#   benchmarks/gpu.sh attention -k table      what follows a part goes to pytest
#
# Results go to $OUT, else to report/gpu: of each part PART.log and PART.tar.gz, which holds the JSON files.
# LAMINA_QUICK=1 has fewer rounds, and is a dry run where there is no GPU. PYTHON names another interpreter,
# SECONDS_A_CALL another limit.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
OUT=${OUT:-$ROOT/report/gpu}
LIMIT=${SECONDS_A_CALL:-540}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 MPLBACKEND=Agg

say() { printf '%s\n' "== $*"; }

# --- Lamina, and what of its needs this machine lacks

imports_this() {
  "$PYTHON" -c 'import os, sys, lamina
sys.exit(not os.path.samefile(lamina.__path__[0], sys.argv[1]))' "$ROOT" 2>/dev/null
}

install() {
  imports_this && return
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . \
    >"$WORK/pip" 2>&1 || true
  imports_this && return
  say "pip could not install it (the last line: $(tail -n 1 "$WORK/pip")): taken through PYTHONPATH"
  mkdir -p "$WORK/src" && ln -sfn "$ROOT" "$WORK/src/lamina"
  export PYTHONPATH="$WORK/src${PYTHONPATH:+:$PYTHONPATH}"
  if ! imports_this; then
    "$PYTHON" -c 'import lamina' || true
    say "lamina does not import: nothing can run"
    exit 1
  fi
}

describe() {
  "$PYTHON" - <<'EOF'
import importlib.util, platform
import torch, triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a dry run"
print(f"== {gpu}; Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
needs = {
    "tests and benchmarks": ["einops", "pytest", "pytest_benchmark"],
    "tests": ["hypothesis", "numpy", "scipy"],
    "peers in benchmarks, skipped without": [
        "transformers", "reformer_pytorch", "local_attention", "linformer",
        "axial_positional_embedding", "vector_quantize_pytorch",
    ],
}
for what, modules in needs.items():
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    if lacking:
        print(f"== not installed, {what}: {', '.join(lacking)}")
EOF
}

has() {
  "$PYTHON" -c 'import sys
from importlib.util import find_spec
sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))' "$@"
}

on_gpu() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

# --- pytest, which is interrupted in time to save what it has measured

# A shell that starts this in the background has SIGINT ignored, and Python keeps it so: it is set again.
run_pytest() {
  local log=$1 status=0
  shift
  timeout --signal=INT --kill-after=20 "$((LIMIT - SECONDS))" "$PYTHON" -c '
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import pytest
sys.exit(pytest.main(sys.argv[1:]))' -p no:cacheprovider --continue-on-collection-errors "$@" \
    >"$log" 2>&1 || status=$?
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    say "out of time: what was measured by then is saved" | tee -a "$log"
  fi
  return "$status"
}

tests() {
  local options=()
  if ! has hypothesis pytest pytest_benchmark; then
    say "tests: left out, for what is not installed"
    return 1
  fi
  if on_gpu; then
    # Tests that choose no device are for a CPU: conftest.py deselects them.
    options=(-m "slow or not slow")  # all of them: here they are quick
    if has xdist; then  # each test compiles much
      options+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist worksteal)
    fi
    export TRITON_INTERPRET=0
  else
    say "tests: no GPU, so they run in the interpreter, without those marked gpu or slow"
    options=(-m "not gpu and not slow")
  fi
  local status=0
  run_pytest "$OUT/tests.log" -q tests/kernels "${options[@]}" --durations=5 "$@" || status=$?
  unset TRITON_INTERPRET
  grep -E '^(FAILED|ERROR) ' "$OUT/tests.log" | cut -c1-200 | head -n 20 || true
  tail -n 1 "$OUT/tests.log"
  return "$status"
}

# One part of the benchmarks: its name, then pytest's arguments.
benchmarks() {
  local part=$1 status=0 quick=()
  shift
  if ! has pytest pytest_benchmark; then
    say "$part: left out, for what is not installed"
    return 1
  fi
  if [ "${LAMINA_QUICK:-}" = 1 ] || on_gpu; then quick=(--quick); fi  # a GPU's times need few rounds
  local results="$WORK/$part"
  mkdir -p "$results"
  run_pytest "$OUT/$part.log" -q -rs --benchmark-columns=median "${quick[@]}" --save-results="$results" "$@" \
    || status=$?
  [ "$status" != 5 ] || say "$part: nothing was chosen"
  tar -czf "$OUT/$part.tar.gz" -C "$results" .  # one file: what comes back from a lent machine is counted
  grep -E '^(FAILED|ERROR) ' "$OUT/$part.log" | cut -c1-200 | head -n 20 || true
  table "$results" | tee -a "$OUT/$part.log"
  say "$part: $(grep -E '(passed|failed|skipped|error).* in [0-9.]+s' "$OUT/$part.log" | tail -n 1)"
  return "$status"
}

# A line a group: the fastest entry that is not ours, and ours with how many times as fast they are.
table() {
  "$PYTHON" - "$1" <<'EOF'
import json, sys
from pathlib import Path

OURS = {"auto", "fused", "lamina", "triton", "padded"}
groups = {}
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    for row in json.loads(path.read_text())["results"]:
        entry = row["name"].partition("[")[2].rstrip("]") or row["name"]
        parts = entry.replace("forward+backward", "").split("-")
        ours = OURS & {parts[0], parts[-1]}
        name = next(iter(ours), None) or entry[:14]
        if "dot_product" in path.name:  # entries end with how they compute, groups hold the rest
            name = entry.partition("forward")[2].removeprefix("+backward").removeprefix("-") or entry
        timed = (row.get("event_ms", row["median_ms"]), name, bool(ours))
        groups.setdefault(row["group"] or row["name"], []).append(timed)
for group, rows in groups.items():
    mine, theirs = [sorted(r for r in rows if r[2] is own) for own in (True, False)]
    line = group.replace("dot_product_attention ", "")
    line = line.replace("forward+backward", "fwd+bwd").replace("forward", "fwd")
    if not mine or not theirs:
        print(f"{line:56.56} " + "  ".join(f"{name} {ms:.3g}" for ms, name, _ in sorted(rows)[:3]))
        continue
    best, peer, _ = theirs[0]
    ratios = "".join(f"  {name} {best / ms:.2f}x" for ms, name, _ in mine[:3])
    print(f"{line:56.56} {best:8.3g} ms {peer:14.14}{ratios}")
EOF
}

run_part() {
  local part=$1
  shift
  case $part in
    tests) tests "$@" ;;
    attention)
      if on_gpu; then set -- -k bfloat16 "$@"; fi  # of two -k, pytest takes the last
      benchmarks attention benchmarks/bench_dot_product_attention.py "$@"
      ;;
    float32) benchmarks float32 benchmarks/bench_dot_product_attention.py -k "not bfloat16" "$@" ;;
    others) benchmarks others benchmarks --ignore=benchmarks/bench_dot_product_attention.py "$@" ;;
    *) say "no part is called '$part': tests, attention, float32, others" >&2; return 2 ;;
  esac
}

install
describe
status=0
if [ $# -gt 0 ]; then
  run_part "$@" || status=$?
else
  for part in tests attention float32 others; do
    if [ $((LIMIT - SECONDS)) -lt 60 ]; then
      say "$part: no time is left, call: benchmarks/gpu.sh $part"
    else
      run_part "$part" || status=$?
    fi
  done
fi
exit "$status"
