"""One training step: differentiate, update parameters, update experts in place.

`make_train_step` returns the step. Inside of it a *pass* is one application of
the model to a batch, or to one microbatch of it: `_part_gradients` does the
pass and differentiates it, `_batch_gradients` adds up the microbatches, and
`_apply_gradients` updates the state.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mowe.layers.memory import row_table, word_experts
from mowe.layers.routers import router_losses
from mowe.models import model_config, parameters
from mowe.training import loss_spikes, losses, router_training, train_state
from mowe.training.optimization import (
  memory_rows,
  row_optimizers,
  sharded_updates,
  table_updates,
)
from mowe.training.train_metrics import Mean
from mowe.words import base_vocabulary
from mowe.words.plans import batch_plans, sharded_plan, step_plans

Metrics = dict[str, Mean]
Batch = dict[str, jax.Array]
# Collections of the model that travel in the batch, under their own names. The
# first axis of each of their arrays is that of the batch.
_CARRIED = (model_config.MEMORY,)
# A run ends if one of these metrics is not finite; see `loop`.
_MUST_BE_FINITE = ('gradient_norm', 'expert_gradient_bound')


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimised.

  Attributes:
    label_smoothing: probability that the target distribution gives to all
      wrong tokens together.
    z_loss: coefficient of log(Z)^2, where Z is the sum that the softmax divides
      by.
    router: coefficients of the losses of learned routers.
  """

  label_smoothing: float = 0.0
  z_loss: float = 1e-4
  router: router_training.RouterLossConfig = router_training.RouterLossConfig()


class Trained(NamedTuple):
  """What the loss is differentiated with respect to.

  Attributes:
    params: the ordinary parameters, nested as in the model.
    factors: zeros in the shapes of the collection `word_experts.FACTORS`, whose
      "gradient" are the factors of the gradients of the expert tables; {} if
      the tables are not trained.
    rows: the collection `row_table.GATHERED`: name of a memory -> its rows that
      the batch names, <float32>[rows, parts, row] under `row_table.ROWS`.
  """

  params: Any
  factors: Any
  rows: Any


class PassInputs(NamedTuple):
  """What one pass through the model reads, beside what is differentiated.

  Attributes:
    tables: the expert tables, path of a table -> kernels by name.
    batch: arrays [batch, ...] by their keys, of the batch or of a microbatch.
    plans: `encoder_plan` and `decoder_plan` -> the plan of that stream's
      tokens, and `encoder_memory_rows` and `decoder_memory_rows` -> places in
      the gathered rows by the name of the memory; {} without tables, or where
      the model looks up its rows itself.
    key: the random key of dropout; None turns dropout off.
  """

  tables: parameters.Tables
  batch: Batch
  plans: dict[str, Any]
  key: jax.Array | None


class PassResults(NamedTuple):
  """What one pass through the model gives.

  Attributes:
    total: <float32>[], the loss summed over the target tokens, without the
      losses of routers.
    metrics: sums and counts over the pass, by name.
    stats: what each router counted, by the path of its layer.
    memory: the collection `model_config.MEMORY` for the next batch; {} for a
      model without a memory.
  """

  total: jax.Array
  metrics: Metrics
  stats: router_training.LayerStats
  memory: Any


class _Summed(NamedTuple):
  """What is added up over microbatches.

  Attributes:
    grads: gradients of the mean loss over the batch, nested as the parameters.
    rows: gradients of the gathered rows of memories, as `Trained.rows`.
    metrics: sums and counts, by name.
    stats: what each router counted, by the path of its layer.
  """

  grads: Any
  rows: Any
  metrics: Metrics
  stats: router_training.LayerStats


class _Kept(NamedTuple):
  """What is kept of each microbatch; several are stacked on a new first axis.

  Attributes:
    factors: factors of the gradients of tables; {} if tables are not trained.
    memory: the memory after the microbatch; {} for a model without one.
  """

  factors: Any
  memory: Any


