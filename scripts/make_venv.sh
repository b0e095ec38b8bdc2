#!/usr/bin/env bash
# Makes a virtual environment: scripts/make_venv.sh FOLDER; PYTHON names the interpreter (python3).
set -euo pipefail
folder=$1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "expected Python 3.11 or newer as $python, got $("$python" --version 2>&1 || true); run: make PYTHON=python3.11 …" >&2
  exit 1
fi
[[ -x $folder/bin/python ]] && exit 0
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  # Debian ships venv as a package of its own
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -qq -y --no-install-recommends python3-venv >/dev/null
  else
    echo "Python has no venv module; run: sudo apt-get install python3-venv" >&2
    exit 1
  fi
fi
"$python" -m venv "$folder"
