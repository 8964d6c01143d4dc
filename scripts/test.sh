#!/usr/bin/env bash
# Runs all tests, the slow ones too, on all cores. It makes .venv unless a
# virtual environment is active, and installs the package. Options go to pytest,
# for example: bash scripts/test.sh -k plan
set -euo pipefail
cd "$(dirname "$0")/.."
extras='[test]'
source scripts/environment.sh
ruff check .
ruff format --check .
# Each core has a part of the files, and takes some of another when it is done.
python -m pytest --slow --numprocesses auto --dist worksteal "$@"
