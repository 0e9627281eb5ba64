#!/usr/bin/env bash
# The one command line that checks notebooks: executes them in the kernel of .venv-wheel (only the built wheel, what it
# needs, and ipykernel), compares the stored outputs of the claim cells, and asks that a check has printed each of their
# lines. Usage: tools/nbval.sh [NOTEBOOK ...]
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- book/*.ipynb
NSGF_CHECKS=$(mktemp -d)
export NSGF_CHECKS
trap 'rm -rf "$NSGF_CHECKS"' EXIT
.venv/bin/python -m pytest --nbval-lax --nbval-kernel-name "${NSGF_KERNEL:-nsgf-wheel}" --nbval-cell-timeout 300 \
  -n "${NSGF_WORKERS:-2}" --dist loadscope "$@"
.venv/bin/python tools/claims.py "$NSGF_CHECKS" "$@"
