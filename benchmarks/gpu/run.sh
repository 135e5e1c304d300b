#!/usr/bin/env bash
# Install the wheels of .whl offline and run every GPU job; each adds a line to the file as it ends.
#   benchmarks/gpu/run.sh receipts.jsonl         # at most 8 minutes on one GPU
#   benchmarks/gpu/run.sh receipts.jsonl --toy   # the same code at toy size on the CPU
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: run.sh FILE [--toy]}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target "$site" .whl/*.whl
cp -r .whl/bnb/* "$site/"
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 benchmarks/gpu/receipts.py --out "$out" "${@:2}"
