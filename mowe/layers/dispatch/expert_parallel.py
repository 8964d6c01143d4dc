"""Experts on several devices: tokens travel to their experts and back.

Every device routes its own groups of tokens and plans their slots. One
all-to-all along the mesh axis `expert` brings the rows of all slots to the
devices that have the experts, a second one brings the results back. Kernels
stay where they are: no device ever holds those of another.

The mesh is jax's current one (`jax.sharding.use_abstract_mesh`). Its axes are
`data` and `expert`, which split groups, `expert`, which splits experts, and
`model`, which splits the hidden units of each expert. Without a mesh, or with
one part of `expert`, layers compute as if there were one device, and XLA may
split that as it likes.

Source: GShard, arXiv 2006.16668; axes as in flaxformer.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# Tokens are split along both, experts along the second.
TOKEN_AXES = ('data', 'expert')
EXPERT_AXIS = 'expert'
HIDDEN_AXIS = 'model'


def num_shards() -> int:
  """Parts that the current mesh splits experts into; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(EXPERT_AXIS, 1)


class Stage(NamedTuple):
  """What a stage of a layer gives, each of it or None.

  Attributes:
    outputs: <float>[groups, tokens, embed], which are added up over parts of
      the hidden units.
    units: <float>[groups, tokens, selected, hidden units]; each device has its
      part of the units.
    own: tree of arrays that the next stage gets on the same device.
    sums: tree of sums over tokens, which are added up over devices.
  """

  outputs: jax.Array | None = None
  units: jax.Array | None = None
  own: Any = None
  sums: Any = None


def run(
  stage: Callable[..., Stage],
  *,
  kernels: dict[str, jax.Array],
  groups: dict[str, jax.Array | None] | None = None,
  units: dict[str, jax.Array] | None = None,
  own: dict[str, Any] | None = None,
  shared: dict[str, Any] | None = None,
) -> Stage:
  """Runs `stage` on each device's groups, experts and hidden units.

  Args:
    stage: takes all of the arrays by name, and `kernels`. It exchanges rows
      with other devices itself (`Dispatch.across`).
    kernels: `wo` and `out`, <float>[expert, expert_mlp, embed], `wo_bias`,
      <float>[expert, embed]; all others are <float>[expert, embed, expert_mlp],
      or biases <float>[expert, expert_mlp].
    groups: arrays <...>[groups, ...].
    units: arrays as `Stage.units`.
    own: by name, what earlier stages gave as their `own`.
    shared: what every device reads whole.

  Returns:
    What the stage gives, of all groups.

  Raises:
    ValueError: groups, experts or hidden units do not divide evenly.
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
    # Where copies begin to differ, their gradients are added up: those of
    # tokens over hidden units, those of kernels over the data.
    copied = functools.partial(jax.lax.pcast, to='varying')
    if 'tokens' in groups:
      groups = groups | {'tokens': copied(groups['tokens'], HIDDEN_AXIS)}
    kernels = copied(kernels, 'data')
    if _OUTER_BIAS in kernels:
      # Of all parts of the hidden units the first adds it.
      is_first = jax.lax.axis_index(HIDDEN_AXIS) == 0
      kernels |= {_OUTER_BIAS: kernels[_OUTER_BIAS] * is_first}
    given = stage(**groups, **units, **own, **shared, kernels=kernels)
    return Stage(
      outputs=jax.lax.psum(given.outputs, HIDDEN_AXIS),
      units=given.units,
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
    out_specs=Stage(of_tokens, of_units, of_tokens, PartitionSpec()),
  )(*parts, kernels)


# Kernels that read hidden units, and the bias that is added after them.
_OUTER = ('wo', 'out')
_OUTER_BIAS = 'wo_bias'


def _of_kernel(name, array):
  if name == _OUTER_BIAS:
    return PartitionSpec(EXPERT_AXIS)
  if name in _OUTER:
    return PartitionSpec(EXPERT_AXIS, HIDDEN_AXIS)
  return PartitionSpec(EXPERT_AXIS, *(None,) * (array.ndim - 2), HIDDEN_AXIS)


def _sizes(kernels):
  """Experts and hidden units."""
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
  """Raises ValueError unless all of it divides evenly over the mesh.

  Args:
    mesh_shape: devices along each axis.
    num_groups: groups of tokens.
    num_experts: experts of the layer.
    expert_dim: hidden units of one expert.
    names: what the layer calls the last two.
  """
  data, expert, model = (
    mesh_shape[axis] for axis in (*TOKEN_AXES, HIDDEN_AXIS)
  )
  if num_groups % (data * expert):
    raise ValueError(
      'The groups of tokens must be a multiple of data x expert devices, '
      f'{data} x {expert} = {data * expert}, so that each routes whole groups, '
      f'but there are {num_groups}. Set multiple of TokenGroups to '
      f'{data * expert}: what a group is never follows from the mesh.'
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
  """Pairs <int32>[slots] of this device, counted over all devices.

  Args:
    pairs: counted over the groups of this device.
    num_pairs: pairs of each device.
  """
  return pairs + jax.lax.axis_index(TOKEN_AXES) * num_pairs


def own_units(units: jax.Array) -> jax.Array:
  """This device's part of the hidden units <...>[rows, expert_mlp]."""
  size = units.shape[1] // jax.lax.axis_size(HIDDEN_AXIS)
  start = jax.lax.axis_index(HIDDEN_AXIS) * size
  return jax.lax.dynamic_slice_in_dim(units, start, size, axis=1)
