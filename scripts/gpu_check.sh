#!/usr/bin/env bash
# Builds, tests, sanitizes and times effkern on a machine with an NVIDIA GPU. Uses the system's Python with its own torch,
# triton, pybind11, cmake and ninja (PYTHON=... names another); installs nothing and needs no network.
#
#   scripts/gpu_check.sh [OUT]                  every stage in turn
#   scripts/gpu_check.sh [OUT] build
#   scripts/gpu_check.sh [OUT] test             op tests and op contract on the GPU
#   scripts/gpu_check.sh [OUT] program          repeats, streams, captured graphs, no memory left, more than 2^31 elements
#   scripts/gpu_check.sh [OUT] sanitize         compute-sanitizer over the tests marked 'sanitize'
#   scripts/gpu_check.sh [OUT] bench [FAMILY [BACKEND...]]   effkern bench --full, of one family or of all, with the
#                                               automatic choice or the backends named
#
# OUT (default: bench-out) receives logs and results. A stage that takes longer than 9 minutes is stopped.
set -uo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

out=bench-out
case "${1:-}" in build | test | program | sanitize | bench | "") ;; *)
  out=$1
  shift
  ;;
esac
stage=${1:-all}
family=${2:-}
backends=("${@:3}")
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

# The package as it would be installed, so that bench/ and triton_kernels/ are found inside it.
site=$repo/build/gpu
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
limit=540
rows=()
status=0

run() {  # run NAME COMMAND...: with a time limit and a log; the log's last line goes into the table
  local name=$1 start=$SECONDS verdict=ok code
  shift
  printf '\n== %s\n' "$name"
  timeout "$limit" "$@" 2>&1 | tee "$out/${name// /-}.log"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { verdict="FAILED ($code)"; status=1; }
  [ "$code" = 124 ] && verdict="TIMED OUT"
  note "$name" "$verdict" $((SECONDS - start)) "$(tail -n 1 "$out/${name// /-}.log" | cut -c1-90)"
  return "$code"
}
note() { rows+=("$(printf '%-22s %-12s %5s s  %s' "$@")"); }
tests() { "$python" -m pytest -q -p no:cacheprovider -c "$repo/pyproject.toml" --rootdir "$repo" "$@"; }
export -f tests
export python repo

build() {
  command -v nvcc >/dev/null || { echo "nvcc was not found: put the CUDA toolkit on PATH"; return 1; }
  rm -rf "$site/effkern"
  (cd "$repo" && EFFKERN_CUDA=1 "$python" setup.py build --build-base build/gpu-base --build-lib "$site") || return 1
  cd "$site" && "$python" - <<'PY'
import torch
from effkern import _lib

status = _lib.status()
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
cuda = "loaded" if status.cuda.loaded else status.cuda.reason
print(f"torch {torch.__version__}, {gpu}, CUDA library {cuda}, images {', '.join(status.build.cuda_images)}")
raise SystemExit(not status.cuda.loaded)
PY
}
export -f build
export site

built() { [ -e "$site/effkern/lib/libeffkern_cuda.so" ] || run build bash -c build; }

test_stage() {
  cd "$site" || return 1
  run "test ops" bash -c 'tests "$repo/tests/ops"'
  run "test contract" bash -c 'tests "$repo/tests/test_contract.py"'
}

program_stage() {
  cd "$site" || return 1
  run "program" bash -c 'tests "$repo/tests/test_gpu.py"'
  run "program large" bash -c 'tests "$repo/tests/robustness/test_large.py" --large -k cuda'
}

sanitize_stage() {
  cd "$site" || return 1
  if ! command -v compute-sanitizer >/dev/null; then
    note sanitize SKIPPED 0 "compute-sanitizer was not found (part of the CUDA toolkit)"
    return
  fi
  local tool
  for tool in memcheck racecheck; do
    # Freed blocks stay in torch's caching allocator, where an out-of-bounds access would go unseen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitize $tool" bash -c \
      "compute-sanitizer --tool $tool --target-processes all --error-exitcode 86 \"\$python\" -m pytest -q -x \
       -p no:cacheprovider -c \"\$repo/pyproject.toml\" --rootdir \"\$repo\" -m sanitize -k 'cuda or triton' \"\$repo/tests/ops\""
    if grep -q "Device not supported" "$out/sanitize-$tool.log"; then
      unset "rows[-1]"
      note "sanitize $tool" SKIPPED 0 "compute-sanitizer does not support the device of this (virtual) machine"
    fi
  done
}

bench_stage() {
  cd "$site" || return 1
  run "bench${family:+ $family}" "$python" -m effkern.bench --full ${family:+--family "$family"} --out "$out" \
    "${backends[@]/#/--backend=}"
  if [ -z "$family" ]; then  # kernels that the automatic choice leaves out
    run "bench attention cuda" "$python" -m effkern.bench --full --family attention --backend triton --backend cuda \
      --no-end-to-end --out "$out/attention-cuda"
  fi
}

case "$stage" in
  build) run build bash -c build ;;
  test) built && test_stage ;;
  program) built && program_stage ;;
  sanitize) built && sanitize_stage ;;
  bench) built && bench_stage ;;
  all) run build bash -c build && { test_stage; program_stage; sanitize_stage; bench_stage; } ;;
  *)
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

printf '\n%-22s %-12s %7s  %s\n' stage result time note
printf '%s\n' "${rows[@]}"
exit "$status"
