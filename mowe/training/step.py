"""One training step: gather planned rows, differentiate, update in place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mowe.models import parameters
from mowe.training import losses, row_optimizers, train_state
from mowe.training.metrics import Mean
from mowe.words import plan as plans

# Parameters of experts that the row optimizer takes together: 4 MB.
_NUMBERS_AT_ONCE = 2**20

Metrics = dict[str, Mean]
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimised.

  Attributes:
    label_smoothing: probability mass of all wrong tokens together.
    z_loss: coefficient of log(Z)^2.
  """

  label_smoothing: float = 0.0
  z_loss: float = 1e-4


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

  def loss_of_part(params, rows, batch, streams, key):
    return _summed_loss(model, loss, params, rows, batch, streams, key)

  def train_step(state, frozen, batch, plan):
    rows = gather_rows(state.tables or frozen, plan)
    trained = (state.params, rows if state.tables else {})
    held = {} if state.tables else rows

    num_tokens = jnp.maximum(jnp.sum(batch['decoder_loss_weights']), 1.0)

    def part_of_mean_loss(trained, batch, streams, key):
      params, rows = trained
      total, metrics = loss_of_part(params, rows or held, batch, streams, key)
      # Here rather than in the gradients: one number instead of all of them.
      return total / num_tokens, metrics

    gradient = jax.grad(part_of_mean_loss, has_aux=True)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    streams = _streams(plan)
    if num_microbatches == 1:
      grads, metrics = gradient(trained, batch, streams, key)
    else:
      grads, metrics = _accumulate(
        gradient, trained, batch, streams, key, num_microbatches
      )
    param_grads, row_grads = grads

    metrics['gradient_norm'] = Mean(_global_norm(param_grads), jnp.ones(()))
    updates, opt_state = optimizer.update(
      param_grads, state.opt_state, state.params
    )
    tables, table_state = state.tables, state.table_state
    if state.tables:
      tables, table_state = _update_rows(
        row_optimizer, state, row_grads, rows, plan
      )
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      tables=tables,
      table_state=table_state,
    )
    return state, metrics

  return train_step


def make_eval_step(
  model: nn.Module, loss: LossConfig
) -> Callable[..., Metrics]:
  """The step `(params, tables, batch, plan) -> metrics`, without dropout."""

  def eval_step(params, tables, batch, plan):
    rows = gather_rows(tables, plan)
    _, metrics = _summed_loss(
      model, loss, params, rows, batch, _streams(plan), None
    )
    return metrics

  return eval_step


def gather_rows(
  tables: parameters.Tables, plan: plans.ExpertPlan | None
) -> parameters.Tables:
  """The planned rows of every table; any row where none is used."""
  if not tables or plan is None:
    return tables
  # No zeros in unused rows: the comparison costs another pass over all rows,
  # and nothing comes of them, as their slots are empty.
  return jax.tree.map(
    lambda table: jnp.take(table, plan.experts, axis=0, mode='clip'), tables
  )


def _summed_loss(model, loss, params, rows, batch, streams, key):
  """Sum over target tokens, and metrics as sums and counts."""
  targets = batch['decoder_target_tokens']
  weights = batch['decoder_loss_weights']
  names = (
    'encoder_segment_ids',
    'decoder_segment_ids',
    'encoder_routing_ids',
    'decoder_routing_ids',
  )
  logits = model.apply(
    {'params': parameters.merge_tables(params, rows)},
    batch['encoder_input_tokens'],
    batch['decoder_input_tokens'],
    targets,
    enable_dropout=key is not None,
    rngs=None if key is None else {'dropout': key},
    **{name: batch[name] for name in names if name in batch} | streams,
  )
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
  metrics |= _routing_metrics(model, batch)
  return jnp.sum((entropy + z_loss) * weights), metrics


def _routing_metrics(model, batch):
  """Shares of tokens that had an expert: routed + skipped + padding = all."""
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


def _streams(plan):
  if plan is None:
    return {}
  return {
    f'{name}_routing_ids': stream
    for name in ('encoder', 'decoder')
    if (stream := getattr(plan, name)) is not None
  }


def _global_norm(tree):
  # Products rather than squares: no squared copy of a gradient is written.
  return jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)))


def _accumulate(gradient, trained, batch, streams, key, num_microbatches):
  """Adds gradients and metrics of the parts of a batch, in float32."""
  # [batch, ...] -> [parts, batch / parts, ...]; plans are already cut.
  # Every part takes rows from all over the batch, so from every device.
  cut = lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
  parts = (jax.tree.map(cut, batch), streams, jnp.arange(num_microbatches))

  def one(part):
    batch, streams, number = part
    return gradient(trained, batch, streams, jax.random.fold_in(key, number))

  def add(total, part):
    return jax.tree.map(jnp.add, total, one(part)), None

  first = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  return jax.lax.scan(add, zeros, parts)[0]


def _update_rows(row_optimizer, state, grads, rows, plan):
  """Updates the planned rows of each table and writes them back in place.

  On CPU a few experts at a time: the row optimizer passes several times over
  its arguments, which stay in the cache then.
  """
  tables, table_state = {}, {}
  for name, table in state.tables.items():
    num_rows = plan.experts.size
    at_once = num_rows
    if jax.default_backend() == 'cpu':
      at_once = _rows_at_once(num_rows, rows[name])

    def update_some(number, carry, at_once=at_once, name=name):
      table, table_state = carry
      take = lambda x: jax.lax.dynamic_slice_in_dim(
        x, number * at_once, at_once
      )
      experts = take(plan.experts)
      new_rows, new_state = row_optimizer.update(
        jax.tree.map(take, grads[name]),
        jax.tree.map(
          lambda x: jnp.take(x, experts, axis=0, mode='clip'), table_state
        ),
        jax.tree.map(take, rows[name]),
        state.step,
      )
      # Unused rows have numbers beyond the table and are dropped.
      write = lambda whole, rows: whole.at[experts].set(
        rows, mode='drop', unique_indices=True
      )
      return (
        jax.tree.map(write, table, new_rows),
        jax.tree.map(write, table_state, new_state),
      )

    tables[name], table_state[name] = jax.lax.fori_loop(
      0, num_rows // at_once, update_some, (table, state.table_state[name])
    )
  return tables, table_state


def _rows_at_once(num_rows: int, rows: Any) -> int:
  """Largest divisor of the planned rows that keeps to `_NUMBERS_AT_ONCE`."""
  size_of_row = sum(x[0].size for x in jax.tree.leaves(rows))
  most = max(1, _NUMBERS_AT_ONCE // size_of_row)
  return max(
    n for n in range(1, num_rows + 1) if num_rows % n == 0 and n <= most
  )
