#!/usr/bin/env bash
# Makes the virtual environment and installs the complete pinned lock (CPU) without resolving anything.
# Two steps because `torch==X+cpu` is on PyTorch's own CPU index, unless pip is configured to find it elsewhere.
set -euo pipefail
: "${PYTHON:?}" "${VENV:?}" "${LOCK:?}"
if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "the CPU lock is for Python 3.11, this is " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.11")'
  "$PYTHON" -m venv "$VENV"
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
torch=$(grep -E '^torch==' "$LOCK")
if ! "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$torch')" 2>/dev/null; then
  pip install --quiet --no-deps "$torch" 2>/dev/null \
    || pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
fi
grep -vE '^(torch==|#|$)' "$LOCK" > "$VENV/rest.lock"
pip install --quiet --no-deps -r "$VENV/rest.lock"
# An image installs the lock in one layer and the package itself in a later one: PROJECT= leaves it out.
project=${PROJECT-"--editable ."}
# shellcheck disable=SC2086  # two words on purpose
[ -z "$project" ] || pip install --quiet --no-deps --no-build-isolation $project
