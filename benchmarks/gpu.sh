#!/usr/bin/env bash
# Everything docs/performance.md wants from a GPU, part by part; each leaves its files in OUT and can be run alone.
#
#   bash benchmarks/gpu.sh OUT [step] [savings] [flags] [batches] [precision] [ablations]
#
# $PYTHON is the interpreter with this package and jax[cuda12]; $OPENPI_PYTHON one that can import openpi, if there is one.
set -euo pipefail
OUT=${1:?expected a folder for the results, got nothing: bash benchmarks/gpu.sh out/gpu}
shift
PARTS=${*:-step savings flags batches precision ablations}
PYTHON=${PYTHON:-python}
HERE=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$OUT"
bench() { "$PYTHON" -m safe_pruner_jax bench --config "${CONFIG:-pi05_libero}" --out "$OUT" "$@"; }
beside() { [ -z "${OPENPI_PYTHON:-}" ] || echo --openpi-python "$OPENPI_PYTHON"; }

for part in $PARTS; do
    case $part in
    step) # one robot: openpi, all slots, full, pruned, phases, 8-bit weights
        # shellcheck disable=SC2046
        bench --name step_gpu_bf16 --pruners safe fastv --keeps 0.5 0.3 0.2 0.1 --rounds 30 --quantise int8 fp8 $(beside)
        ;;
    savings) # the same step with each saving undone, and with none; kernels and the graph are measured each time
        all="stacked room rotation vision counting arguments graph"
        for without in $all all; do
            # shellcheck disable=SC2046
            bench --name "savings_without_$without" --keeps 0.2 --rounds 20 --no-phases --savings \
                $([ "$without" = all ] || tr ' ' '\n' <<<"$all" | grep -vx "$without")
        done
        ;;
    flags) # the same step under flags that are said to help; the first set is the default
        i=0
        for flags in "" \
            "--xla_gpu_command_buffer_unroll_loops=true" \
            "--xla_gpu_enable_triton_gemm=false" \
            "--xla_gpu_autotune_level=4 --xla_gpu_exhaustive_tiling_search=true"; do
            XLA_FLAGS=$flags bench --name "flags_$i" --keeps 0.2 --rounds 20 --no-phases || echo "flags $i: not possible here"
            i=$((i + 1))
        done
        ;;
    batches) bench --name batches_gpu_bf16 --keeps 0.2 --batches 1 2 4 8 --rounds 20 --no-phases ;;
    precision) "$PYTHON" "$HERE/benchmarks/precision.py" --out "$OUT/precision_mini_gpu.json" ;;
    ablations) "$PYTHON" "$HERE/benchmarks/ablations.py" --depth 18 --dtype bfloat16 --out "$OUT/ablations_gpu_bf16.json" ;;
    *)
        echo "expected step, savings, flags, batches, precision or ablations, got $part" >&2
        exit 2
        ;;
    esac
done
