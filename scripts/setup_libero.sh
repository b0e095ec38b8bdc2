#!/usr/bin/env bash
# Installs the LIBERO simulator into a virtual environment: software OpenGL, then the Python packages.
#
#   scripts/setup_libero.sh [PYTHON]    PYTHON: interpreter to install into, seen from the project root (.venv/bin/python)
#
# What is already there is left alone, so a second run only looks (well under a second). The system libraries
# are installed with apt-get where that can be done; elsewhere one line says what is missing, and the
# script goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

packages=(libegl1 libgl1-mesa-dri libglx-mesa0 libegl-mesa0 libgl1 libglib2.0-0)
osmesa=libosmesa6 # preferred, but gone from the newest distributions; EGL draws the same pixels

opengl_ready() {
  local known library
  known=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null) || return 1
  for library in libGL.so.1 libglib-2.0.so.0; do
    [[ $known == *"$library"* ]] || return 1
  done
  [[ $known == *libOSMesa.so* || $known == *libEGL_mesa.so* ]]
}

apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"; }

install_opengl() {
  [[ $(id -u) == 0 ]] && command -v apt-get || return 1
  apt_install "${packages[@]}" || { apt-get update -qq && apt_install "${packages[@]}"; } || return 1
  apt_install "$osmesa" || true
}

# Unmet "name==version" and "name" lines of the given files; reads metadata only, imports nothing.
unmet_requirements() {
  "$python" - "$@" <<'PY'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        name, _, pin = line.split("#")[0].strip().partition("==")
        name = re.split(r"[<>=!~\[; ]", name)[0]
        try:
            unmet = name and pin not in ("", version(name))
        except PackageNotFoundError:
            unmet = True
        if unmet:
            print(line.strip())
PY
}

if ! opengl_ready; then
  if install_opengl >/dev/null 2>&1; then
    echo "libero: installed software OpenGL"
  else
    echo "libero: no software OpenGL; run: sudo apt-get install $osmesa ${packages[*]}" >&2
  fi
fi

if ! "$python" -c '' 2>/dev/null; then
  echo "libero: no Python at $python; create the environment first, or name another: $0 PYTHON" >&2
  exit 1
fi
if [[ -n $(unmet_requirements requirements/libero.txt requirements/libero-no-deps.txt) ]]; then
  "$python" -m pip install --quiet -r requirements/libero.txt
  "$python" -m pip install --quiet --no-deps -r requirements/libero-no-deps.txt
  echo "libero: installed the simulator"
fi
echo "libero: ready"
