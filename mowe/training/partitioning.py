"""The device mesh, and one table from logical axes to mesh axes."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import numpy as np
from flax.linen import partitioning as flax_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mowe.words.plans import sharded_plan, step_plans

MESH_AXES = ('data', 'expert', 'model')

# Logical axis -> mesh axis, or None for an axis that is not split. A new
# sharding is a new row.
LOGICAL_AXIS_RULES = (
  ('batch', ('data', 'expert')),
  ('vocab', 'model'),
  ('mlp', 'model'),
  ('heads', 'model'),
  ('joined_kv', 'model'),
  ('expert', 'expert'),
  ('expert_mlp', 'model'),
  ('unmodeled', None),
  ('embed', None),
  ('kv', None),
  ('length', None),
  ('relpos_buckets', None),
  ('memory_part', None),
  ('memory_row', None),
  ('branch', None),
  ('tap', None),
)


def make_mesh(
  *,
  data: int | None = None,
  expert: int = 1,
  model: int = 1,
  devices: list[Any] | None = None,
) -> Mesh:
  """Returns a mesh with the axes data, expert and model.

  Args:
    data: how many parts the batch is split into along this axis; None for as
      many as there are devices for.
    expert: how many parts expert tables are split into. The batch is split
      along this axis as well.
    model: how many parts kernels are split into.
    devices: the devices of the mesh; None for all devices.

  Raises:
    ValueError: the product of the axes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if data is None:
    data = max(1, len(devices) // (expert * model))
  if data * expert * model != len(devices):
    raise ValueError(
      'The mesh must use every device: data x expert x model must be '
      f'{len(devices)}, but is {data} x {expert} x {model} = '
      f'{data * expert * model}. Leave out `data` or change the others.'
    )
  # Axes of the type Auto, as explicit axes, jax's default, refuse gathers from
  # a sharded table.
  return jax.make_mesh(
    (data, expert, model),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
    devices=devices,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device has whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its rows go to data and expert axes together."""
  return NamedSharding(mesh, PartitionSpec(('data', 'expert')))


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that lie on devices of this process, <int>[n]."""
  rows = np.arange(batch_size)
  parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([rows[index] for index in parts.values()]))


def check_batch_size(
  batch_size: int, mesh: Mesh, num_microbatches: int
) -> None:
  """Raises ValueError unless every device gets rows of every microbatch."""
  unit = mesh.shape['data'] * mesh.shape['expert'] * num_microbatches
  if batch_size % unit:
    raise ValueError(
      'The batch size must be a multiple of data x expert x microbatches = '
      f'{mesh.shape["data"]} x {mesh.shape["expert"]} x {num_microbatches} = '
      f'{unit}, but is {batch_size}. Use {batch_size // unit * unit + unit}.'
    )


def parameter_axes(params_axes: Any) -> dict[tuple[str, ...], tuple[str, ...]]:
  """Logical axes of every parameter by its path.

  Args:
    params_axes: the collection of that name of the model's variables.
  """
  names = flax_partitioning.get_axis_names(params_axes)
  return {
    path: tuple(spec)
    for path, spec in flax.traverse_util.flatten_dict(
      flax.core.unfreeze(names)
    ).items()
  }


def sharding_of_axes(axes: tuple[str, ...], mesh: Mesh) -> NamedSharding:
  """The sharding of an array with these logical axes."""
  spec = flax_partitioning.logical_to_mesh_axes(axes, LOGICAL_AXIS_RULES)
  return NamedSharding(mesh, spec)


def state_shardings(
  state: Any, axes: dict[tuple[str, ...], tuple[str, ...]], mesh: Mesh
) -> Any:
  """The sharding of every leaf of a train state, as a tree like the state.

  A leaf whose path ends with that of a parameter, and which has as many axes,
  is the parameter or a moment of it, and is sharded like the parameter. Row
  state is split by expert, as its table is. The memory of earlier batches is
  split as batches are. Everything else is replicated.

  Args:
    state: the state, or one of abstract arrays.
    axes: path of a parameter -> the names of its logical axes.
    mesh: the mesh.

  Raises:
    ValueError: an axis does not divide evenly over its part of the mesh.
  """
  by_name = {'/'.join(path): names for path, names in axes.items()}

  def checked(keys, leaf, placed):
    for size, axis in zip(leaf.shape, placed.spec, strict=False):
      parts = mesh.shape.get(axis, 1)
      if size % parts:
        raise ValueError(
          f'Every array must divide evenly over the mesh, but {keys} has an '
          f'axis of {size} for {parts} devices of the mesh axis {axis!r}. '
          f'Make it {-(-size // parts) * parts}, or change the mesh.'
        )
    return placed

  def sharding(path, leaf):
    keys = jax.tree_util.keystr(path, simple=True, separator='/')
    for name, names in by_name.items():
      if f'/{keys}'.endswith(f'/{name}') and len(names) == leaf.ndim:
        return checked(keys, leaf, sharding_of_axes(names, mesh))
    if keys.startswith('memory/'):
      return batch_sharding(mesh)
    if keys.startswith('table_state/') and leaf.ndim:
      spec = PartitionSpec('expert', *[None] * (leaf.ndim - 1))
      return checked(keys, leaf, NamedSharding(mesh, spec))
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(sharding, state)


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
  """Puts arrays of the host on the devices; each process keeps its own rows."""
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, sharding, lambda index: x[index]
    ),
    batch,
  )


