"""Where the experts of a run lie: on the device, in host memory, or on disk.

The training step does not know where. A store makes the experts of a batch
ready before its step, and gives checkpoints what has changed. With every store
a run ends with the same bits, and its checkpoints can be read by every other
store.

`Store` is a setting of a run, and `Experts` are the experts of a run as an open
store has them.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol

import jax

from mowe.layers.memory import host_rows
from mowe.models import parameters
from mowe.stores import (
  backings,
  cached_experts,
  device_experts,
  expert_sources,
  kernel_cache,
)
from mowe.stores.row_files import expert_records, row_file
from mowe.training import train_metrics, train_state

# For inference, tables of more bytes are not loaded as a whole unless the
# caller asks for it.
_LARGE = 2**32


class Experts(Protocol):
  """The experts of a run.

  Attributes:
    num_slots: how many rows the tables of the step have; None if they have all
      experts.
    rows_from: from where the model of an evaluation reads experts; None if it
      is given `tables`.
  """

  num_slots: int | None
  rows_from: host_rows.RowsFrom | None

  def start(self, source: expert_sources.ExpertSource) -> expert_sources.Arrays:
    """Takes all experts from their source.

    Returns:
      Tables and row state for the train state; {} and {} if experts are frozen.
    """

  def feed(
    self, batches: Iterable[tuple[Any, Any]]
  ) -> Iterator[tuple[Any, Any]]:
    """Yields the same batches, and for each plan what `ready` takes."""

  def ready(
    self, state: train_state.TrainState, fed: Any
  ) -> tuple[train_state.TrainState, parameters.Tables, Any]:
    """Brings the experts of a batch to the device.

    Args:
      state: the state before the step; its arrays may be donated.
      fed: what `feed` gave with the batch.

    Returns:
      The state, the tables if they are frozen ({} if not), and the plan of the
      batch, which names experts by their rows in these tables.
    """

  def metrics(self) -> dict[str, train_metrics.Mean]:
    """The metrics of the last step, to be added to those of the step itself."""

  def tables(self, state: train_state.TrainState) -> parameters.Tables:
    """The tables for an evaluation; {} if its model is to read `rows_from`."""

  def save(
    self, checkpoint: pathlib.Path, state: train_state.TrainState
  ) -> None:
    """Writes the experts of a checkpoint."""

  def close(self) -> None:
    """Ends threads and closes files; changes that were not saved are lost."""


class Store(Protocol):
  """The setting of a run that says where its experts lie."""

  def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if a run on this mesh cannot have its experts there."""

  def rows_on_device(
    self, num_experts: int, experts_at_once: int
  ) -> int | None:
    """How many rows the tables on the device have; None if they have them all.

    Args:
      num_experts: how many experts there are.
      experts_at_once: how many experts an ordinary batch has, with some slack.
    """

  def open(
    self,
    file: row_file.RowFile,
    abstract: expert_sources.Arrays,
    *,
    is_trained: bool,
    is_resumed: bool,
    experts_at_once: int,
  ) -> Experts:
    """Opens the store for a run.

    Args:
      file: the file in which the checkpoints of the run keep experts.
      abstract: abstract tables and row state of all experts, in their
        shardings.
      is_trained: whether experts change.
      is_resumed: whether the file already has the experts that the run begins
        with.
      experts_at_once: how many experts an ordinary batch has, with some slack.
    """

  def open_for_reading(
    self, source: expert_sources.SavedExperts, abstract: parameters.Tables
  ) -> tuple[parameters.Tables, host_rows.RowsFrom | None]:
    """Opens the experts of a checkpoint for inference.

    Args:
      source: the experts of the checkpoint.
      abstract: abstract tables of all experts.

    Returns:
      Either the tables on the device, and None; or {}, and from where the model
      is to read experts.
    """


