"""Times a sigma-MoE block against the dense block of equal parameters.

  python -m benchmarks.sigma_moe_block

For each K, the number of experts of a token out of N_E, it times a forward pass
and a step (forward, gradients of all parameters and of the tokens, and plain
gradient descent). Both blocks have ReLU and no bias; the dense one has all
hidden units of all experts. Dense and sparse take turns. Memory is what the
compiled step needs besides its arguments and results. The last line is the
largest of the two ratios for the smallest K.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from benchmarks import kept_memory
from mowe.layers import feed_forward
from mowe.layers.mixtures import sigma_moe
from mowe.layers.routers import tokens_choose

_LEARNING_RATE = 1e-3


def make_layers(arguments: argparse.Namespace) -> dict:
  """Returns the dense block, and one of sigma-MoE for each K."""
  hidden = arguments.num_experts * arguments.expert_dim
  layers = {'dense': feed_forward.DenseFeedForward(hidden, ('relu',))}
  for k in arguments.choices:
    layers[k] = sigma_moe.SigmaMoe(
      arguments.num_experts,
      arguments.expert_dim,
      routing=tokens_choose.TokensChoose(k, sigmoid=True),
    )
  return layers


def compile_block(layer: Callable, tokens: jax.Array) -> dict:
  """Compiles forward pass and step; returns arguments and memory, too."""
  params = layer.init(jax.random.key(0), tokens)['params']

  def forward(params, tokens):
    return layer.apply({'params': params}, tokens)

  def step(params, tokens):
    # The loss is the mean square, because its cotangent is not constant.
    loss = lambda *args: jnp.mean(jnp.square(forward(*args)))
    grads, d_tokens = jax.grad(loss, (0, 1))(params, tokens)
    update = lambda w, grad: w - _LEARNING_RATE * grad
    return jax.tree.map(update, params, grads), d_tokens

  kept = jax.eval_shape(
    lambda *args: jax.vjp(forward, *args)[1], params, tokens
  )
  arguments = jax.tree.leaves((params, tokens))
  block = {'params': params, 'kept': num_bytes(kept) - num_bytes(arguments)}
  for name, function in (('forward', forward), ('step', step)):
    compiled = jax.jit(function).lower(params, tokens).compile()
    block[name] = compiled
    block[f'{name} memory'] = compiled.memory_analysis().temp_size_in_bytes
  return block


def num_bytes(tree: object) -> int:
  """Returns the bytes of all arrays of a tree."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def take_turns(
  blocks: dict, name: str, tokens: jax.Array, repeats: int
) -> dict[object, float]:
  """Returns the median seconds of each block."""
  times = {key: [] for key in blocks}
  for number in range(repeats + 1):
    for key, block in blocks.items():
      start = time.perf_counter()
      jax.block_until_ready(block[name](block['params'], tokens))
      # The first run of each block warms up.
      if number:
        times[key].append(time.perf_counter() - start)
  return {key: statistics.median(values) for key, values in times.items()}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num_experts', type=int, default=32)
  parser.add_argument('--expert_dim', type=int, default=128)
  parser.add_argument('--choices', type=int, nargs='+', default=[4, 8])
  parser.add_argument('--emb_dim', type=int, default=512)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=7)
  return parser.parse_args(argv)


def main() -> None:
  arguments = parse()
  kept_memory.keep()
  shape = (arguments.batch_size, arguments.length, arguments.emb_dim)
  tokens = jax.random.normal(jax.random.key(1), shape)
  blocks = {}
  for key, layer in make_layers(arguments).items():
    blocks[key] = compile_block(layer, tokens)
    size = sum(x.size for x in jax.tree.leaves(blocks[key]['params']))
    shown = 'dense' if key == 'dense' else f'{key} of {arguments.num_experts}'
    memory = ', '.join(
      f'{name} {blocks[key][f"{name} memory"] / 2**20:.0f} MiB'
      for name in ('forward', 'step')
    )
    kept = f'kept for the gradient: {blocks[key]["kept"] / 2**20:.0f} MiB'
    print(f'{shown}: {size:,} parameters; temporaries: {memory}; {kept}')
  ratios = {k: [] for k in arguments.choices}
  for name in ('forward', 'step'):
    times = take_turns(blocks, name, tokens, arguments.repeats)
    for k in arguments.choices:
      ratios[k].append(times[k] / times['dense'])
      print(
        f'{name}, {k} of {arguments.num_experts}: {1e3 * times[k]:.1f} ms, '
        f'dense {1e3 * times["dense"]:.1f} ms, ratio {ratios[k][-1]:.3f}',
        flush=True,
      )
  print(f'ratio={max(ratios[min(arguments.choices)]):.3f}')


if __name__ == '__main__':
  main()
