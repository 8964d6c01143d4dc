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
# Each core takes a part of the files, and steals when it is done.
python -m pytest --slow --numprocesses auto --dist worksteal "$@"