class _Gradients(NamedTuple):
  """What a batch, or a microbatch, gives to the update."""

  summed: _Summed
  kept: _Kept


class _Counts(NamedTuple):
  """Tokens of the whole batch, by which the sums of its parts are divided.

  Attributes:
    targets: <float32>[], the target tokens with a weight, at least 1.
    real: stream -> <int32>[], its tokens that are not padding, at least 1.
  """

  targets: jax.Array
  real: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Setup:
  """The arguments of `make_train_step`, which explains them."""

  model: nn.Module
  optimizer: optax.GradientTransformation
  row_optimizer: row_optimizers.RowOptimizer | None
  loss: LossConfig
  seed: int
  num_microbatches: int
  rates: Mapping[str, row_optimizers.LearningRate]


def make_train_step(
  model: nn.Module,
  *,
  optimizer: optax.GradientTransformation,
  row_optimizer: row_optimizers.RowOptimizer | None,
  loss: LossConfig,
  seed: int,
  num_microbatches: int = 1,
  rates: Mapping[str, row_optimizers.LearningRate] = types.MappingProxyType({}),
) -> Callable[..., tuple[train_state.TrainState, Metrics]]:
  """The step `(state, frozen, batch, plan, limit) -> (state, metrics)`.

  The loss is the mean over the target tokens of the whole batch: the sum
  of each part is divided by the tokens of the whole batch, so that the number
  of microbatches changes nothing but memory.

  Args:
    model: the model.
    optimizer: updates the ordinary parameters.
    row_optimizer: updates the planned rows of the expert tables; None if the
      tables are frozen.
    loss: says what is minimised.
    seed: the seed of dropout, whose random numbers depend on (seed, step)
      alone.
    num_microbatches: parts of the batch that are computed one after another.
    rates: learning rates that are given with the metrics, by their names there.

  Returns:
    A function to be jitted with the state donated. `frozen` holds the tables
    when they are frozen (they must not be outputs, as they would be copied),
    and is {} otherwise. `plan` is None for a model without word experts. With
    a number `limit`, the batch changes nothing but the step and the memory if
    its loss is above it.
  """
  setup = _Setup(
    model, optimizer, row_optimizer, loss, seed, num_microbatches, rates
  )

  def train_step(state, frozen, batch, plan, limit=None):
    counts = _Counts(
      jnp.maximum(jnp.sum(batch['decoder_loss_weights']), 1.0),
      _num_real_tokens(batch),
    )
    if model.config.memory_length:
      memory = _without_past(state.memory, batch.get('decoder_begins_part'))
      batch = batch | {model_config.MEMORY: memory}
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    tables = state.tables or frozen
    inputs = PassInputs(tables, batch, _plans_of_streams(plan), key)
    rows = memory_rows.gather(tables, plan)
    gradients = _batch_gradients(
      setup, inputs, state=state, counts=counts, rows=rows
    )
    return _apply_gradients(
      setup, gradients, state=state, plan=plan, key=key, limit=limit
    )

  return train_step


def make_eval_step(
  model: nn.Module, loss: LossConfig
) -> Callable[..., Metrics]:
  """The step `(params, tables, batch, plan) -> metrics`, without dropout."""

  def eval_step(params, tables, batch, plan):
    inputs = PassInputs(tables, batch, _plans_of_streams(plan), key=None)
    trained = Trained(params, {}, memory_rows.gather(tables, plan))
    results = summed_loss(trained, inputs, model=model, config=loss)
    return results.metrics | router_training.metrics(results.stats)

  return eval_step


