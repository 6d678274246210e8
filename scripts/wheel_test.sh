#!/usr/bin/env bash
# One wheel under several versions of torch: for each an empty environment, torch, the wheel, `effkern doctor`, and the
# tests against what was installed, from a folder outside of the checkout.
#
#   scripts/wheel_test.sh WHEEL TORCH... [-- PYTEST ARGUMENTS]
#   scripts/wheel_test.sh dist/*.whl 2.11.0 2.13.0
#   scripts/wheel_test.sh dist/*.whl 2.13.0 -- -n 2 tests/ops     (`--` and nothing behind it: no tests)
#
# PYTHON names the interpreter, OUT (build/wheel-test) the folder of environments and logs, EXTRAS (test,bench) what is
# installed with the wheel for the tests, NO_DEPS packages without what they require. A torch with CUDA has several GB.
set -uo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
wheel=$(realpath "${1:?a wheel}") || exit 2
shift

torches=()
arguments=(-n auto --maxprocesses 4 --dist loadfile tests)
while [ $# -gt 0 ]; do
  if [ "$1" = -- ]; then
    shift
    arguments=("$@")
    break
  fi
  torches+=("$1")
  shift
done
[ ${#torches[@]} -gt 0 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }

read -ra no_deps <<< "${NO_DEPS:-}"

# Nothing of the checkout or of another environment may be imported.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK=1
out=${OUT:-$repo/build/wheel-test}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
rows=()
status=0

try() {  # try TORCH: the whole way with one version; the first step that fails ends it
  local env=$out/torch-$1 log=$out/torch-$1.log
  step="environment"
  rm -rf "$env" "$out/empty" && mkdir -p "$out/empty" && cd "$out/empty" && "$python" -m venv "$env" || return 1
  # The interpreter of triton 3.6, which came with torch 2.11, does not know numpy 2.4.
  printf '%s\n' "torch==$1" 'numpy<2.4' > "$env/constraints.txt"
  step="install torch" && "$env/bin/pip" install -q -c "$env/constraints.txt" torch || return 1
  step="install wheel" && "$env/bin/pip" install -q -c "$env/constraints.txt" "$wheel" || return 1
  step="doctor" && "$env/bin/effkern" doctor | tee "$log" | tail -n 1 || return 1
  [ ${#arguments[@]} -gt 0 ] || return 0
  step="install test tools" && "$env/bin/pip" install -q -c "$env/constraints.txt" "$wheel[${EXTRAS:-test,bench}]" || return 1
  if [ ${#no_deps[@]} -gt 0 ]; then "$env/bin/pip" install -q --no-deps "${no_deps[@]}" || return 1; fi
  step="tests"
  "$env/bin/python" - "$env" <<'PY' || return 1
import sys, effkern, torch
print(f"effkern {effkern.__version__} from {effkern.__file__}, torch {torch.__version__}")
sys.exit(not effkern.__file__.startswith(sys.argv[1]))
PY
  # Paths of tests are those of the checkout: every argument that names a file there.
  local words=() word
  for word in "${arguments[@]}"; do
    if [ -e "$repo/${word%%::*}" ]; then words+=("$repo/$word"); else words+=("$word"); fi
  done
  "$env/bin/pytest" -q -p no:cacheprovider -p no:benchmark -c "$repo/pyproject.toml" --rootdir "$repo" \
    "${words[@]}" 2>&1 | tee -a "$log"
}

for torch in "${torches[@]}"; do
  printf '\n== torch %s\n' "$torch"
  step=""
  if try "$torch"; then
    rows+=("ok      torch $torch: $(tail -n 1 "$out/torch-$torch.log")")
  else
    rows+=("FAILED  torch $torch: $step")
    status=1
  fi
done

printf '\n== summary of %s\n' "$(basename "$wheel")"
printf '%s\n' "${rows[@]}"
exit "$status"
