"""One training step: differentiate, update, experts in place."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mowe.layers.memory import word_experts
from mowe.layers.routers import router_losses
from mowe.models import model_config, parameters
from mowe.training import losses, router_training, train_state
from mowe.training.optimization import (
  row_optimizers,
  sharded_updates,
  table_updates,
)
from mowe.training.train_metrics import Mean
from mowe.words import sharded_plan

Metrics = dict[str, Mean]
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimised.

  Attributes:
    label_smoothing: probability mass of all wrong tokens together.
    z_loss: coefficient of log(Z)^2.
    router: coefficients of the losses of learned routers.
  """

  label_smoothing: float = 0.0
  z_loss: float = 1e-4
  router: router_training.RouterLossConfig = router_training.RouterLossConfig()


def make_train_step(
  model: nn.Module,
  *,
  optimizer: optax.GradientTransformation,
  row_optimizer: row_optimizers.RowOptimizer | None,
  loss: LossConfig,
  seed: int,
  num_microbatches: int = 1,
) -> Callable[..., tuple[train_state.TrainState, Metrics]]:
  """The step `(state, frozen, batch, plan) -> (state, metrics)`.

  The loss is the mean over the target tokens of the whole batch: the sum
  of each part is divided by the tokens of the whole batch, so that the number
  of microbatches changes nothing but memory.

  Args:
    model: the model.
    optimizer: of the ordinary parameters.
    row_optimizer: of the planned rows of expert tables; None: frozen.
    loss: what is minimised.
    seed: of dropout; the stream of a step depends on (seed, step) alone.
    num_microbatches: parts that are computed one after another.

  Returns:
    A function to be jitted with the state donated. `frozen` holds the tables
    when they are frozen (they must not be outputs: they would be copied), else
    it is {}. `plan` is None for a model without word experts.
  """

  def train_step(state, frozen, batch, plan):
    tables = state.tables or frozen
    num_tokens = jnp.maximum(jnp.sum(batch['decoder_loss_weights']), 1.0)
    num_real = _num_real_tokens(batch)

    def part_of_mean_loss(trained, batch, streams, key):
      params, factors = trained
      total, metrics, stats, memory = _summed_loss(
        model, loss, params, tables, factors, batch, streams, key
      )
      shares = jax.tree.map(jnp.divide, _num_real_tokens(batch), num_real)
      # Here rather than in the gradients: one number instead of all of them.
      total = total / num_tokens
      total += router_training.loss(stats, loss.router, shares)
      return total, ((metrics, stats), memory)

    def gradients(batch, streams, key):
      """What is summed: gradients and counts; what is kept of each part.

      Kept are factors of the gradients of tables, and the memory.
      """
      factors = {}
      if state.tables:
        factors = _zero_factors(model, state.params, tables, batch, streams)
      (grads, factors), (counted, memory) = jax.grad(
        part_of_mean_loss, has_aux=True
      )((state.params, factors), batch, streams, key)
      return (grads, counted), (factors, memory)

    if model.config.memory_length:
      memory = _without_past(state.memory, batch.get('decoder_begins_part'))
      batch = batch | {model_config.MEMORY: memory}
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    streams = _streams(plan)
    if num_microbatches == 1:
      (grads, counted), (factors, memory) = gradients(batch, streams, key)
    else:
      (grads, counted), (factors, memory) = _accumulate(
        gradients, batch, streams, key, num_microbatches
      )
      memory = jax.tree.map(_joined, memory)
    metrics, stats = counted
    metrics |= router_training.metrics(stats)

    metrics['gradient_norm'] = Mean(_global_norm(grads), jnp.ones(()))
    # Also a dependency: the backward pass reads the tables, and would be given
    # a copy of them if it could end after they change.
    usable = jnp.isfinite(metrics['gradient_norm'].total)
    if state.tables:
      bound = table_updates.gradient_bound(factors)
      metrics['expert_gradient_bound'] = Mean(bound, jnp.ones(()))
      usable &= jnp.isfinite(bound)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = router_training.balance(
      optax.apply_updates(state.params, updates),
      state.params,
      stats,
      model.config,
    )
    is_sharded = isinstance(plan, sharded_plan.ShardedPlan)
    updates_of = sharded_updates if is_sharded else table_updates
    new_tables, table_state = {}, {}
    by_table = parameters.by_table(factors, state.tables)
    for number, (name, of_layers) in enumerate(by_table.items()):
      new_tables[name], table_state[name] = updates_of.update_table(
        row_optimizer,
        state.tables[name],
        state.table_state[name],
        of_layers,
        plan,
        usable,
        state.step,
        # Beyond those of the microbatches.
        jax.random.fold_in(key, num_microbatches + number),
      )
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      tables=new_tables,
      table_state=table_state,
      **({'memory': memory} if model.config.memory_length else {}),
    )
    return state, metrics

  return train_step


