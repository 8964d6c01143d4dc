#!/usr/bin/env bash
# Feed-forwards of equal parameters in a language model, on Wikipedia articles and
# WikiText-2's validation and test text:
#   bash scripts/examples/wiki_articles.sh DATA_DIR OUTPUT
#
# DATA_DIR holds wiki_articles/train.jsonl.gz and
# wikitext2_eval/{validation,test}.txt.gz. May be stopped and started again. Set
# MODELS, SEEDS or STEPS to run others, or some in one shell and some in another.
set -euo pipefail
if [ $# -ne 2 ]; then
  sed -n '2,9p' "$0" >&2
  exit 2
fi
data=$(realpath "$1")
mkdir -p "$2"
output=$(realpath "$2")
cd "$(dirname "$0")/../.."
source scripts/environment.sh
models=${MODELS:-mini top_k_mini pkm_mini sigma_moe_mini switch_mini}
seeds=${SEEDS:-0 1}

# Two shells prepare one after the other.
exec 9>"$output/lock"
flock 9
text=$output/train.txt
if [ ! -e "$text" ]; then
  python scripts/examples/wikitext_form.py "$text" \
    "$data/wiki_articles/train.jsonl.gz"
fi
pieces=$output/pieces.model
if [ ! -e "$pieces" ]; then
  mowe train-vocabulary "$pieces" "$text" --size 8000
fi
for part in train validation test; do
  files=$data/wikitext2_eval/$part.txt.gz
  if [ $part = train ]; then files=$text; fi
  if [ ! -e "$output/cache/$part" ]; then
    mowe cache-task "$output/cache/$part" "$files" --vocabulary "$pieces" \
      --kind language_model --extra_ids 0
  fi
done
flock -u 9

for seed in $seeds; do
  for model in $models; do
    run=$output/$model-$seed
    mowe train --gin_file="gin_configs/models/xl_$model.gin" \
      --gin_file=gin_configs/examples/wiki_articles_lm.gin \
      --gin.VOCABULARY_PATH="$pieces" --gin.CACHE_DIR="$output/cache" \
      --gin.MIXTURE_OR_TASK_NAME=train --gin.MODEL_DIR="$run" \
      --gin.RANDOM_SEED="$seed" --gin.TRAIN_STEPS="${STEPS:-1200}"
    for part in validation test; do
      if [ ! -e "$run/$part/results.json" ]; then
        mowe evaluate --gin_file=gin_configs/runs/evaluate.gin \
          --gin.CHECKPOINT_PATH="$run" --gin.EVAL_OUTPUT_DIR="$run/$part" \
          --gin.CACHE_DIR="$output/cache" \
          --gin.MIXTURE_OR_TASK_NAME="$part" --gin.BATCH_SIZE=16 \
          --gin.TASK_FEATURE_LENGTHS="{'targets': 128}"
      fi
    done
  done
done
python scripts/examples/wiki_articles_table.py "$output"
