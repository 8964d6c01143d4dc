"""Prints a table of the models that wiki_articles.sh has trained.

  python scripts/examples/wiki_articles_table.py OUTPUT

Perplexities are per word, ends of lines among them, as is usual for WikiText.
"""

import argparse
import json
import math
import pathlib
import statistics

from mowe.model_folders import model_folder
from mowe.models.families import costs

_PARTS = ('validation', 'test')
# Usage is averaged over this fraction of a run's measurements, the last ones.
_LAST = 0.25


def usage(run: pathlib.Path) -> float | None:
  """Returns exp(entropy of the loads) / experts, a mean over layers."""
  lines = (run / 'train_metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows = rows[-max(1, int(len(rows) * _LAST)) :]
  shares = []
  for name in (n for n in rows[-1] if n.endswith('/load')):
    total = [sum(parts) for parts in zip(*(r[name] for r in rows), strict=True)]
    p = [one / sum(total) for one in total]
    entropy = -sum(one * math.log(one) for one in p if one)
    shares.append(math.exp(entropy) / len(p))
  return statistics.mean(shares) if shares else None


def row(name: str, runs: list[pathlib.Path]) -> str:
  """Returns one line of the table, for all seeds of a model."""
  cost = costs.model_costs(model_folder.load_config(runs[0])[0])
  cells = [
    name,
    f'{cost.total_parameters:,}',
    f'{cost.flops_per_target_token / 1e6:.2f}',
  ]
  for part in _PARTS:
    values = [
      json.loads((run / part / 'results.json').read_text())['word_perplexity']
      for run in runs
    ]
    each = ', '.join(f'{value:.1f}' for value in values)
    cells.append(f'{statistics.mean(values):.1f} ({each})')
  used = [usage(run) for run in runs]
  cells.append('' if None in used else f'{100 * statistics.mean(used):.0f} %')
  return f'| {" | ".join(cells)} |'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('output', type=pathlib.Path)
  output = parser.parse_args().output
  models: dict[str, list[pathlib.Path]] = {}
  for file in sorted(output.glob(f'*/{_PARTS[-1]}/results.json')):
    run = file.parent.parent
    models.setdefault(run.name.rpartition('-')[0], []).append(run)
  print(
    '| model | parameters | MFLOP per token | validation, per seed | test, '
    'per seed | experts in use |\n|---|---|---|---|---|---|'
  )
  for name, runs in models.items():
    print(row(name, runs))


if __name__ == '__main__':
  main()