def make_eval_step(
  model: nn.Module, loss: LossConfig
) -> Callable[..., Metrics]:
  """The step `(params, tables, batch, plan) -> metrics`, without dropout."""

  def eval_step(params, tables, batch, plan):
    _, metrics, stats, _ = _summed_loss(
      model, loss, params, tables, {}, batch, _streams(plan), None
    )
    return metrics | router_training.metrics(stats)

  return eval_step


def _apply(model, params, tables, factors, batch, streams, key, mutable):
  return model.apply(
    {
      'params': parameters.merge_tables(params, tables),
      word_experts.FACTORS: factors,
      **{name: batch[name] for name in _CARRIED if name in batch},
    },
    batch | streams,
    enable_dropout=key is not None,
    rngs=None if key is None else {'dropout': key},
    method='of_batch',
    mutable=mutable,
  )


def _zero_factors(model, params, tables, batch, streams):
  """Zeros in the shapes of what every product with an expert table leaves."""
  _, variables = jax.eval_shape(
    lambda: _apply(
      model,
      params,
      tables,
      {},
      batch,
      streams,
      None,
      mutable=[word_experts.FACTORS],
    )
  )
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), variables[word_experts.FACTORS]
  )


def _summed_loss(model, loss, params, tables, factors, batch, streams, key):
  """Sum over target tokens, metrics, stats of routers, and the next memory.

  Metrics are sums and counts.
  """
  targets = batch['decoder_target_tokens']
  weights = batch['decoder_loss_weights']
  logits, variables = _apply(
    model,
    params,
    tables,
    factors,
    batch,
    streams,
    key,
    mutable=[router_losses.COLLECTION, *_CARRIED],
  )
  stats = router_training.layer_stats(variables)
  entropy, z_loss = losses.cross_entropy(
    logits,
    targets,
    label_smoothing=loss.label_smoothing,
    z_loss=loss.z_loss,
  )
  num_tokens = jnp.sum(weights)
  right = losses.is_right(logits, targets).astype(jnp.float32)
  summed = lambda values: Mean(jnp.sum(values * weights), num_tokens)
  metrics = {
    'loss': summed(entropy),
    'z_loss': summed(z_loss),
    'accuracy': summed(right),
  }
  metrics |= routing_metrics(model, batch)
  total = jnp.sum((entropy + z_loss) * weights)
  return total, metrics, stats, variables.get(model_config.MEMORY, {})


def _num_real_tokens(batch):
  names = {
    'encoder': 'encoder_input_tokens',
    'decoder': 'decoder_target_tokens',
  }
  return {
    stream: jnp.maximum(jnp.sum(batch[name] > 0), 1)
    for stream, name in names.items()
    if name in batch
  }


def routing_metrics(model: nn.Module, batch: Batch) -> Metrics:
  """Shares of tokens that had an expert: routed + skipped + padding = all.

  Of the streams that have routing ids in the batch.
  """
  metrics = {}
  for stream in ('encoder', 'decoder'):
    ids = batch.get(f'{stream}_routing_ids')
    if ids is None or model.config.routing is None:
      continue
    num_experts = model.config.routing.num_experts
    total = jnp.asarray(ids.size, jnp.float32)
    share = lambda which, total=total: Mean(
      jnp.sum(which.astype(jnp.float32)), total
    )
    metrics[f'{stream}_routed'] = share((ids >= 0) & (ids < num_experts))
    metrics[f'{stream}_skipped'] = share(ids >= num_experts)
    metrics[f'{stream}_padding'] = share(ids < 0)
  return metrics


# Collections that a batch brings with it, its rows on the first axis.
_CARRIED = (model_config.MEMORY,)


def _joined(parts):
  """[parts, batch / parts, ...] -> [batch, ...], the inverse of the cut."""
  return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def _without_past(memory, begins):
  """The memory, empty in rows of which the batch says that they begin anew."""
  if begins is None:
    return memory

  def cleared(leaf):
    rows = begins.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(rows, jnp.zeros_like(leaf), leaf)

  return jax.tree.map(cleared, memory)


def _streams(plan):
  if plan is None:
    return {}
  return {
    f'{name}_plan': stream
    for name in ('encoder', 'decoder')
    if (stream := getattr(plan, name)) is not None
  }


def _global_norm(tree):
  # Products rather than squares: no squared copy of a gradient is written.
  return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)))


def _accumulate(gradients, batch, streams, key, num_microbatches):
  """Adds up gradients and metrics of the parts; stacks what is kept."""
  # [batch, ...] -> [parts, batch / parts, ...]; plans are already cut.
  # Every part takes rows from all over the batch, so from every device.
  cut = lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
  parts = (jax.tree.map(cut, batch), streams, jnp.arange(num_microbatches))

  def one(part):
    batch, streams, number = part
    return gradients(batch, streams, jax.random.fold_in(key, number))

  def add(total, part):
    summed, kept = one(part)
    return jax.tree.map(jnp.add, total, summed), kept

  first, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  return jax.lax.scan(add, zeros, parts)
