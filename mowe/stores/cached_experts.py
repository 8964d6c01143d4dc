"""Experts outside the device, of which those of the next batches lie in slots.

The tables on the device have one row for each slot. All experts lie in a
*backing*, in host memory or on disk. A schedule (`SlotSchedule`) decides, one
batch ahead of the step, which experts come into slots and which leave them:

  feed    decides the move of a batch, and starts to read what comes (a thread)
  ready   before the step: copies what leaves out of its slots, starts to write
          it to the backing (another thread), and puts what comes into the slots

An expert that has changed is written to the backing when it leaves its slot. So
the backing has the last version of every expert that is in no slot. An expert
may leave and be needed again soon: it is read only when the write of the move
in which it left is done.
"""

import collections
import concurrent.futures
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mowe.models import parameters
from mowe.stores import (
  expert_metrics,
  expert_sources,
  kernel_cache,
  slot_rows,
  slot_schedule,
)
from mowe.stores.row_files import background, expert_records, row_index
from mowe.training import table_layouts, train_metrics, train_state
from mowe.words.plans import batch_plans


class Backing(Protocol):
  """All experts, outside the device.

  Attributes:
    dtype: the dtype of a record.
    num_experts: how many experts there are.
    index: in which is marked what experts training has met.
  """

  dtype: np.dtype
  num_experts: int
  index: row_index.RowIndex

  def start(self, source: expert_sources.ExpertSource) -> None:
    """Takes the experts of a source; called once, before all else.

    Those that are not written there are drawn when they are read, so that an
    expert that is never met costs nothing.
    """

  def read(self, experts: np.ndarray) -> np.ndarray:
    """The records [n] of experts <int>[n]; several threads call it at once."""

  def write(self, experts: np.ndarray, records: np.ndarray) -> None:
    """Keeps the records [n] of distinct experts <int>[n]."""

  def save(self, checkpoint: pathlib.Path) -> None:
    """Writes what a checkpoint needs into its folder."""

  def close(self) -> None:
    """Closes files."""


class _Fed(NamedTuple):
  """What a step needs, decided ahead of it.

  Attributes:
    plan: the plan of the batch, with slots in the place of experts.
    experts: the plan of the batch, with experts.
    used: <int>[n], the slots of the experts of the batch.
    move: which experts come and go before the step.
    coming: gives the experts that come, a list with a pair for each call of
      `slot_rows.put`: slots <int32>[rows], and arrays [rows, ...].
    gone: is done when the experts that leave are in the backing.
  """

  plan: batch_plans.ExpertPlan
  experts: batch_plans.ExpertPlan
  used: np.ndarray
  move: slot_schedule.Move
  coming: concurrent.futures.Future
  gone: concurrent.futures.Future


