"""Experts on several devices: tokens travel to their experts and back.

Every device routes its own groups of tokens and plans their slots. One
all-to-all along the mesh axis `expert` brings the rows of all slots to the
devices that have the experts. A second one brings the results back. Kernels
stay where they are: no device ever holds those of another.

The mesh is JAX's current one (`jax.sharding.use_abstract_mesh`). Groups are
split over the axes `data` and `expert` together, experts over `expert`, and the
hidden units of each expert over `model`. Without a mesh, or if the axis
`expert` has size 1, layers compute as if there were one device, and XLA decides
how to split that.

Source: GShard, arXiv 2006.16668. The axes are those of flaxformer.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# The mesh axes that tokens, experts and hidden units are split over.
TOKEN_AXES = ('data', 'expert')
EXPERT_AXIS = 'expert'
HIDDEN_AXIS = 'model'


def num_shards() -> int:
  """Returns into how many parts the mesh splits experts; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(EXPERT_AXIS, 1)


class StageResults(NamedTuple):
  """The results of one stage of a layer, on one device or on all.

  A stage sets the fields that it has; the others are None. `run` turns the
  results of each device into those of all.

  Attributes:
    outputs: <float>[groups, tokens, embed]. Each device computes its part of
      the hidden units, and `run` adds up the outputs of all parts.
    units: <float>[groups, tokens, selected, hidden units], of which each device
      has its part of the units.
    own: tree of arrays that the next stage gets back on the same device.
    sums: tree of sums over tokens, which `run` adds up over devices.
  """

  outputs: jax.Array | None = None
  units: jax.Array | None = None
  own: Any = None
  sums: Any = None


def run(
  stage: Callable[..., StageResults],
  *,
  kernels: dict[str, jax.Array],
  groups: dict[str, jax.Array | None] | None = None,
  units: dict[str, jax.Array] | None = None,
  own: dict[str, Any] | None = None,
  shared: dict[str, Any] | None = None,
) -> StageResults:
  """Runs `stage` on each device's groups, experts and hidden units.

  Args:
    stage: function that takes all of the arrays below by name, and `kernels`.
      It exchanges rows with other devices itself, with a dispatch that
      `Dispatch.across` made.
    kernels: arrays by name. `wo` and `out` are <float>[expert, expert_mlp,
      embed], `wo_bias` is <float>[expert, embed]. All others are
      <float>[expert, embed, expert_mlp], or biases <float>[expert, expert_mlp].
    groups: arrays <...>[groups, ...] by name, split over groups.
    units: arrays by name, with the axes of `StageResults.units`.
    own: by name, the `StageResults.own` of earlier stages.
    shared: arrays by name that every device reads as a whole.

  Returns:
    The results of the stage for all groups.

  Raises:
    ValueError: groups, experts or hidden units cannot be split evenly.
  """
  parts = groups or {}, units or {}, own or {}, shared or {}
  if num_shards() == 1:
    everything = functools.reduce(operator.or_, parts)
    return stage(**everything, kernels=kernels)
  mesh = jax.sharding.get_abstract_mesh()
  num_groups = next(iter((parts[0] | parts[1]).values())).shape[0]
  check_sizes(mesh.shape, num_groups, *_sizes(kernels))
  of_tokens = PartitionSpec(TOKEN_AXES)
  of_units = PartitionSpec(TOKEN_AXES, None, None, HIDDEN_AXIS)

  def on_device(groups, units, own, shared, kernels):
    # Devices along `model` have copies of the same tokens, and devices along
    # `data` copies of the same kernels. `pcast` says that what follows differs
    # between the copies. Its transpose adds up the gradients of all copies.
    copied = functools.partial(jax.lax.pcast, to='varying')
    if 'tokens' in groups:
      groups = groups | {'tokens': copied(groups['tokens'], HIDDEN_AXIS)}
    kernels = copied(kernels, 'data')
    if _OUTER_BIAS in kernels:
      # Outputs are summed over the parts of the hidden units, so only the first
      # part adds the bias.
      is_first = jax.lax.axis_index(HIDDEN_AXIS) == 0
      kernels |= {_OUTER_BIAS: kernels[_OUTER_BIAS] * is_first}
    given = stage(**groups, **units, **own, **shared, kernels=kernels)
    return StageResults(
      outputs=jax.lax.psum(given.outputs, HIDDEN_AXIS),
      units=given.units,
      # A scalar has no axis along which the devices' values could be joined.
      own=jax.tree.map(jnp.atleast_1d, given.own),
      sums=jax.lax.psum(given.sums, TOKEN_AXES),
    )

  return jax.shard_map(
    on_device,
    in_specs=(
      of_tokens,
      of_units,
      of_tokens,
      PartitionSpec(),
      {name: _of_kernel(name, array) for name, array in kernels.items()},
    ),
    out_specs=StageResults(of_tokens, of_units, of_tokens, PartitionSpec()),
  )(*parts, kernels)


