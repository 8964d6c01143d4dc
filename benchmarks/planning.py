"""Times the plans of batches on the host, in one thread.

  python -m benchmarks.planning

Batches have the tokens of an encoder and a decoder, with a million words by
Zipf's law, and few or very many experts. Every batch is planned as during
training, in the smallest profile that fits. The last line is the slower rate.
"""

import argparse
import statistics
import time

import numpy as np

from benchmarks import mowe_step
from mowe.words.plans import batch_plans

_NUM_TRIALS = 16


def rate(arguments: argparse.Namespace, num_experts: int) -> float:
  """Returns tokens per second; prints what was planned."""
  rng = np.random.default_rng(0)
  words = mowe_step.WordIds(num_experts, arguments.num_skipped)
  lengths = {
    'encoder': arguments.inputs_length,
    'decoder': arguments.targets_length,
  }

  def draw():
    return {
      name: words.draw(rng, (arguments.batch_size, length))
      for name, length in lengths.items()
    }

  ladder = batch_plans.profile_ladder(
    [draw() for _ in range(_NUM_TRIALS)],
    num_experts,
    num_microbatches=arguments.num_microbatches,
  )
  planner = batch_plans.Planner(
    ladder, num_experts, num_microbatches=arguments.num_microbatches
  )
  planner(draw())
  times = []
  for _ in range(arguments.repeats):
    batch = draw()
    start = time.perf_counter()
    plan = planner(batch)
    times.append(time.perf_counter() - start)
  num_tokens = arguments.batch_size * sum(lengths.values())
  present = sum(int((e < num_experts).sum()) for e in plan.updates.experts)
  median = statistics.median(times)
  print(
    f'{num_experts} experts: median {1e3 * median:.1f} ms, shortest '
    f'{1e3 * min(times):.1f}, {num_tokens / median / 1e6:.2f} million '
    f'tokens/s, {present} experts present, profiles used '
    f'{planner.profiles_used}'
  )
  return num_tokens / median


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--experts', type=int, nargs='+', default=[32_768, 1_048_576]
  )
  parser.add_argument('--num_skipped', type=int, default=16)
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--inputs_length', type=int, default=512)
  parser.add_argument('--targets_length', type=int, default=114)
  parser.add_argument('--num_microbatches', type=int, default=1)
  parser.add_argument('--repeats', type=int, default=30)
  arguments = parser.parse_args()
  slowest = min(rate(arguments, number) for number in arguments.experts)
  print(f'tokens_per_second={slowest:.0f}')


if __name__ == '__main__':
  main()