def summed_loss(
  trained: Trained, inputs: PassInputs, *, model: nn.Module, config: LossConfig
) -> PassResults:
  """One pass through the model, and its loss summed over target tokens."""
  targets = inputs.batch['decoder_target_tokens']
  weights = inputs.batch['decoder_loss_weights']
  logits, variables = _apply_model(
    trained,
    inputs,
    model=model,
    mutable=[router_losses.COLLECTION, *_CARRIED],
  )
  stats = router_training.layer_stats(variables)
  entropy, z_loss = losses.cross_entropy(
    logits,
    targets,
    label_smoothing=config.label_smoothing,
    z_loss=config.z_loss,
  )
  num_tokens = jnp.sum(weights)
  right = losses.is_right(logits, targets).astype(jnp.float32)
  summed = lambda values: Mean(jnp.sum(values * weights), num_tokens)
  metrics = {
    'loss': summed(entropy),
    'z_loss': summed(z_loss),
    'accuracy': summed(right),
    'unknown': _unknown_share(inputs.batch),
  }
  metrics |= routing_metrics(model, inputs.batch)
  total = jnp.sum((entropy + z_loss) * weights)
  memory = variables.get(model_config.MEMORY, {})
  return PassResults(total, metrics, stats, memory)


def _unknown_share(batch: Batch) -> Mean:
  """The share of `<unk>` among the tokens that are not padding."""
  streams = [
    batch[name]
    for name in ('encoder_input_tokens', 'decoder_target_tokens')
    if name in batch
  ]
  count = lambda where: sum(jnp.sum(where(ids)) for ids in streams)
  unknown = count(lambda ids: ids == base_vocabulary.UNK_ID)
  real = count(lambda ids: ids != base_vocabulary.PAD_ID)
  return Mean(unknown.astype(jnp.float32), real.astype(jnp.float32))


def routing_metrics(model: nn.Module, batch: Batch) -> Metrics:
  """Shares of the tokens of each stream that has routing ids in the batch.

  Routed tokens have an expert, skipped ones are words without an expert, and
  the rest is padding: the three shares add up to one.
  """
  metrics = {}
  names = model_config.names_experts(model.config)
  for stream in ('encoder', 'decoder'):
    ids = batch.get(f'{stream}_routing_ids')
    if ids is None or names is None:
      continue
    num_experts = names.num_experts
    total = jnp.asarray(ids.size, jnp.float32)
    share = lambda which, total=total: Mean(
      jnp.sum(which.astype(jnp.float32)), total
    )
    metrics[f'{stream}_routed'] = share((ids >= 0) & (ids < num_experts))
    metrics[f'{stream}_skipped'] = share(ids >= num_experts)
    metrics[f'{stream}_padding'] = share(ids < 0)
  return metrics


def _batch_gradients(
  setup: _Setup,
  inputs: PassInputs,
  *,
  state: train_state.TrainState,
  counts: _Counts,
  rows: Any,
) -> _Gradients:
  """Gradients of the whole batch, over one or several microbatches."""
  part_gradients = functools.partial(
    _part_gradients, setup, state=state, counts=counts, rows=rows
  )
  if setup.num_microbatches == 1:
    return part_gradients(inputs)
  # [batch, ...] -> [parts, batch / parts, ...]; plans are already cut.
  # Every part takes rows from all over the batch, so from every device.
  number = setup.num_microbatches
  cut = lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1)
  parts = (jax.tree.map(cut, inputs.batch), inputs.plans, jnp.arange(number))

  def gradients_of(part):
    batch, plans, number = part
    key = jax.random.fold_in(inputs.key, number)
    return part_gradients(PassInputs(inputs.tables, batch, plans, key))

  def add(total, part):
    gradients = gradients_of(part)
    return jax.tree.map(jnp.add, total, gradients.summed), gradients.kept

  first, _ = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  summed, kept = jax.lax.scan(add, zeros, parts)
  # Factors stay stacked: the plan counts tokens microbatch by microbatch.
  memory = jax.tree.map(_joined, kept.memory)
  return _Gradients(summed, _Kept(kept.factors, memory))


