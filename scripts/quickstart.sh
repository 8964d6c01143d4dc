#!/usr/bin/env bash
# From text to answered questions: T5 and MoWE side by side. Makes .venv unless
# a virtual environment is active, installs, and runs. Options go to
# `mowe quickstart`, for example: bash scripts/quickstart.sh --num_seeds 2
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
mowe quickstart "$@"
