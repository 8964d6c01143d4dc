"""Where the experts of a run lie: on the device, in host memory, or on disk.

The train step does not know. A store makes the experts of a batch ready before
its step, and gives checkpoints what has changed. Whatever the store, a run ends
with the same bits, and its checkpoints can be read by every other store.
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
  expert_records,
  expert_sources,
  kernel_cache,
  row_file,
)
from mowe.training import train_metrics, train_state

# Tables of more bytes are not loaded as a whole, unless one asks for it.
_LARGE = 2**32


class Experts(Protocol):
  """The experts of a run.

  Attributes:
    num_slots: rows of the tables of the step; None: all experts.
    rows_from: where the model of an evaluation reads experts; None: `tables`.
  """

  num_slots: int | None
  rows_from: host_rows.RowsFrom | None

  def start(self, source: expert_sources.ExpertSource) -> expert_sources.Arrays:
    """Takes the experts from where they come.

    Returns:
      Tables and row state for the train state; {} and {} if they are frozen.
    """

  def feed(
    self, batches: Iterable[tuple[Any, Any]]
  ) -> Iterator[tuple[Any, Any]]:
    """The same batches, with their plans made into what `ready` takes."""

  def ready(
    self, state: train_state.TrainState, fed: Any
  ) -> tuple[train_state.TrainState, parameters.Tables, Any]:
    """Brings the experts of a batch to the device.

    Returns:
      The state, the tables if they are frozen ({} if not), and the plan in the
      numbers of their rows.
    """

  def metrics(self) -> dict[str, train_metrics.Mean]:
    """Numbers of the last step, to be added to those of the step itself."""

  def tables(self, state: train_state.TrainState) -> parameters.Tables:
    """Tables for an evaluation; {} if its model is to read `rows_from`."""

  def save(
    self, checkpoint: pathlib.Path, state: train_state.TrainState
  ) -> None:
    """Writes the experts of a checkpoint."""

  def close(self) -> None:
    """Ends threads and closes files; not saved changes are lost."""


class Store(Protocol):
  """Settings of where experts lie."""

  def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if experts cannot lie there in a run on this mesh."""

  def open(
    self,
    file: row_file.RowFile,
    abstract: expert_sources.Arrays,
    *,
    is_trained: bool,
    is_resumed: bool,
    experts_at_once: int,
  ) -> Experts:
    """The experts of a run.

    Args:
      file: where its checkpoints keep experts.
      abstract: tables and row state, in their shardings.
      is_trained: whether experts change.
      is_resumed: whether the file already has them as they are.
      experts_at_once: that an ordinary batch has, with some slack.
    """

  def open_for_reading(
    self, source: expert_sources.SavedExperts, abstract: parameters.Tables
  ) -> tuple[parameters.Tables, host_rows.RowsFrom | None]:
    """Experts of a checkpoint for inference.

    Returns:
      Tables on the device, or {} and where the model is to read experts.
    """


@dataclasses.dataclass(frozen=True)
class DeviceStore:
  """All experts on the devices, split over the mesh axis `expert`."""

  def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
    """Accepts any mesh."""

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
  """Experts outside the device, but for those in its slots."""

  num_slots: int | None = None

  _backing: ClassVar[Callable[..., cached_experts.Backing]]

  def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
    """See `Store.check_mesh`."""
    if mesh.size > 1:
      raise ValueError(
        'Experts in host memory or on disk need a run on one device, but this '
        f'one has {mesh.size}. Take DeviceStore, which splits them over the '
        'mesh axis expert.'
      )

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
    num_slots = self.num_slots or 2 * experts_at_once
    return cached_experts.CachedExperts(
      self._backing(file, is_resumed),
      abstract,
      min(num_slots, file.num_experts),
      is_trained,
    )


@dataclasses.dataclass(frozen=True)
class HostStore(_SlotStore):
  """All experts in host memory, those of the next batches on the device.

  Attributes:
    num_slots: experts on the device; None: twice those of a batch.
  """

  _backing = backings.HostRows

  def open_for_reading(
    self, source: expert_sources.SavedExperts, abstract: parameters.Tables
  ) -> tuple[parameters.Tables, host_rows.RowsFrom]:
    """See `Store.open_for_reading`."""
    source.check((abstract, {}))
    dtype = expert_records.record_dtype(abstract, {})
    num_experts = jax.tree.leaves(abstract)[0].shape[0]
    with contextlib.closing(source):
      records = backings.all_records(source, dtype, num_experts)
    # Nothing is kept twice.
    return {}, kernel_cache.KernelCache(
      records.__getitem__, dtype, num_experts, most_bytes=0
    )


@dataclasses.dataclass(frozen=True)
class DiskStore(_SlotStore):
  """All experts in the model's folder, those of the next batches on the device.

  Attributes:
    num_slots: experts on the device; None: twice those of a batch.
  """

  _backing = backings.DiskRows

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
  """The store that suits tables of this size: on disk if they are large."""
  size = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
  )
  return DiskStore() if size > _LARGE else DeviceStore()
