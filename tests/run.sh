#!/usr/bin/env bash
# The whole suite: makes a virtual environment if there is none, installs what it needs, checks the
# style and runs the tests. Arguments go to pytest, e.g. tests/run.sh -k ttt. The last lines are
# pytest's summary, and the exit code is pytest's (or that of the style check, if only it fails).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # small tensors: threads would wait for each other

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    VIRTUAL_ENV="$PWD/.venv"
    export VIRTUAL_ENV PATH="$PWD/.venv/bin:$PATH"
fi
pip() {
    python -m pip --disable-pip-version-check "$@"
}
pip install --quiet --root-user-action=ignore -r requirements.txt -r tests/requirements.txt
# torch for CUDA brings the one Triton that it wants; torch for the CPU brings none
python -c "import triton" 2>/dev/null || pip install --quiet --root-user-action=ignore \
    triton==3.6.0 || echo "no Triton here: the kernels' tests are skipped"

if ! command -v lrzip >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get install -y -qq lrzip || { apt-get update -qq && apt-get install -y -qq lrzip; }; } \
        >/dev/null 2>&1 || echo "lrzip could not be installed: its tests are skipped"
fi

style=0
python -m ruff check . || style=$?
# two workers, a file to one of them; PYTEST_WORKERS=0 runs all in this process
python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile "$@"
exit "$style"
