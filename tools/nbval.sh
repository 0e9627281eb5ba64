#!/usr/bin/env bash
# Execute notebooks and compare the stored outputs of their claim cells, and of no others. CI runs this line on book/*.ipynb,
# in the kernel named by NSGF_KERNEL (one whose environment holds the built wheel and no more); tests/test_notebooks.py
# runs it on notebooks with planted faults.
set -euo pipefail
export NSGF_SCALE=fast OMP_NUM_THREADS=1 PYDEVD_DISABLE_FILE_VALIDATION=1
exec "${PYTHON:-python}" -m pytest --nbval-lax --nbval-kernel-name "${NSGF_KERNEL:-python3}" --nbval-cell-timeout 600 \
    -p no:cacheprovider -n 2 --dist loadfile "$@"
