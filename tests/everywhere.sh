#!/usr/bin/env bash
# Runs the tests as machines differ: with and without bfloat16, older CPUs, more threads.
# usage: everywhere.sh PYTHON   All parts run; the exit code is 1 if one failed.
set -u
cd "$(dirname "$0")/.."
python=$1
failed=0
# what computes with the network, and so depends on the CPU's instructions and threads
numbers=(model diffusion training speed likelihood checkpoints convert dialects evaluate commands)

part() {  # NAME=VALUE... [tests]: the settings, then what pytest is given
  local settings=()
  while [[ ${1-} == *=* ]]; do settings+=("$1"); shift; done
  local what="${settings[*]}: ${*:-the suite}"
  echo "== $what"
  if env "${settings[@]}" "$python" -m pytest -n "${workers:-2}" --dist loadfile "$@" </dev/null; then
    echo "== $what: passed"
  else
    echo "== $what: FAILED"
    failed=1
  fi
}

files=()
for name in "${numbers[@]}"; do files+=("$(find tests -name "test_$name.py")"); done
for bf16 in 0 1; do part DDPM_BF16=$bf16 OMP_NUM_THREADS=1; done
for isa in default avx2; do part ATEN_CPU_CAPABILITY=$isa OMP_NUM_THREADS=1 "${files[@]}"; done
workers=1  # the threads want the cores
for threads in 2 4; do part OMP_NUM_THREADS=$threads "${files[@]}"; done  # 1 thread is above
exit $failed