class CachedExperts:
  """Experts in a backing, and slots on the device; see `expert_stores.Experts`.

  Args:
    backing: where all experts lie.
    abstract: abstract arrays of all experts, in the shardings of the slots.
    num_slots: how many experts the tables on the device have room for.
    is_trained: whether experts change; frozen ones are never written back.

  Attributes:
    num_slots: rows of the tables of the step.
    rows_from: gives evaluations the experts as the last call of `tables` left
      them.
  """

  def __init__(
    self,
    backing: Backing,
    abstract: expert_sources.Arrays,
    num_slots: int,
    is_trained: bool,
  ):
    self._backing = backing
    self._abstract = abstract
    self.num_slots = num_slots
    self.rows_from = kernel_cache.KernelCache(
      backing.read, backing.dtype, backing.num_experts
    )
    self._is_trained = is_trained
    self._schedule = slot_schedule.SlotSchedule(backing.num_experts, num_slots)
    # Each slot has an expert, or -1 for none, and a flag that says whether that
    # expert differs from its version in the backing. Both are as the steps that
    # were made ready have left them, while the schedule is ahead of these
    # steps.
    self._expert_in = np.full(num_slots, -1, np.int64)
    self._is_changed = np.zeros(num_slots, bool)
    # By the number of a move the experts that left in it, and a future that is
    # done when all of them are in the backing; moves that are known to be done
    # are forgotten.
    self._gone: dict[int, tuple[np.ndarray, concurrent.futures.Future]] = {}
    self._num_moves = 0
    self._reading = background.threads(1, 'experts_in')
    self._writing = background.threads(1, 'experts_out')
    self._frozen: parameters.Tables = {}
    self._counts = expert_metrics.ExpertCounts(backing.index, is_trained)
    self._moved: dict[str, train_metrics.Mean] = {}

  def start(self, source: expert_sources.ExpertSource) -> expert_sources.Arrays:
    """See `Experts.start`."""
    self._backing.start(source)
    tables, table_state = table_layouts.zeros(
      jax.tree.map(
        lambda leaf: table_layouts.with_rows(leaf, self.num_slots),
        self._abstract,
      )
    )
    if self._is_trained:
      return tables, table_state
    self._frozen = tables
    return {}, {}

  def feed(
    self, batches: Iterable[tuple[Any, batch_plans.ExpertPlan]]
  ) -> Iterator[tuple[Any, _Fed]]:
    """See `Experts.feed`; one batch is scheduled ahead of the one given."""
    waiting = collections.deque()
    for batch, plan in batches:
      waiting.append((batch, self._decide(plan)))
      if len(waiting) > 1:
        yield waiting.popleft()
    yield from waiting

  def ready(
    self, state: train_state.TrainState, fed: _Fed
  ) -> tuple[train_state.TrainState, parameters.Tables, batch_plans.ExpertPlan]:
    """See `Experts.ready`."""
    self._raise_errors()
    arrays = self._arrays(state)
    move = fed.move
    # What leaves is copied out of its slots before anything is put there.
    is_changed = self._is_changed[move.slots]
    if is_changed.any():
      going = self._take(arrays, move.slots[is_changed])
      job = self._writing.submit(self._write, going)
      job.add_done_callback(lambda job: _pass_on(job, fed.gone))
    else:
      fed.gone.set_result(None)
    start = time.perf_counter()
    coming = fed.coming.result()
    waited = time.perf_counter() - start
    for rows, values in coming:
      arrays = slot_rows.put(arrays, rows, values)
    # From here on the slots are those of the step that comes next.
    self._expert_in[move.slots] = move.entering
    self._is_changed[move.slots] = False
    if self._is_trained:
      self._is_changed[fed.used] = True
    self._counts.count(fed.experts)
    self._count_move(fed, int(is_changed.sum()), waited)
    if self._is_trained:
      tables, table_state = arrays
      state = state.replace(tables=tables, table_state=table_state)
      return state, {}, fed.plan
    self._frozen = arrays[0]
    return state, self._frozen, fed.plan

  def metrics(self) -> dict[str, train_metrics.Mean]:
    """See `Experts.metrics`."""
    return self._counts.metrics() | self._moved

  def tables(self, state: train_state.TrainState) -> parameters.Tables:
    """See `Experts.tables`; {}, as evaluations read `rows_from`."""
    self._flush(state)
    self.rows_from.clear()
    return {}

  def save(
    self, checkpoint: pathlib.Path, state: train_state.TrainState
  ) -> None:
    """See `Experts.save`."""
    self._flush(state)
    self._backing.save(checkpoint)

  def close(self) -> None:
    """See `Experts.close`."""
    self._writing.shutdown()
    # Batches that were fed but never made ready: nobody writes what they would
    # have moved out, and a read that waits for it must not wait for ever.
    for _, gone in self._gone.values():
      gone.cancel()
    self._reading.shutdown(cancel_futures=True)
    self._backing.close()

  def _flush(self, state):
    """Writes every change to the backing; the slots keep their experts."""
    changed = np.flatnonzero(self._is_changed)
    if len(changed):
      going = self._take(self._arrays(state), changed)
      self._writing.submit(self._write, going).result()
      self._is_changed[:] = False
    # There is one writing thread, so earlier writes are done when this one is.
    self._writing.submit(lambda: None).result()
    self._raise_errors()

  def _arrays(self, state) -> expert_sources.Arrays:
    """Tables and row state of the slots, [num_slots, ...]."""
    if self._is_trained:
      return state.tables, state.table_state
    return self._frozen, {}

  def _decide(self, plan: batch_plans.ExpertPlan) -> _Fed:
    """Schedules a batch, and starts to read the experts that come."""
    present = plan.present_experts(self._backing.num_experts)
    move = self._schedule.take(present)
    # Moves in which some of these experts left, and which may not be written
    # yet.
    needed = [
      gone
      for leaving, gone in list(self._gone.values())
      if np.isin(move.entering, leaving).any()
    ]
    gone = concurrent.futures.Future()
    self._gone[self._num_moves] = move.leaving[move.leaving >= 0], gone
    self._num_moves += 1
    coming = self._reading.submit(self._read, move, needed)
    in_slots = self._schedule.in_slots(plan)
    used = in_slots.present_experts(self.num_slots)
    return _Fed(in_slots, plan, used, move, coming, gone)

  def _read(self, move, needed):
    """Reads the experts that come and puts them on the device; in a thread.

    Args:
      move: the move that brings them.
      needed: futures of earlier moves, whose writes must be done first.

    Returns:
      `_Fed.coming`.
    """
    for gone in needed:
      gone.result()
    coming = []
    for some, size in slot_rows.calls(
      len(move.slots), self._backing.dtype.itemsize
    ):
      # The last call may have room for more experts than are left. Its room is
      # filled with experts that are read again, and whose rows `put` drops.
      experts = np.resize(move.entering[some], size)
      records = self._backing.read(experts)
      values = expert_records.to_arrays(records, *self._abstract)
      coming.append(
        (slot_rows.padded(move.slots[some], size), self._put(values))
      )
    return coming

  def _put(self, values):
    return jax.tree.map(
      lambda value, leaf: jax.device_put(value, leaf.sharding),
      values,
      self._abstract,
    )

  def _take(self, arrays, slots):
    """Starts to copy the experts in some slots to the host.

    Returns:
      What `_write` takes, a pair for each call of `slot_rows.get`: the experts
      <int64>[n], and arrays [rows, ...] with at least n rows.
    """
    going = []
    for some, size in slot_rows.calls(len(slots), self._backing.dtype.itemsize):
      taken = slot_rows.get(arrays, slot_rows.padded(slots[some], size))
      going.append((self._expert_in[slots[some]], taken))
    return going

  def _write(self, going):
    """Writes experts that leave to the backing; in a thread."""
    for experts, taken in going:
      arrays = jax.device_get(taken)
      records = expert_records.from_arrays(self._backing.dtype, *arrays)
      self._backing.write(experts, records[: len(experts)])

  def _raise_errors(self) -> None:
    """Raises errors of moves that are done, and forgets these moves."""
    for number, (_, gone) in list(self._gone.items()):
      if gone.done():
        gone.result()
        del self._gone[number]

  def _count_move(self, fed, num_out, waited):
    """Keeps the metrics of a move.

    Args:
      fed: the batch.
      num_out: how many experts were written back.
      waited: seconds that the host waited for the experts that come.
    """
    one = np.float32(1)
    moved = (len(fed.move.slots) + num_out) * self._backing.dtype.itemsize
    found = len(fed.used) - len(fed.move.slots)
    self._moved = {
      'experts/hit_rate': train_metrics.Mean(
        np.float32(found), np.float32(len(fed.used))
      ),
      'experts/moved_mb': train_metrics.Mean(np.float32(moved / 1e6), one),
      'experts/wait_ms': train_metrics.Mean(np.float32(1e3 * waited), one),
    }


def _pass_on(job, future):
  """Gives the outcome of a job to the future that others wait for."""
  error = job.exception()
  if error is None:
    future.set_result(None)
  else:
    future.set_exception(error)
