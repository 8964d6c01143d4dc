#!/usr/bin/env bash
# T5 and MoWE of equal FLOPs on short Wikipedia articles and questions about
# them: bash scripts/examples/wiki_entities.sh DATA_DIR [--full] [options]
#
# DATA_DIR holds documents.jsonl.gz, qa_train.jsonl.gz, qa_validation.jsonl.gz,
# and the same in mini/, which is taken unless --full is given. Other options go
# to `mowe quickstart`: --vocabulary FILE, --num_seeds 2, --output FOLDER, ...
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,8p' "$0" >&2
  exit 2
fi
data=$(realpath "$1")
shift
cd "$(dirname "$0")/../.."
source scripts/environment.sh
if [ "${1:-}" = --full ]; then
  shift
  # 40 epochs of 33,763 texts, and a table to hold them: for a GPU.
  set -- --vocabulary_size 16000 --num_experts 32768 --steps 21000 \
    --finetune_steps 3000 --output wiki_entities_full_output "$@"
else
  data=$data/mini
  set -- --vocabulary_size 4000 --num_experts 4096 \
    --output wiki_entities_output "$@"
fi
mowe quickstart --recipe wiki_entities --data_dir "$data" "$@"