def _part_gradients(
  setup: _Setup,
  inputs: PassInputs,
  *,
  state: train_state.TrainState,
  counts: _Counts,
  rows: Any,
) -> _Gradients:
  """Gradients of one microbatch, or of a batch that is not cut."""

  def part_of_mean_loss(trained):
    results = summed_loss(trained, inputs, model=setup.model, config=setup.loss)
    shares = jax.tree.map(
      jnp.divide, _num_real_tokens(inputs.batch), counts.real
    )
    # Divided here rather than in the gradients: one number, not all of them.
    total = results.total / counts.targets
    total += router_training.loss(
      results.stats, setup.loss.router, shares=shares
    )
    return total, results

  factors = {}
  if state.tables:
    factors = _zero_factors(setup.model, state.params, inputs, rows)
  (grads, factors, rows), results = jax.grad(part_of_mean_loss, has_aux=True)(
    Trained(state.params, factors, rows)
  )
  summed = _Summed(grads, rows, results.metrics, results.stats)
  return _Gradients(summed, _Kept(factors, results.memory))


def _apply_gradients(
  setup: _Setup,
  gradients: _Gradients,
  *,
  state: train_state.TrainState,
  plan: step_plans.StepPlan | None,
  key: jax.Array,
  limit: jax.Array | None,
) -> tuple[train_state.TrainState, Metrics]:
  """The next state, and the metrics of the step."""
  grads, row_grads, metrics, stats = gradients.summed
  factors, memory = gradients.kept
  metrics |= router_training.metrics(stats)
  metrics['gradient_norm'] = Mean(_global_norm(grads), jnp.ones(()))
  for name, rate in setup.rates.items():
    metrics[name] = Mean(row_optimizers.rate_of(rate, state.step), jnp.ones(()))
  # Updates of tables depend on `usable`, so that they come after the backward
  # pass. That reads the tables, and XLA would give it a copy of them if it
  # could end after they change.
  usable = jnp.isfinite(metrics['gradient_norm'].total)
  if state.tables:
    bound = table_updates.gradient_bound(factors) + _global_norm(row_grads)
    metrics['expert_gradient_bound'] = Mean(bound, jnp.ones(()))
    usable &= jnp.isfinite(bound)
  if limit is not None:
    loss = metrics['loss']
    is_skipped = ~(loss.total / jnp.maximum(loss.count, 1) <= limit)
    usable &= ~is_skipped
    # Gradients that change nothing may be infinite.
    for name in metrics:
      if name in _MUST_BE_FINITE or name.endswith('/not_finite'):
        total, count = metrics[name]
        metrics[name] = Mean(jnp.where(is_skipped, 0, total), count)
    metrics[loss_spikes.SKIPPED] = Mean.of(is_skipped)
  updates, opt_state = setup.optimizer.update(
    grads, state.opt_state, state.params
  )
  params = router_training.balance(
    optax.apply_updates(state.params, updates),
    state.params,
    stats=stats,
    config=setup.model.config,
  )
  if limit is not None:
    params, opt_state = jax.tree.map(
      lambda old, new: jnp.where(is_skipped, old, new),
      (state.params, state.opt_state),
      (params, opt_state),
    )
  tables, table_state = _update_tables(
    setup, factors, row_grads, state=state, plan=plan, usable=usable, key=key
  )
  state = state.replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    tables=tables,
    table_state=table_state,
    **({'memory': memory} if setup.model.config.memory_length else {}),
  )
  return state, metrics