@dataclasses.dataclass(frozen=True)
class DeviceStore:
  """All experts on the devices, split over the mesh axis `expert`."""

  def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
    """Accepts any mesh."""

  def rows_on_device(self, num_experts: int, experts_at_once: int) -> None:
    """See `Store.rows_on_device`."""

  def open(
    self,
    file: row_file.RowFile,
    abstract: expert_sources.Arrays,
    *,
    is_trained: bool,
    is_resumed: bool,
    experts_at_once: int,
  ) -> Experts:
    """See `Store.open`."""
    del experts_at_once
    return device_experts.DeviceExperts(file, abstract, is_trained, is_resumed)

  def open_for_reading(
    self, source: expert_sources.SavedExperts, abstract: parameters.Tables
  ) -> tuple[parameters.Tables, None]:
    """See `Store.open_for_reading`."""
    with contextlib.closing(source):
      return source.arrays((abstract, {}))[0], None


@dataclasses.dataclass(frozen=True)
class _SlotStore:
  """Base of stores outside the device, with slots for some experts on it."""

  num_slots: int | None = None

  _backing: ClassVar[Callable[..., cached_experts.Backing]]

  def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
    """See `Store.check_mesh`."""
    if mesh.size > mesh.shape['data'] or jax.process_count() > 1:
      raise ValueError(
        'Experts in host memory or on disk need a run of one process, whose '
        f'mesh has the axis data alone, but this one has {dict(mesh.shape)} '
        f'and {jax.process_count()} processes. Take DeviceStore, which splits '
        'them over the mesh axis expert.'
      )

  def rows_on_device(self, num_experts: int, experts_at_once: int) -> int:
    """See `Store.rows_on_device`."""
    return min(self.num_slots or 2 * experts_at_once, num_experts)

  def open(
    self,
    file: row_file.RowFile,
    abstract: expert_sources.Arrays,
    *,
    is_trained: bool,
    is_resumed: bool,
    experts_at_once: int,
  ) -> Experts:
    """See `Store.open`."""
    return cached_experts.CachedExperts(
      self._backing(file, is_resumed),
      abstract,
      self.rows_on_device(file.num_experts, experts_at_once),
      is_trained,
    )


@dataclasses.dataclass(frozen=True)
class HostStore(_SlotStore):
  """All experts in host memory, those of the next batches on the device.

  Attributes:
    num_slots: how many experts the device has room for; None for twice as many
      as an ordinary batch has.
  """

  _backing = backings.HostBacking

  def open_for_reading(
    self, source: expert_sources.SavedExperts, abstract: parameters.Tables
  ) -> tuple[parameters.Tables, host_rows.RowsFrom]:
    """See `Store.open_for_reading`."""
    source.check((abstract, {}))
    dtype = expert_records.record_dtype(abstract, {})
    num_experts = jax.tree.leaves(abstract)[0].shape[0]
    records = backings.HostRecords(dtype)
    with contextlib.closing(source):
      records.start(source)
    # The cache keeps next to nothing, as all records are in memory already.
    return {}, kernel_cache.KernelCache(
      records.read, dtype, num_experts, most_bytes=0
    )


@dataclasses.dataclass(frozen=True)
class DiskStore(_SlotStore):
  """All experts in the model's folder, those of the next batches on the device.

  Attributes:
    num_slots: how many experts the device has room for; None for twice as many
      as an ordinary batch has.
  """

  _backing = backings.DiskBacking

  def open_for_reading(
    self, source: expert_sources.SavedExperts, abstract: parameters.Tables
  ) -> tuple[parameters.Tables, host_rows.RowsFrom]:
    """See `Store.open_for_reading`."""
    source.check((abstract, {}))
    return {}, kernel_cache.KernelCache(
      source.read,
      expert_records.record_dtype(abstract, {}),
      jax.tree.leaves(abstract)[0].shape[0],
    )


def for_reading(abstract: parameters.Tables) -> Store:
  """The store for inference with these tables: on disk if they are large."""
  size = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
  )
  return DiskStore() if size > _LARGE else DeviceStore()
