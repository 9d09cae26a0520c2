#!/usr/bin/env bash
# What only a GPU can answer, in nine minutes, the most valuable first, without network and without installing the package:
#
#     bash tools/gpu_check.sh [FOLDER]        FOLDER: for the results; default $OUT, else ./gpu_check
#
# Needs torch, Triton, pytest and what the package computes with; neither git, nvidia-smi nor other people's packages.
# After every part FOLDER holds all that there is until then: gpu_check.tgz, replaced as a whole, and parts.json, which
# says how each part ended: 0 done, 2 no CUDA device, 124 or 137 out of time, null not started. The end of what a part
# has to say is printed, too. Exits with 1 unless all ended with 0.
#
# Of the two numbers of a part, seconds, the first is the plan: together they are the nine minutes. At the second the
# part is killed; scripts write their JSON after each case, so what was measured until then is kept.
# PYTHON: the interpreter. GPU_CHECK_SECONDS: another limit for all together.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python="${PYTHON:-python3}"
out="${1:-${OUT:-gpu_check}}"
total="${GPU_CHECK_SECONDS:-540}"
mkdir -p "$out" && out="$(cd "$out" && pwd)" && work="$(mktemp -d)" || exit 1
trap 'rm -rf "$work"' EXIT
results="$work/gpu_check"
mkdir "$results"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks:$PWD/benchmarks/ops${PYTHONPATH:+:$PYTHONPATH}"
export ZIMAGE_LITE_CACHE="$work/cache" # of its own, so that kernels are checked once, here, and not in every process
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE # float32 is what others are compared with
export OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1

parts=()
failed=0
reserve=15 # for the report
said=1000  # characters of each part, of the 12 000 that a caller may see

# part NAME PLANNED LIMIT COMMAND...: its output goes to NAME.log
part() {
    local name="$1" planned="$2" limit="$3" start="$SECONDS" code=null
    shift 3
    local left=$((total - reserve - start))
    ((limit > left)) && limit=$left
    if ((limit > 0)); then
        timeout --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1 </dev/null
        code=$?
    fi
    [[ "$code" == 0 ]] || failed=1
    echo "== $name: ended with $code after $((SECONDS - start)) s of $planned"
    [[ "$code" == null ]] || grep -v '^{' "$results/$name.log" | tail -c "$said"
    parts+=("{\"name\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - start)), \"planned\": $planned, \"limit\": $limit}")
    keep
}

# All results so far, in one file: a reader finds the last whole one.
keep() {
    (IFS=,; printf '{"parts": [%s]}\n' "${parts[*]}") >"$results/parts.json"
    tar -czf "$out/gpu_check.tgz.new" -C "$work" gpu_check && mv -f "$out/gpu_check.tgz.new" "$out/gpu_check.tgz"
    cp "$results/parts.json" "$out/parts.json.new" && mv -f "$out/parts.json.new" "$out/parts.json"
}

# bench NAME PLANNED LIMIT SCRIPT OPTIONS...: of benchmarks/
bench() {
    part "$1" "$2" "$3" "$python" "benchmarks/$4.py" --out "$results/$1.json" "${@:5}"
}

# tests NAME PLANNED LIMIT OPTIONS...: without conftest, which needs packages that a bare machine lacks
tests() {
    part "$1" "$2" "$3" "$python" -m pytest --noconftest -o addopts=--import-mode=importlib -p no:cacheprovider --continue-on-collection-errors \
        --junitxml "$results/$1.xml" "${@:4}"
}

bench facts 20 90 ops/gpu_facts # the first import of torch on a fresh machine takes its time
part doctor 60 120 "$python" -m zimage_lite doctor --json # compiles what all others use
bench everyday 40 80 everyday_gpu # LoRA, pictures, ControlNet, Omni, training: do they run, and come out right?
bench block 35 70 ops/bench_block
bench step 30 60 ops/bench_step
bench linear_int8 30 60 ops/bench_linear_int8 --tokens 4224
bench attention 20 40 ops/bench_attention --tokens 4224 16512
bench laptop_ptx 50 90 ops/check_laptop_ptx
tests streaming_tests 60 90 -vv tests/pipeline/test_streaming_gpu.py
bench streaming 60 100 streaming_gpu --formats int8 --vram 4 --sizes 1024 --case-limit 45
bench tier_6gb 55 90 tiers/tier_6gb --formats int8 --sizes 1024 --repeats 2
part tune 25 50 "$python" tools/tune_kernels.py --op linear_int8 --op attention_int8 --seconds 20 --write "$results"
bench elementwise 20 60 ops/bench_elementwise --tokens 4224
how=-vv # -q is in the configuration
[[ "${parts[0]}" == *'"code": 2,'* ]] && how=--collect-only # no CUDA device: whether they could run
tests kernel_tests 20 "$total" "$how" \
    tests/ops/test_{attention,linear_int8,qk,norm,quantize_rows,unfused_int8,dequantize}.py # in all that is left

found=()
for name in block step linear_int8 attention laptop_ptx streaming tier_6gb elementwise; do
    [[ -s "$results/$name.json" ]] && found+=("$results/$name.json")
done
reserve=0
((${#found[@]})) && part report 15 "$total" "$python" -m zimage_lite report "${found[@]}" -o "$results/report.html" \
    --markdown "$results/report.md"
exit "$failed"
