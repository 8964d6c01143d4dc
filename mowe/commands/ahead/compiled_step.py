"""Compiles the step of a run from shapes alone, before anything is allocated."""

import math
import time
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mowe.commands import train
from mowe.models import parameters
from mowe.training import partitioning, table_layouts
from mowe.words.plans import step_plans

# Tables of fewer numbers may have as many as some other array of the step.
_LARGE = 2**20


class CompiledStep(NamedTuple):
  """The step of a run, compiled for its devices.

  Attributes:
    program: the compiled program.
    batch: shapes of the first batch.
    table_sizes: for each large table of experts or of a memory, how many
      numbers of it lie on one device.
    least_bytes: bytes that a device reads and writes at least: it reads the
      batch and all state but tables, and writes that state again.
    seconds: how long tracing and compiling took.
  """

  program: jax.stages.Compiled
  batch: Any
  table_sizes: frozenset[int]
  least_bytes: int
  seconds: float


def compile_step(
  training: train.Training,
  prepared: train.Prepared,
  compiler_options: Mapping[str, bool] = types.MappingProxyType({}),
) -> CompiledStep:
  """Compiles the step that `train.train` would take first.

  Where experts or memories lie outside the device, tables have as many rows as
  the store keeps on it.

  Args:
    training: all parts and settings of the run.
    prepared: the run, prepared on the mesh that the program is for. Its devices
      need not be there.
    compiler_options: options of XLA, by their names.
  """
  batches, router, setup = prepared
  begin = time.monotonic()
  batch, plan = router(batches.first_batch)
  batch = partitioning.abstract_batch(
    batch, partitioning.batch_sharding(setup.mesh)
  )
  slots = {
    group: training.store.rows_on_device(
      jax.tree.leaves(tables)[0].shape[0], router.at_once.get(group, 0)
    )
    for group, tables in parameters.in_groups(setup.abstract.tables).items()
  }
  state = setup.abstract.replace(
    tables=_on_device(setup.abstract.tables, slots),
    table_state=_on_device(setup.abstract.table_state, slots),
  )
  frozen = {}
  if setup.row_optimizer is None:
    frozen = state.tables
    state = state.replace(tables={}, table_state={})
  step = train.jitted_step(training, setup, slots.get(step_plans.EXPERTS))
  program = step.lower(
    state,
    frozen,
    batch,
    partitioning.put_plan(plan, setup.mesh, partitioning.abstract_batch),
    np.float32(0) if training.spikes.skips else None,
  ).compile(compiler_options=dict(compiler_options))
  sizes = map(_size_on_one, jax.tree.leaves((state.tables, frozen)))
  ordinary = state.replace(tables={}, table_state={})
  return CompiledStep(
    program,
    batch,
    frozenset(size for size in sizes if size >= _LARGE),
    2 * _bytes_on_one(ordinary) + _bytes_on_one(batch),
    time.monotonic() - begin,
  )


def _size_on_one(leaf) -> int:
  """How many numbers of an array lie on one device."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _bytes_on_one(tree) -> int:
  """Bytes that the arrays of a tree have on one device."""
  return sum(
    _size_on_one(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def _on_device(tree, slots):
  """Tables or their state, with the rows that are on the device."""

  def with_rows(leaf, number):
    if number is None or not leaf.ndim:
      return leaf
    return table_layouts.with_rows(leaf, number)

  kept = {}
  for group, own in parameters.in_groups(tree).items():
    number = slots[group]
    kept |= jax.tree.map(
      lambda leaf, number=number: with_rows(leaf, number), own
    )
  return kept