def _update_tables(
  setup: _Setup,
  factors: Any,
  row_grads: Any,
  *,
  state: train_state.TrainState,
  plan: step_plans.StepPlan | None,
  usable: jax.Array,
  key: jax.Array,
) -> tuple[parameters.Tables, dict[str, Any]]:
  """The tables and the state of their rows after the step; {} if frozen."""
  if not state.tables:
    return {}, {}
  is_sharded = isinstance(plan.experts, sharded_plan.ShardedPlan)
  updates_of = sharded_updates if is_sharded else table_updates
  by_table = parameters.by_table(factors, state.tables)
  tables, table_state = {}, {}
  for number, name in enumerate(state.tables):
    rows = table_updates.TableAndState(
      state.tables[name], state.table_state[name]
    )
    step = table_updates.StepValues(
      usable,
      state.step,
      # The first numbers are those of the microbatches.
      jax.random.fold_in(key, setup.num_microbatches + number),
    )
    if name in by_table:
      updated = updates_of.update_table(
        setup.row_optimizer,
        rows,
        factors=by_table[name],
        plan=plan.experts,
        step=step,
      )
    else:
      updated = memory_rows.update(
        setup.row_optimizer,
        rows,
        gradients=row_grads[name],
        plan=plan.memories[name],
        step=step,
      )
    tables[name], table_state[name] = updated
  return tables, table_state


def _apply_model(
  trained: Trained, inputs: PassInputs, *, model: nn.Module, mutable: list[str]
):
  """Logits, and the collections in `mutable` as the model left them."""
  carried = {
    name: inputs.batch[name] for name in _CARRIED if name in inputs.batch
  }
  return model.apply(
    {
      'params': parameters.merge_tables(trained.params, inputs.tables),
      word_experts.FACTORS: trained.factors,
      row_table.GATHERED: trained.rows,
      **carried,
    },
    inputs.batch | inputs.plans,
    enable_dropout=inputs.key is not None,
    rngs=None if inputs.key is None else {'dropout': inputs.key},
    method='of_batch',
    mutable=mutable,
  )


def _zero_factors(
  model: nn.Module, params: Any, inputs: PassInputs, rows: Any
) -> Any:
  """Zeros in the shapes of the factors that every expert product leaves."""

  def factors_of_pass():
    without_dropout = inputs._replace(key=None)
    _, variables = _apply_model(
      Trained(params, {}, rows),
      without_dropout,
      model=model,
      mutable=[word_experts.FACTORS],
    )
    return variables.get(word_experts.FACTORS, {})

  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(factors_of_pass)
  )


def _num_real_tokens(batch: Batch) -> dict[str, jax.Array]:
  """Stream -> <int32>[], its tokens that are not padding, at least 1."""
  names = {
    'encoder': 'encoder_input_tokens',
    'decoder': 'decoder_target_tokens',
  }
  return {
    stream: jnp.maximum(jnp.sum(batch[name] > 0), 1)
    for stream, name in names.items()
    if name in batch
  }


def _plans_of_streams(plan: step_plans.StepPlan | None) -> dict[str, Any]:
  """The plans of the streams under the keys by which a batch has them."""
  if plan is None:
    return {}
  plans = {}
  if plan.experts is not None:
    plans['encoder_plan'] = plan.experts.encoder
    plans['decoder_plan'] = plan.experts.decoder
  for stream in batch_plans.STREAMS:
    rows = {
      name: of_memory.places[stream]
      for name, of_memory in plan.memories.items()
      if stream in of_memory.places
    }
    plans[f'{stream}_memory_rows'] = rows or None
  return {
    key: of_stream for key, of_stream in plans.items() if of_stream is not None
  }


def _joined(parts: jax.Array) -> jax.Array:
  """[parts, batch / parts, ...] -> [batch, ...], the inverse of the cut."""
  return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def _without_past(memory: Any, begins: jax.Array | None) -> Any:
  """The memory, with zeros in the rows that do not continue an earlier text.

  Args:
    memory: arrays [batch, ...].
    begins: <bool>[batch], whether a row begins a new part of the text; None if
      every row continues the one before.
  """
  if begins is None:
    return memory

  def cleared(leaf):
    rows = begins.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(rows, jnp.zeros_like(leaf), leaf)

  return jax.tree.map(cleared, memory)


def _global_norm(tree: Any) -> jax.Array:
  # Products rather than squares: no squared copy of a gradient is written.
  return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)))
