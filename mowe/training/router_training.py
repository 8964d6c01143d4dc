"""What routers add to a step: losses, metrics, and their balancing bias.

Each layer with a router sows sums and counts, `router_losses.RouterStats`, into
a collection of the model. All means over layers and tokens are formed here.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp

from mowe.layers.routers import router_base, router_losses
from mowe.models import model_config
from mowe.training.train_metrics import Mean

# Path of a layer, which begins with its stream -> what its router counted.
LayerStats = dict[tuple[str, ...], router_losses.RouterStats]


@dataclasses.dataclass(frozen=True)
class RouterLossConfig:
  """Coefficients of the routers' losses.

  `load_balance`, `z_loss`, `importance` and `takeover` multiply means over
  routers and tokens. The others multiply losses that are added up over all
  routers, those of attention among them, as in the papers they are from.

  Attributes:
    load_balance: coefficient of the load-balancing loss, which is 1 at perfect
      balance.
    z_loss: coefficient of the squared log-sum-exp of a router's logits.
    importance: coefficient of the squared variation of the experts' total
      probability.
    entropy: coefficient of the negative entropy of the experts' mean
      probability, as in sigma-MoE, where it is 0.001 or less. With microbatches
      the mean probability is over the tokens of each microbatch.
    mutual_information: coefficient of the negative mutual information of tokens
      and experts, as in ModuleFormer; 0.0002 to 0.0006 in the models of
      arXiv 2404.05567.
    load_concentration: coefficient of the entropy of the experts' mean
      probability, with which a task crowds into few modules, as in
      ModuleFormer's finetuning. It is the opposite of `entropy`.
    takeover: coefficient of -log of the probability that old modules keep
      beside those that were added.
  """

  load_balance: float = 0.01
  z_loss: float = 0.0
  importance: float = 0.0
  entropy: float = 0.0
  mutual_information: float = 0.0
  load_concentration: float = 0.0
  takeover: float = 0.0


def layer_stats(variables: Any) -> LayerStats:
  """Stats by the path of their layer, from the collections of the model."""
  sown = variables.get(router_losses.COLLECTION, {})
  flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(sown))
  return {path[:-1]: stats for path, stats in flat.items()}


def loss(
  stats: LayerStats, config: RouterLossConfig, *, shares: dict[str, jax.Array]
) -> jax.Array:
  """The weighted losses of all layers, <float32>[]; see `RouterLossConfig`.

  Args:
    stats: what the routers counted in one microbatch.
    config: the coefficients.
    shares: stream -> <float32>[], the share of this microbatch in the stream's
      tokens of the batch. With these weights the losses of microbatches add up
      to the mean over the batch.
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
  """Every metric of every layer, named as `encoder/layers_1/mlp/load` is."""
  return {
    '/'.join((*path, name)): Mean(*mean)
    for path, one in stats.items()
    for name, mean in router_losses.metrics(one).items()
  }


def balance(
  params: Any,
  old_params: Any,
  *,
  stats: LayerStats,
  config: model_config.ModelConfig,
) -> Any:
  """`params` with the next selection bias of every router that has one.

  Args:
    params: the parameters after the optimizer, which knows nothing of these
      biases.
    old_params: the parameters before the optimizer.
    stats: what the routers counted in the whole batch.
    config: the config of the model, whose layers know the rate of the bias.
  """
  flat = flax.traverse_util.flatten_dict(params)
  old = flax.traverse_util.flatten_dict(old_params)
  for path, one in stats.items():
    name = (*path, 'router', router_base.SELECTION_BIAS)
    if name in flat:
      attention = config.attentions().get(path[-1])
      layer = attention or config.sparse_layers()[path[0]]
      flat[name] = router_losses.balanced_bias(
        old[name], one, layer.routing.bias_rate
      )
  return flax.traverse_util.unflatten_dict(flat)
