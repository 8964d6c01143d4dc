"""Times one feed-forward of experts against the dense one.

  python -m benchmarks.moe_feed_forward

What is timed are values and gradients of all parameters and of the tokens, with
dropout, in dropless layers. Experts are 1/k as wide as the dense layer, so that
a token costs the same. All tokens are one sequence, which shares a mask of
dropout. Tokens have some of one direction in common, as they have in a model,
so that loads differ; with much of it a few experts have them all. All layers
take turns for each number of tokens. Ratios are of the shortest times.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks import dense_step, kept_memory
from mowe.layers import feed_forward
from mowe.layers.dispatch import sorted_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose


def make_step(name: str, layer, tokens: jax.Array) -> tuple:
  """Returns (compiled step, parameters, further arguments)."""
  params = jax.jit(layer.init)(jax.random.key(0), tokens)['params']

  def loss(params, tokens):
    outputs, _ = layer.apply(
      {'params': params},
      tokens,
      deterministic=False,
      rngs={'dropout': jax.random.key(1), 'jitter': jax.random.key(2)},
      mutable=['router_stats'],
    )
    return jnp.sum(jnp.square(outputs))

  def step(params, tokens):
    grads, d_tokens = jax.grad(loss, (0, 1))(params, tokens)
    # Parameters are not updated, because the loads of others would not be those
    # that are reported.
    return params, (grads, d_tokens)

  others = (tokens,)
  compiled = dense_step.compile_step(name, step, params, *others)
  return compiled, params, others


def fraction_beyond_share(layer: moe.MoeLayer, params, tokens) -> float:
  """Returns the fraction of choices in tiles, not in the common batch."""
  _, collected = layer.apply({'params': params}, tokens, mutable='router_stats')
  load = collected['router_stats']['stats'].load
  total = int(load.sum())
  share = sorted_experts.batched_share(total, layer.num_experts)
  return float(jnp.maximum(load - share, 0).sum()) / total


def parse() -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tokens', type=int, nargs='+', default=[16384, 3648])
  parser.add_argument('--experts', type=int, nargs='+', default=[8, 16])
  parser.add_argument('--choices', type=int, nargs='+', default=[1, 2])
  parser.add_argument('--emb_dim', type=int, default=512)
  parser.add_argument('--mlp_dim', type=int, default=1024)
  parser.add_argument('--dropout_rate', type=float, default=0.1)
  parser.add_argument('--common', type=float, default=0.05)
  parser.add_argument('--repeats', type=int, default=11)
  return parser.parse_args()


def main() -> None:
  arguments = parse()
  kept_memory.keep()
  sizes = {
    'activations': ('gelu', 'linear'),
    'dropout_rate': arguments.dropout_rate,
  }
  for num_tokens in arguments.tokens:
    own, common = jax.random.split(jax.random.key(3))
    shape = (1, num_tokens, arguments.emb_dim)
    tokens = jax.random.normal(own, shape)
    tokens += arguments.common * jax.random.normal(common, shape[2:])
    dense = feed_forward.DenseFeedForward(arguments.mlp_dim, **sizes)
    steps = {'dense': make_step('dense', dense, tokens)}
    beyond = {}
    for num_experts in arguments.experts:
      for k in arguments.choices:
        layer = moe.MoeLayer(
          num_experts,
          arguments.mlp_dim // k,
          routing=tokens_choose.TokensChoose(k=k),
          **sizes,
        )
        name = f'{k} of {num_experts} experts'
        steps[name] = make_step(name, layer, tokens)
        beyond[name] = fraction_beyond_share(layer, steps[name][1], tokens)
    times = dense_step.take_turns(steps, arguments.repeats)
    dense_step.report_times(times)
    for name, fraction in beyond.items():
      print(
        f'{num_tokens} tokens, {name}: {min(times[name]) / min(times["dense"]):.3f} '
        f'of dense, {fraction:.1%} of the choices in tiles',
        flush=True,
      )


if __name__ == '__main__':
  main()
