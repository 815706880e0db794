#!/usr/bin/env bash
# Fetches the wheels that a machine with nothing but PyTorch and transformers lacks: wheels.sh [FOLDER, default: wheels]
#
# For Python 3.12, x86-64 and CUDA 13, in the versions of constraints.txt. For a machine that reaches no package index:
# fetch them elsewhere, copy the folder, unpack them there (README.md). All of it is some 9 MB: of bitsandbytes, only the
# libraries for the CPU and for CUDA 13.0 are kept.
set -euo pipefail
folder=$(mkdir -p "${1:-wheels}" && cd "${1:-wheels}" && pwd)
constraints=$(cd "$(dirname "$0")/../.." && pwd)/constraints.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done

fetch() { # FOLDER PACKAGE...
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" --constraint "$constraints" --dest "$1" "${@:2}"
}

# What lora_core needs.
fetch "$folder" datasets dill multiprocess pydantic pydantic-core annotated-types typing-inspection
# What it is compared with: Liger's kernels, and the TRL of benchmarks/requirements.txt.
fetch "$folder" liger-kernel trl==1.16.0

fetch "$scratch" bitsandbytes
wheel=$(basename "$scratch"/bitsandbytes-*.whl)
rm -f "$folder"/bitsandbytes-*.whl
mkdir "$scratch/unpacked"
cd "$scratch/unpacked"
unzip -q "../$wheel"
find . -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name '*_cuda130.so' -delete
zip --quiet --recurse-paths "$folder/$wheel" .
ls -l "$folder"