# The kernels whose inputs are hidden units, and the bias that is added to the
# outputs of `wo`.
_OUTER = ('wo', 'out')
_OUTER_BIAS = 'wo_bias'


def _of_kernel(name, array):
  """Over which mesh axes a kernel or a bias is split."""
  if name == _OUTER_BIAS:
    return PartitionSpec(EXPERT_AXIS)
  if name in _OUTER:
    return PartitionSpec(EXPERT_AXIS, HIDDEN_AXIS)
  return PartitionSpec(EXPERT_AXIS, *(None,) * (array.ndim - 2), HIDDEN_AXIS)


def _sizes(kernels):
  """Number of experts, and of hidden units of one expert."""
  name, array = next(
    (name, array) for name, array in kernels.items() if array.ndim == 3
  )
  return array.shape[0], array.shape[1 if name in _OUTER else 2]


def check_sizes(
  mesh_shape: Mapping[str, int],
  num_groups: int,
  num_experts: int,
  expert_dim: int,
  names: tuple[str, str] = ('num_experts', 'expert_dim'),
) -> None:
  """Raises ValueError unless the layer can be split evenly over the mesh.

  Args:
    mesh_shape: number of devices along each mesh axis, by the axis's name.
    num_groups: number of groups of tokens.
    num_experts: number of experts of the layer.
    expert_dim: number of hidden units of one expert.
    names: the layer's names for `num_experts` and `expert_dim`, for messages.
  """
  data, expert, model = (
    mesh_shape[axis] for axis in (*TOKEN_AXES, HIDDEN_AXIS)
  )
  if num_groups % (data * expert):
    raise ValueError(
      'The groups of tokens must be a multiple of data x expert devices, '
      f'{data} x {expert} = {data * expert}, so that each routes whole groups, '
      f'but there are {num_groups}. Set multiple of TokenGroups to '
      f'{data * expert}. The mesh does not set it, so that groups are the same '
      'on every mesh.'
    )
  for name, size, axis, parts in (
    (names[0], num_experts, EXPERT_AXIS, expert),
    (names[1], expert_dim, HIDDEN_AXIS, model),
  ):
    if size % parts:
      raise ValueError(
        f'{name} must be a multiple of the mesh axis {axis!r}, {parts}, but is '
        f'{size}. Make it {-(-size // parts) * parts}, or change the mesh.'
      )


def number_pairs(pairs: jax.Array, num_pairs: int) -> jax.Array:
  """Numbers the pairs of this device over all devices.

  Args:
    pairs: <int32>[slots], counted over the groups of this device.
    num_pairs: number of pairs of one device.

  Returns:
    <int32>[slots].
  """
  return pairs + jax.lax.axis_index(TOKEN_AXES) * num_pairs


def own_units(units: jax.Array) -> jax.Array:
  """Returns this device's part of the hidden units.

  Args:
    units: [rows, expert_mlp], all units.

  Returns:
    [rows, expert_mlp / devices along the axis `model`].
  """
  size = units.shape[1] // jax.lax.axis_size(HIDDEN_AXIS)
  start = jax.lax.axis_index(HIDDEN_AXIS) * size
  return jax.lax.dynamic_slice_in_dim(units, start, size, axis=1)