def abstract_batch(batch: Any, sharding: NamedSharding) -> Any:
  """What `put_batch` would put, as shapes that a program is compiled for."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
  )


def put_plan(
  plan: step_plans.StepPlan | None,
  mesh: Mesh,
  put: Callable[[Any, NamedSharding], Any] = put_batch,
) -> Any:
  """Puts the plan of a batch, or None, on the devices.

  An ExpertPlan goes to all devices, and each part of a ShardedPlan to its own
  device. Rows of memories go to all devices, and places of tokens go where
  their tokens are.

  Args:
    plan: the plan.
    mesh: the mesh of devices.
    put: puts a tree of arrays in a sharding, `put_batch` or `abstract_batch`.
  """
  if plan is None:
    return None
  return step_plans.StepPlan(
    _put_experts(plan.experts, mesh, put),
    {name: _put_rows(rows, mesh, put) for name, rows in plan.memories.items()},
  )


def _put_rows(plan, mesh, put):
  def put_places(places):
    # Places of several microbatches have another axis before the batch.
    is_cut = places.ndim > 3
    spec = PartitionSpec(*[None] * is_cut, ('data', 'expert'))
    return put(places, NamedSharding(mesh, spec))

  return plan._replace(
    rows=put(plan.rows, replicated(mesh)),
    places=jax.tree.map(put_places, plan.places),
  )


def _put_experts(plan, mesh, put):
  if not isinstance(plan, sharded_plan.ShardedPlan):
    return put(plan, replicated(mesh))

  def put_on(arrays, *axes):
    return put(arrays, NamedSharding(mesh, PartitionSpec(*axes)))

  def put_stream(stream):
    if stream is None:
      return None
    # Plans of several microbatches have another axis before those of devices.
    is_cut = stream.places.ndim > 3
    return put_on(stream, *[None] * is_cut, *sharded_plan.DEVICE_AXES)

  return sharded_plan.ShardedPlan(
    put_stream(plan.encoder),
    put_stream(plan.decoder),
    put_on(plan.updates, sharded_plan.DEVICE_AXES[1]),
  )


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Returns the function with the mesh as jax's current one while it is traced.

  Layers with experts then exchange tokens along the mesh axis `expert`; see
  `mowe.layers.dispatch.expert_parallel`.
  """

  def traced(*arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments)

  return traced
