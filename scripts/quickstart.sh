#!/usr/bin/env bash
# Compares T5 and MoWE, from text to answered questions. It makes .venv unless a
# virtual environment is active, and installs the package. Options go to
# `mowe quickstart`, for example: bash scripts/quickstart.sh --num_seeds 2
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
mowe quickstart "$@"
