#!/usr/bin/env bash
# Checks and measures on a machine with an NVIDIA GPU, in three commands of at most ten minutes. It needs torch with CUDA, nvcc,
# ninja, pybind11, pytest and hypothesis, and no network.
#
#   bash benchmarks/gpu_check.sh 1            # build, smoke test, tests, table of times
#   bash benchmarks/gpu_check.sh 2            # build, compute-sanitizer, the time of each launch, ncu
#   bash benchmarks/gpu_check.sh 3 FOLDER     # build here and in FOLDER, both versions' times alternately
#   bash benchmarks/gpu_check.sh STEP…        # single steps: card build smoke tests table sanitizers launches ncu old compare
#
# Logs, RESULTS.md and lines.jsonl are written under ${OUT:-build/gpu_check} while the steps run. A step that fails or reaches its
# limit does not stop the later ones. DEVICE=cpu runs the script without a GPU; PYTHON, LIMIT (seconds of each step),
# TESTS and TABLE (arguments of pytest and of benchmarks/kernels.py) may be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" PYTHONUNBUFFERED=1
export OUT="${OUT:-build/gpu_check}" DEVICE="${DEVICE:-cuda}" PYTHON="${PYTHON:-python3}" OLD="${OLD:-build/old}"
A=4,8192,4096,64,8 B=1,1000000,512,256,8 C=1,8192,512,64,8

# Time limit of each step in seconds, and the number of lines of its log that are printed when it ends.
declare -A limits=([card]=20 [build]=200 [smoke]=60 [tests]=120 [table]=180 [sanitizers]=210 [launches]=40 [ncu]=130 [old]=170
                   [compare]=190)
declare -A lines=([card]=12 [build]=8 [smoke]=12 [tests]=25 [table]=1000 [sanitizers]=20 [launches]=40 [ncu]=60 [old]=4
                  [compare]=1000)

build_here() {
  if [[ $DEVICE == cuda ]]; then
    export TOPN_GATING_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
    local own='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c "$own")}
    export TORCH_CUDA_ARCH_LIST
  fi
  "$PYTHON" setup.py --quiet build_ext --inplace && "$PYTHON" -m topn_gating info
}

step_card() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || true
  mkdir -p build && nvcc -O2 -std=c++17 -arch=native benchmarks/card.cu -o build/card && build/card
}

# Builds the extension and, at the same time, the CUDA kernels for the host, which the tests compare with the GPU's.
step_build() {
  local host=0
  if [[ $DEVICE == cuda ]] && command -v cmake >/dev/null; then
    local torch
    torch=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
    (cmake -S . -B build/cmake -DTOPN_GATING_TORCH="$torch" &&
      cmake --build build/cmake --target topn_gating_simt --parallel "$(nproc)") >"$OUT/build_host.log" 2>&1 &
    host=$!
  fi
  build_here
  ((host == 0)) || wait "$host" || echo "the kernels on the host could not be built: see build_host.log"
}

step_smoke() { "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --smoke; }

step_tests() {
  local workers=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")  # each has its own CUDA context and memory
  fi
  # shellcheck disable=SC2086
  "$PYTHON" -m pytest -q --durations=10 "${workers[@]}" ${TESTS:--k $DEVICE tests/kernels tests/ops tests/distributed/test_exchange.py}
}

# shellcheck disable=SC2086
step_table() { "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --out "$OUT" --budget 100 ${TABLE:-}; }

# Runs the four tools at once: each spends most of its time loading torch.
step_sanitizers() {
  local tool code=0
  declare -A process
  for tool in memcheck racecheck initcheck synccheck; do
    # Without torch's caching allocator, memcheck knows the bounds of each tensor. API errors of torch itself are not reported.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --tool "$tool" --error-exitcode 9 \
      "$PYTHON" benchmarks/kernels.py --device cuda --once >"$OUT/$tool.txt" 2>&1 &
    process[$tool]=$!
  done
  for tool in "${!process[@]}"; do
    wait "${process[$tool]}" || { code=1; echo "$tool: FAILED"; head -n 40 "$OUT/$tool.txt"; }
    echo "$tool: $(tail -n 1 "$OUT/$tool.txt")"
    rm "$OUT/$tool.txt"
  done
  return $code
}

step_launches() {
  "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --launches --shapes $A $B $C --dtypes bfloat16 \
    --names gate gate_backward assign dispatch combine
}

step_ncu() {
  local metrics=gpu__time_duration.sum,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active
  metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,lts__t_sector_hit_rate.pct
  ncu --clock-control none --profile-from-start off --section WarpStateStats --metrics $metrics \
    "$PYTHON" benchmarks/kernels.py --device cuda --once --shapes $A $B --dtypes bfloat16 \
    --names gate gate_backward assign combine >"$OUT/ncu.txt" 2>&1 || { tail -n 20 "$OUT/ncu.txt"; return 1; }
  grep -E "Context|pct|rate|duration|registers|This warp|stalled" "$OUT/ncu.txt" | cut -c1-170
}

step_old() { cd "$OLD" && PYTHONPATH="$PWD" build_here; }

# shellcheck disable=SC2086
step_compare() {
  "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --out "$OUT" --packages "$OLD" "$PWD" --turns 2 \
    --names gate gate_backward assign dense dense_backward dispatch dispatch_backward combine combine_backward ${TABLE:-}
}

if [[ ${1:-} == --step ]]; then  # what `timeout` starts
  "step_$2"
  exit
fi

case "${1:-}" in
  1) steps=(card build smoke tests table) ;;
  2) steps=(build sanitizers launches ncu) ;;
  3) steps=(build old compare) OLD=${2:?the folder of the version to compare with} ;;
  *) steps=("$@") ;;
esac
if ((${#steps[@]} == 0)); then
  sed -n '2,14s/^# \{0,1\}//p' benchmarks/gpu_check.sh
  exit 2
fi
mkdir -p "$OUT"
failed=()
for name in "${steps[@]}"; do
  if [[ ! ${limits[$name]:-} ]]; then
    echo "there is no step $name" >&2
    exit 2
  fi
  echo "== $name"
  start=$SECONDS code=0
  if ((lines[$name] >= 1000)); then  # printed as it comes
    timeout -s INT --kill-after=10 "${LIMIT:-${limits[$name]}}" bash "$0" --step "$name" > >(tee "$OUT/$name.log") 2>&1 || code=$?
  else
    timeout -s INT --kill-after=10 "${LIMIT:-${limits[$name]}}" bash "$0" --step "$name" >"$OUT/$name.log" 2>&1 || code=$?
    tail -n "${lines[$name]}" "$OUT/$name.log" | cut -c1-200
  fi
  said="after $((SECONDS - start)) s"
  if ((code == 0)); then
    echo "== $name: ended well $said"
  else
    ((code == 124 || code == 137)) && said="$said, at its limit"
    echo "== $name: FAILED with $code $said"
    failed+=("$name")
  fi
done
echo "== all: $SECONDS s"
if ((${#failed[@]})); then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
