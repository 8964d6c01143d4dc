"""Draws what scripts/examples/module_claims.py found.

python scripts/examples/module_claims_figure.py RESULTS.json FIGURE.png
"""

import json
import re
import sys

import matplotlib

matplotlib.use('agg')
from matplotlib import pyplot  # noqa: E402 (after the choice of a backend)

_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7')


def main() -> None:
  """Reads the numbers of all seeds, and writes the picture."""
  results = json.loads(open(sys.argv[1]).read())
  figure, (left, right) = pyplot.subplots(
    1, 2, figsize=(11, 4.2), layout='constrained'
  )
  _extendability(
    left, [of_seed['extendability'] for of_seed in results.values()]
  )
  _specialisation(
    right, [of_seed['specialisation'] for of_seed in results.values()]
  )
  figure.savefig(sys.argv[2], dpi=110)


def _extendability(axes, seeds):
  """Plots what is left of A against what is learnt of B, a line per model."""
  lines = {
    'dense, all trained': 'dense, all',
    'modules, all trained': 'modular, all',
    'modules, added ones trained': 'modular, added',
  }
  for color, (label, start) in zip(_COLORS, lines.items(), strict=False):
    for number, of_seed in enumerate(seeds):
      points = sorted(
        (loss['b'], loss['a'])
        for name, loss in of_seed.items()
        if name.startswith(start)
      )
      axes.plot(
        *zip(*points, strict=True), 'o-', color=color, alpha=0.8,
        label=label if number == 0 else None,
      )  # fmt: skip
  axes.set_xlabel('loss on B, nats per token')
  axes.set_ylabel('loss on A, nats per token')
  axes.set_title('Learning B, forgetting A: lower left is better', fontsize=10)
  axes.legend(frameon=False)
  axes.grid(alpha=0.3)


def _specialisation(axes, seeds):
  """Plots the loss against the modules that are left, a line per weight."""
  weights = sorted(
    {re.match(r'concentration ([\d.]+)', name)[1] for name in seeds[0]},
    key=float,
  )
  for color, weight in zip(_COLORS, weights, strict=False):
    for number, of_seed in enumerate(seeds):
      losses = {100: of_seed[f'concentration {weight}, all modules']}
      for name, loss in of_seed.items():
        part = re.match(
          rf'concentration {re.escape(weight)}, (\d+)% .* gates keep', name
        )
        if part:
          losses[int(part[1])] = loss
      axes.plot(
        *zip(*sorted(losses.items()), strict=True), 'o-', color=color,
        alpha=0.8, label=f'weight {weight}' if number == 0 else None,
      )  # fmt: skip
  axes.set_xlabel('modules that are left, %')
  axes.set_ylabel('loss on B, nats per token')
  axes.set_title(
    'Pruning after finetuning with load concentration', fontsize=10
  )
  axes.set_xticks([25, 50, 75, 100])
  axes.legend(frameon=False)
  axes.grid(alpha=0.3)


if __name__ == '__main__':
  main()
