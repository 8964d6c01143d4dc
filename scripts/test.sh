#!/usr/bin/env bash
# All tests, the slow ones too, on all cores. Makes .venv unless a virtual
# environment is active, installs, and runs. Options go to pytest, for example:
# bash scripts/test.sh -k plan
set -euo pipefail
cd "$(dirname "$0")/.."
extras='[test]'
source scripts/environment.sh
ruff check .
ruff format --check .
# A file's tests stay together: they share what is slow to make.
python -m pytest --slow --numprocesses auto --dist loadfile "$@"
