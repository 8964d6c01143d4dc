"""Times attention of k out of N modules against one with all their heads.

  python -m benchmarks.mixture_of_heads

Each is one causal self-attention layer with stick-breaking. What is timed are
values and gradients of all parameters and of the input. The dense layer has the
heads of all modules, each with its own keys and values; the mixture has one set
of keys and values for all. Both take turns. The last line is the mixture's time
over the dense one's; k / N of the dense time would be proportional.
"""

import argparse
import statistics

from benchmarks import dense_step, stick_breaking
from mowe.layers.attention import stick_breaking as layers
from mowe.layers.mixtures import mixture_of_heads
from mowe.layers.routers import tokens_choose


def parse() -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch_size', type=int, default=4)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--emb_dim', type=int, default=512)
  parser.add_argument('--num_modules', type=int, default=16)
  parser.add_argument('--choices', type=int, default=2)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=10)
  return parser.parse_args()


def main() -> None:
  arguments = parse()
  dense = layers.StickBreakingAttention(
    num_heads=arguments.num_modules, head_dim=arguments.head_dim
  )
  mixture = mixture_of_heads.MixtureOfSelfAttentionHeads(
    num_heads=1,
    head_dim=arguments.head_dim,
    num_experts=arguments.num_modules,
    routing=tokens_choose.TokensChoose(arguments.choices),
  )
  steps = {
    'dense': stick_breaking.make_step(dense, arguments),
    'mixture': stick_breaking.make_step(mixture, arguments),
  }
  times = dense_step.take_turns(steps, arguments.repeats)
  dense_step.report_times(times)
  median = {name: statistics.median(values) for name, values in times.items()}
  print(f'k/N={arguments.choices / arguments.num_modules:.3f}')
  print(f'ratio={median["mixture"] / median["dense"]:.3f}')


if __name__ == '__main__':
  main()
