#!/usr/bin/env bash
# Everything that is worth measuring on one GPU, in one call of less than 9 minutes: GPU tests, data, step, both together,
# memory, kNN and CIFAR-10. Prints a table with the bars, and writes gpu.json, table.txt and pytest.log.
#
#   tests/perf/gpu.sh                                    generated JPEGs; results in $OUT, or gpu_results/
#   tests/perf/gpu.sh --data IMAGES.tar --out results    real JPEGs: a folder, a tar, or whatever simsiam pretrain reads
#   tests/perf/gpu.sh --smoke                            a tiny run on a CPU, to see that the script works
#
# Needs no installation: the checkout runs as it is. PYTHON names the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
missing=$("$python" -c '
from importlib.util import find_spec
needed = dict(torch="torch", torchvision="torchvision", timm="timm", huggingface_hub="huggingface-hub", tqdm="tqdm",
              safetensors="safetensors", filelock="filelock", PIL="pillow", sklearn="scikit-learn", pytest="pytest")
print(*(name for module, name in needed.items() if find_spec(module) is None))')
if [ -n "$missing" ]; then
    echo "gpu.sh: $python lacks $missing: run $python -m pip install $missing" >&2
    exit 1
fi
if [ -f setup.py ]; then  # the compiled kernel, if the package builds one
    "$python" setup.py -q build_ext --inplace || echo 'gpu.sh: the kernel cannot be built; data will be slow' >&2
fi
exec "$python" tests/perf/gpu.py "$@"
