"""Times a train step of stick-breaking attention against softmax attention.

  python -m benchmarks.stick_breaking

Each is one self-attention layer with the same projections, without positions.
What is timed are values and gradients of all parameters and of the input.
Softmax attention keeps its weights for the backward pass; stick-breaking
attention computes its weights again, a block of queries at a time.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import dense_step
from mowe.layers.attention import self_attention, stick_breaking


def make_step(layer, arguments: argparse.Namespace):
  """Returns (compiled step, parameters, further arguments)."""
  length = arguments.length
  tokens = jax.random.normal(
    jax.random.key(0), (arguments.batch_size, length, arguments.emb_dim)
  )
  places = np.arange(length)
  positions = self_attention.Positions(places, places)
  mask = jnp.asarray(places[None, :] <= places[:, None])[None, None]
  mask = jnp.broadcast_to(mask, (arguments.batch_size, 1, length, length))
  apply = functools.partial(layer.apply, positions=positions)
  params = layer.init(
    jax.random.key(1), tokens, tokens, positions=positions, mask=mask
  )['params']

  def loss(params, tokens, mask):
    return (apply({'params': params}, tokens, tokens, mask=mask) ** 2).sum()

  def step(params, tokens, mask):
    grads, d_tokens = jax.grad(loss, argnums=(0, 1))(params, tokens, mask)
    # Parameters are updated as by an optimizer, so that all gradients are used.
    return jax.tree.map(lambda p, g: p - 1e-9 * g, params, grads), d_tokens

  compiled = jax.jit(step).lower(params, tokens, mask).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
  print(f'{type(layer).__name__}: {memory:.1f} MiB of temporaries')
  return compiled, params, (tokens, mask)


def parse() -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--emb_dim', type=int, default=512)
  parser.add_argument('--num_heads', type=int, default=8)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=20)
  return parser.parse_args()


def main() -> None:
  arguments = parse()
  sizes = {
    'num_heads': arguments.num_heads,
    'head_dim': arguments.head_dim,
  }
  steps = {
    'softmax': make_step(self_attention.SelfAttention(**sizes), arguments),
    'stick': make_step(
      stick_breaking.StickBreakingAttention(**sizes), arguments
    ),
  }
  times = dense_step.take_turns(steps, arguments.repeats)
  dense_step.report_times(times)
  median = {name: statistics.median(values) for name, values in times.items()}
  print(f'ratio={median["stick"] / median["softmax"]:.3f}')


if __name__ == '__main__':
  main()
