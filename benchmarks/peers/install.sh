#!/usr/bin/env bash
# Install the quantizers that benchmarks/quantization.py compares with, from PyPI:  install.sh DIR
#   DIR/llmc       llm-compressor and AutoRound
#   DIR/gptqmodel  GPTQModel; it asks for torch>=2.14.1, but runs on the CPU with 2.13
# Only CPU builds of torch are needed; where the index has others too, set TORCH_INDEX=https://download.pytorch.org/whl/cpu
set -euo pipefail
dir=${1:?usage: install.sh DIR}
python=${PYTHON:-python3}
torch=(torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"})
mkdir -p "$dir"

"$python" -m venv "$dir/llmc"
"$dir/llmc/bin/pip" install "${torch[@]}"
"$dir/llmc/bin/pip" install torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1 compressed-tensors==0.19.0 \
    auto-round==0.15.1 datasets==5.2.0 accelerate==1.15.0

"$python" -m venv "$dir/gptqmodel"
"$dir/gptqmodel/bin/pip" install "${torch[@]}"
"$dir/gptqmodel/bin/pip" install torch==2.13.0 transformers==5.20.2 accelerate==1.15.0 datasets==5.2.0 optimum==2.3.0 \
    torchao==0.18.0 threadpoolctl==3.8.0 protobuf==7.36.2 pillow==13.0.0 requests pypcre==0.6.4 tokenicer logbar==0.4.15 \
    jinja2 dill==0.4.1 device-smi==0.5.7 defuser==0.0.28 safetensors ninja wheel "setuptools>=84.2.1,<85"
BUILD_CUDA_EXT=0 "$dir/gptqmodel/bin/pip" install --no-deps --no-build-isolation gptqmodel==7.7.0
