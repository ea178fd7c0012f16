#!/usr/bin/env bash
# Everything that wants a GPU, in under nine minutes: the tests marked `gpu` (device, span), then the benchmarks on the device.
# Results go to $OUT, or to benchmarks/results. Wheels of what the machine lacks may lie in .whl/.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
DEVICE=${DEVICE:-cuda:0}
export PYTHONPATH="$PWD:$PWD/template/python3-trunkline${PYTHONPATH:+:$PYTHONPATH}"
if [ -d .whl ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/trunkline-site .whl/*.whl
  export PYTHONPATH="/tmp/trunkline-site:$PYTHONPATH"
fi
status=0
timeout 180 python3 -m pytest -q -m gpu --override-ini addopts=--import-mode=importlib 2>&1 | tee "$OUT/gpu_tests.txt" || status=1
for name in thin sharing swap tenancy; do
  timeout 85 python3 -m "benchmarks.$name" --quick --device "$DEVICE" --json "$OUT/${name}_gpu.json" || status=1
done
exit $status
