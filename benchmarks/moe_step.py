"""Times training steps of mixtures of experts against dense and flaxformer.

  python -m benchmarks.moe_step --flaxformer_path=FOLDER

All contenders are the same T5 but for every second feed-forward: dense; our
MoeLayer, dropless; or flaxformer's MoeLayer, whose clone the path names (its
optional dependency aqt need not be installed). Switch experts are as wide as
the dense layer, top-2 experts half as wide, so that a token costs the same.
flaxformer's capacity does not grow with k: its factor is 1.25 for Switch and
2.5 for top-2, which is 1.25 slots for each choice in both. Its auxiliary losses
are left out of its step. Steps take turns within each number of experts, and a
ratio is the median over the rounds, because the speed of the machine drifts.

Sequences are as long as T5's (512 and 114 tokens), a quarter as many as in its
batch. Fewer tokens make experts costlier, whose kernels are read and updated for
less, and flaxformer cheaper: it has as many groups as experts, or more, and its
masks are as large as tokens times tokens of a group.
"""

import argparse
import importlib
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks import dense_step, kept_memory
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.models import parameters
from mowe.models.t5 import t5, t5_config
from mowe.training import partitioning, train_state, training_step
from mowe.training.optimization import optimizers

_LEARNING_RATE = 1e-3
_CHOICES = {'switch': 1, 'top2': 2}


def our_layer(num_experts: int, k: int, width: int) -> Callable:
  """Returns a factory of our layer."""
  return lambda **given: moe.MoeLayer(
    num_experts, width, routing=tokens_choose.TokensChoose(k=k), **given
  )


def flaxformer_layer(num_experts: int, k: int, width: int) -> Callable:
  """Returns a factory of flaxformer's layer, with its masked router."""
  for name in ('', '.jax_legacy', '.jax_legacy.jax'):
    # flaxformer imports quantised layers, which are not used here.
    sys.modules.setdefault(f'aqt{name}', mock.MagicMock())
  layers = importlib.import_module('flaxformer.architectures.moe.moe_layers')
  routing = importlib.import_module('flaxformer.architectures.moe.routing')
  dense = importlib.import_module('flaxformer.components.dense')

  class FeedForward(nn.Module):
    """flaxformer's layer behind our call."""

    dropout_rate: float
    dtype: jnp.dtype
    reads_token_ids = True

    @nn.compact
    def __call__(self, tokens, routing_ids=None, *, deterministic=True):
      del routing_ids
      router = routing.TokensChooseMaskedRouter(
        router_weights=routing.RouterWeights(use_bias=False, dtype=jnp.float32),
        jitter_noise=0.0,
        num_selected_experts=k,
        batch_prioritized_routing=False,
        ignore_padding_tokens=False,
        dtype=self.dtype,
      )
      return layers.MoeLayer(
        num_experts=num_experts,
        max_group_size=4096,
        train_capacity_factor=1.25 * k,
        eval_capacity_factor=2.0 * k,
        expert=dense.MlpBlock(
          use_bias=False,
          intermediate_dim=width,
          activations=('gelu', 'linear'),
          intermediate_dropout_rate=self.dropout_rate,
          final_dropout_rate=0.0,
        ),
        router=router,
        num_expert_partitions=num_experts,
        num_model_partitions=1,
        dtype=self.dtype,
      )(tokens, enable_dropout=not deterministic)

  return lambda **given: FeedForward(**given)


def make_step(
  arguments: argparse.Namespace, name: str, layer: Callable | None, batch: dict
) -> tuple:
  """Returns (compiled step, state, further arguments); no layer: dense."""
  odd = tuple(range(1, arguments.num_layers, 2))
  parts = {}
  if layer is not None:
    parts = {
      'sparse_feed_forward': layer,
      'sparse_encoder_layers': odd,
      'sparse_decoder_layers': odd,
    }
  model = t5.T5(t5_config.T5Config(**dense_step.sizes(arguments), **parts))
  variables = jax.eval_shape(
    lambda: parameters.initial_variables(model, jax.random.key(0))
  )
  axes = partitioning.parameter_axes(variables['params_axes'])
  optimizer = optimizers.Adafactor(_LEARNING_RATE).build(nested(axes))
  state = jax.jit(
    lambda key: train_state.create(
      model, key, optimizer=optimizer, row_optimizer=None
    )
  )(jax.random.key(0))
  function = training_step.make_train_step(
    model,
    optimizer=optimizer,
    row_optimizer=None,
    loss=training_step.LossConfig(),
    seed=0,
  )
  others = ({}, batch, None)
  compiled = dense_step.compile_step(name, function, state, *others)
  return compiled, state, others


def nested(axes: dict) -> dict:
  """Turns axes by path into the tree of the parameters."""
  tree: dict = {}
  for path, names in axes.items():
    branch = tree
    for part in path[:-1]:
      branch = branch.setdefault(part, {})
    branch[path[-1]] = names
  return tree


def compare(
  arguments: argparse.Namespace, num_experts: int, batch: dict
) -> dict[str, list[float]]:
  """Returns the seconds of each contender in each round."""
  steps = {'dense': make_step(arguments, 'dense', None, batch)}
  for kind, k in _CHOICES.items():
    for owner, layer in (('ours', our_layer), ('flaxformer', flaxformer_layer)):
      if owner == 'flaxformer' and not arguments.flaxformer_path:
        continue
      name = f'{owner} {kind}'
      factory = layer(num_experts, k, arguments.mlp_dim // k)
      label = f'{name}, {num_experts} experts'
      steps[name] = make_step(arguments, label, factory, batch)
  times = dense_step.take_turns(steps, arguments.repeats)
  dense_step.report_times(times)
  return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
  """Returns the median ratio of our times to theirs over the rounds."""
  return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns the settings."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--flaxformer_path', help='a clone; without it, not run')
  parser.add_argument('--experts', type=int, nargs='+', default=[8, 16])
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--inputs_length', type=int, default=512)
  parser.add_argument('--targets_length', type=int, default=114)
  parser.add_argument('--vocab_size', type=int, default=32_128)
  parser.add_argument('--emb_dim', type=int, default=512)
  parser.add_argument('--num_heads', type=int, default=6)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--mlp_dim', type=int, default=1024)
  parser.add_argument('--num_layers', type=int, default=4)
  parser.add_argument('--dropout_rate', type=float, default=0.1)
  parser.add_argument('--repeats', type=int, default=5)
  return parser.parse_args(argv)


def main() -> None:
  arguments = parse()
  kept_memory.keep()
  if arguments.flaxformer_path:
    sys.path.insert(0, os.path.abspath(arguments.flaxformer_path))
  batch = dense_step.make_batch(
    arguments.batch_size,
    arguments.inputs_length,
    arguments.targets_length,
    arguments.vocab_size,
  )
  worst = {'dense': [], 'flaxformer': []}
  for num_experts in arguments.experts:
    times = compare(arguments, num_experts, batch)
    for kind in _CHOICES:
      ours = times[f'ours {kind}']
      ratios = {'dense': median_ratio(ours, times['dense'])}
      if arguments.flaxformer_path:
        ratios['flaxformer'] = median_ratio(ours, times[f'flaxformer {kind}'])
      shown = ', '.join(f'{r:.3f} of {name}' for name, r in ratios.items())
      print(f'{num_experts} experts, {kind}: {shown}', flush=True)
      for name, ratio in ratios.items():
        worst[name].append(ratio)
  # The last line is the worst over kinds and numbers of experts.
  print(
    ' '.join(f'ratio_{name}={max(r):.3f}' for name, r in worst.items() if r)
  )


if __name__ == '__main__':
  main()
