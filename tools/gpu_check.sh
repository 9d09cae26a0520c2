#!/usr/bin/env bash
# Everything that only a GPU can answer, in at most nine minutes, without network and without installing the package:
#
#     bash tools/gpu_check.sh [FOLDER]        FOLDER: for the results; default $OUT, else ./gpu_check
#
# Tests, and the kernels of laptops on this GPU; single ops, a block and a step; tiers, streaming, other programs; then a
# page of all that. Each part has a limit of its own and is killed at it, and scripts write their JSON after each case, so
# what was measured until then survives. The limits together are more than nine minutes; no part is expected to need its
# own, and those at the end get what is left.
# parts.json says how each part ended: 0 done, 124 or 137 out of time, null not started. Exits with 1 unless all ended
# with 0.
# PYTHON: the interpreter. GPU_CHECK_SECONDS: another limit for all together. PEERS: more options for benchmarks/peers,
# such as "--model FOLDER", without which most of these have nothing to load.
set -uo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
out="${1:-${OUT:-gpu_check}}"
total="${GPU_CHECK_SECONDS:-540}"
mkdir -p "$out" || exit 1
out="$(cd "$out" && pwd)"
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/benchmarks:$PWD/benchmarks/ops${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=passive ZIMAGE_LITE_CACHE=off PYTHONUNBUFFERED=1

parts=()
failed=0
reserve=$((total / 20)) # for the report

# part NAME LIMIT COMMAND...: its output goes to NAME.log
part() {
    local name="$1" limit="$2" start="$SECONDS" code=null
    shift 2
    local left=$((total - reserve - start))
    ((limit > left)) && limit=$left
    if ((limit > 0)); then
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null
        code=$?
    fi
    [[ "$code" == 0 ]] || failed=1
    parts+=("{\"name\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}")
    (IFS=,; printf '{"parts": [%s]}\n' "${parts[*]}") >"$out/parts.json"
    echo "$name: ended with $code after $((SECONDS - start)) s"
    [[ "$code" == 0 || "$code" == null ]] || tail -n 5 "$out/$name.log"
}

tier() {
    part "tier_$1" 80 "$python" "benchmarks/tiers/tier_$1.py" --formats int8,int4 --sizes 1024 --out "$out/tier_$1.json"
}

bench() {
    part "$1" "$2" "$python" "benchmarks/ops/$3.py" --out "$out/$1.json"
}

# Without conftest, which needs packages that a bare machine lacks.
part tests 45 "$python" -m pytest --noconftest -p no:cacheprovider -m gpu tests/pipeline/test_streaming_gpu.py \
    --junitxml "$out/tests.xml"
part kernel_tests 75 "$python" -m pytest --noconftest -p no:cacheprovider \
    tests/ops/test_{attention,dequantize,linear_int8,norm,qk,quantize_rows,unfused_int8}.py --junitxml "$out/kernel_tests.xml"
bench laptop_ptx 75 check_laptop_ptx
bench linear_int8 40 bench_linear_int8
bench attention 40 bench_attention
bench elementwise 75 bench_elementwise
bench block 50 bench_block
bench step 60 bench_step
tier 6gb
tier 8gb
part streaming 80 "$python" benchmarks/streaming_gpu.py --vram 4 --sizes 1024 --case-limit 50 --out "$out/streaming.json"
# Those that are installed, in all the time that is left but for the report's.
# shellcheck disable=SC2086
part peers "$total" "$python" benchmarks/peers/run.py --tier 6gb --size 1024 \
    --quantized synthetic:int8 ${PEERS:-} --out "$out/peers.json"

results=()
for name in laptop_ptx linear_int8 attention elementwise block step tier_6gb tier_8gb streaming peers; do
    [[ -s "$out/$name.json" ]] && results+=("$out/$name.json")
done
reserve=0
((${#results[@]})) && part report 20 "$python" -m zimage_lite report "${results[@]}" -o "$out/report.html" \
    --markdown "$out/report.md"
exit "$failed"
