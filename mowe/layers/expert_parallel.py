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
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

# Tokens are split along both, experts along the second.
TOKEN_AXES = ('data', 'expert')
EXPERT_AXIS = 'expert'
HIDDEN_AXIS = 'model'


def num_shards() -> int:
  """Parts that the current mesh splits experts into; 1 without a mesh."""
  return jax.sharding.get_abstract_mesh().shape.get(EXPERT_AXIS, 1)


def shard(
  mixture: Callable[..., Any],
  *,
  groups: dict[str, jax.Array | None],
  kernels: dict[str, jax.Array],
  shared: dict[str, Any],
) -> tuple[jax.Array, Any]:
  """Runs `mixture` on each device's groups, experts and hidden units.

  Args:
    mixture: takes all arrays by name, and `kernels`; gives outputs
      [groups, tokens, embed], which are added up over parts of the hidden
      units, and a tree of sums over tokens, which are added up over devices.
      It exchanges rows with other devices itself (`Dispatch.across`).
    groups: arrays <...>[groups, ...], among them `tokens`.
    kernels: <float>[expert, embed, expert_mlp], biases <float>[expert,
      expert_mlp], and `wo`, <float>[expert, expert_mlp, embed].
    shared: what every device reads whole.

  Returns:
    Outputs and sums of all groups.

  Raises:
    ValueError: groups, experts or hidden units do not divide evenly.
  """
  mesh = jax.sharding.get_abstract_mesh()
  num_experts, expert_dim, _ = kernels['wo'].shape
  check_sizes(mesh.shape, groups['tokens'].shape[0], num_experts, expert_dim)
  of_tokens = PartitionSpec(TOKEN_AXES)

  def of_kernel(name, array):
    if name == 'wo':
      return PartitionSpec(EXPERT_AXIS, HIDDEN_AXIS)
    return PartitionSpec(EXPERT_AXIS, *(None,) * (array.ndim - 2), HIDDEN_AXIS)

  def on_device(groups, kernels, shared):
    # Where copies begin to differ, their gradients are added up: those of
    # tokens over hidden units, those of kernels over the data.
    copied = functools.partial(jax.lax.pcast, to='varying')
    tokens = copied(groups['tokens'], HIDDEN_AXIS)
    own = copied(kernels, 'data')
    outputs, sums = mixture(
      **groups | {'tokens': tokens}, kernels=own, **shared
    )
    return jax.lax.psum(outputs, HIDDEN_AXIS), jax.lax.psum(sums, TOKEN_AXES)

  return jax.shard_map(
    on_device,
    in_specs=(
      of_tokens,
      {name: of_kernel(name, array) for name, array in kernels.items()},
      PartitionSpec(),
    ),
    out_specs=(of_tokens, PartitionSpec()),
  )(groups, kernels, shared)


def check_sizes(
  mesh_shape: Mapping[str, int],
  num_groups: int,
  num_experts: int,
  expert_dim: int,
) -> None:
  """Raises ValueError unless all of it divides evenly over the mesh."""
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
    ('num_experts', num_experts, EXPERT_AXIS, expert),
    ('expert_dim', expert_dim, HIDDEN_AXIS, model),
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
