#!/usr/bin/env bash
# Runs all tests on all cores, or with --quick those that are not marked slow.
# It makes .venv unless a virtual environment is active, and installs the
# package. Other options go to pytest, for example:
# bash scripts/test.sh --quick -k plan
set -euo pipefail
cd "$(dirname "$0")/.."
which=(--slow)
if [ "${1:-}" = --quick ]; then
  which=()
  shift
fi
extras='[test]'
source scripts/environment.sh
ruff check .
ruff format --check .
# Each core has a part of the files, and takes some of another when it is done.
python -m pytest "${which[@]}" --numprocesses auto --dist worksteal "$@"
