"""What routers add to a step: losses, metrics, and their balancing bias.

Layers with a router sow `router_losses.RouterStats`. Here alone they are summed
and divided.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from mowe.layers.routers import router_losses, routing
from mowe.models import model_config
from mowe.training.train_metrics import Mean

# Path of a layer -> its stats.
LayerStats = dict[tuple[str, ...], router_losses.RouterStats]


@dataclasses.dataclass(frozen=True)
class RouterLossConfig:
  """Coefficients of the routers' losses.

  The first three and the last are means over routers and tokens; all others are
  added up over routers, those of attention among them.

  Attributes:
    load_balance: of the loss that is 1 at perfect balance.
    z_loss: of the squared log-sum-exp of the router's logits.
    importance: of the squared variation of the experts' total probability.
    entropy: of the negative entropy of the experts' mean probability. It is
      added up over layers, as in sigma-MoE, where it is 0.001 or less; with
      microbatches the mean is over the tokens of each.
    mutual_information: of the negative mutual information of tokens and
      experts, added up likewise, as in ModuleFormer: 0.0002 to 0.0006 in the
      models of arXiv 2404.05567.
    load_concentration: of the entropy of the experts' mean probability, added
      up likewise: a task then crowds into few modules, as in ModuleFormer's
      finetuning. It is the opposite of `entropy`.
    takeover: of the probability that modules that were added take from old
      ones, as -log of what old ones keep; a mean over layers and tokens.
  """

  load_balance: float = 0.01
  z_loss: float = 0.0
  importance: float = 0.0
  entropy: float = 0.0
  mutual_information: float = 0.0
  load_concentration: float = 0.0
  takeover: float = 0.0


def layer_stats(variables: Any) -> LayerStats:
  """Stats by layer, from what the model left in its collections."""
  sown = variables.get(router_losses.COLLECTION, {})
  flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(sown))
  return {path[:-1]: stats for path, stats in flat.items()}


def loss(
  stats: LayerStats, config: RouterLossConfig, shares: dict[str, jax.Array]
) -> jax.Array:
  """The weighted losses of all layers; see `RouterLossConfig`.

  Args:
    stats: of one microbatch.
    config: coefficients.
    shares: `encoder`, `decoder` -> this microbatch's share of the tokens of
      the batch: with them microbatches add up to the mean over the batch.
  """
  total = jnp.zeros(())
  regularizer = jnp.zeros(())
  for path, one in stats.items():
    means = {
      name: value / jnp.maximum(count, 1)
      for name, (value, count) in router_losses.losses(one).items()
    }
    total += shares[path[0]] * (
      config.load_balance * means['load_balance_loss']
      + config.z_loss * means['router_z_loss']
      + config.importance * means['importance_loss']
      + config.takeover * means['takeover_loss']
    )
    regularizer += shares[path[0]] * (
      config.entropy * means['entropy_regularizer']
      + config.mutual_information * means['mutual_information_loss']
      + config.load_concentration * means['load_concentration_loss']
    )
  return total / max(1, len(stats)) + regularizer


def metrics(stats: LayerStats) -> dict[str, Mean]:
  """Every metric of every layer, as `encoder/layers_1/mlp/load`."""
  return {
    '/'.join((*path, name)): Mean(*mean)
    for path, one in stats.items()
    for name, mean in router_losses.metrics(one).items()
  }


def balance(
  params: Any,
  old_params: Any,
  stats: LayerStats,
  config: model_config.ModelConfig,
) -> Any:
  """`params` with the next selection bias of every router that has one.

  Args:
    params: after the optimizer, which knows nothing of these biases.
    old_params: before it.
    stats: of the whole batch.
    config: of the model; its layers know the rate.
  """
  flat = flax.traverse_util.flatten_dict(params)
  old = flax.traverse_util.flatten_dict(old_params)
  for path, one in stats.items():
    name = (*path, 'router', routing.SELECTION_BIAS)
    if name in flat:
      attention = config.attentions().get(path[-1])
      layer = attention or config.sparse_layers()[path[0]]
      flat[name] = router_losses.balanced_bias(
        old[name], one, layer.routing.bias_rate
      )
  return flax.traverse_util.unflatten_dict(flat)
