#!/usr/bin/env bash
# The GPU check: builds in place, runs the tests that use the GPU, the four tools of compute-sanitizer, and the benchmark, whose
# table is added to benchmarks/RESULTS.md. It needs torch with CUDA, nvcc, ninja, pybind11, pytest and hypothesis, and no
# network. A step that fails does not stop the later ones. The limits of the steps add up to less than nine minutes.
#
#   bash benchmarks/gpu_check.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
logs=build/gpu_check
mkdir -p "$logs"
failed=()

# step NAME SECONDS COMMAND…: runs it under a limit of time, tells how long it took, and notes a failure.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  echo "== $name"
  timeout --kill-after=3 "$limit" "$@" || code=$?
  local said="after $((SECONDS - start)) s"
  if ((code == 0)); then
    echo "== $name: ended well $said"
  else
    ((code == 124 || code == 137)) && said="$said, at its limit"
    echo "== $name: FAILED with $code $said"
    failed+=("$name")
  fi
}

build() {
  export TOPN_GATING_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
  local own='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$own")}
  export TORCH_CUDA_ARCH_LIST
  python3 setup.py --quiet build_ext --inplace && python3 -m topn_gating info
}

# The kernels on the host, for the tests that compare them with the GPU's.
build_simt() {
  local torch
  torch=$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))')
  cmake -S . -B build/cmake -DTOPN_GATING_TORCH="$torch"
  cmake --build build/cmake --target topn_gating_simt --parallel "$(nproc)"
}

tests() {
  # Without a GPU, or kernels for it, all of these tests would be skipped.
  python3 -c 'import torch, topn_gating; assert torch.cuda.is_available() and topn_gating.build_info()["cuda"], "no CUDA"'
  local workers=()
  if python3 -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")  # each has a CUDA context, and memory of its own
  fi
  python3 -m pytest -q "${workers[@]}" -k cuda tests/test_cuda.py tests/test_{gate,assign,dense,dispatch,combine}.py
}

# The four tools at once: each spends most of its time on loading torch.
sanitizers() {
  local tool code=0
  declare -A process
  for tool in memcheck racecheck initcheck synccheck; do
    # Without torch's cache of memory, each tensor has bounds that memcheck knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 benchmarks/gpu.py --sanitize >"$logs/$tool.log" 2>&1 &
    process[$tool]=$!
  done
  for tool in "${!process[@]}"; do
    if wait "${process[$tool]}"; then
      echo "$tool: $(tail -n 1 "$logs/$tool.log")"
    else
      code=1
      echo "$tool: FAILED, the end of $logs/$tool.log:"
      tail -n 30 "$logs/$tool.log"
    fi
  done
  return $code
}

if [[ ${1:-} == --step ]]; then  # what `timeout` starts
  "$2"
  exit
fi

step "card" 10 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
step "build" 160 bash benchmarks/gpu_check.sh --step build
if command -v cmake >/dev/null; then
  step "build of the kernels on the host" 50 bash benchmarks/gpu_check.sh --step build_simt
else
  echo "== no cmake: the tests leave out the kernels on the host"
fi
step "tests" 110 bash benchmarks/gpu_check.sh --step tests
step "sanitizers" 80 bash benchmarks/gpu_check.sh --step sanitizers
step "benchmark" 105 python3 benchmarks/gpu.py --budget 60 --out benchmarks/RESULTS.md

echo "== all: $SECONDS s"
if ((${#failed[@]})); then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
