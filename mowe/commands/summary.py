"""Prints what a run is about to do: parameters, FLOPs, batches, devices."""

from typing import Any

import flax
import jax
import numpy as np
import rich.console
import rich.table

from mowe.data import batch_source
from mowe.models import model_config, parameters
from mowe.models.families import costs
from mowe.training.optimization import optimizers
from mowe.words import placement

# If the busiest block has more than this times the mean load, a remedy is
# printed.
_UNEVEN = 1.2


def show(
  state: Any,
  data: Any,
  batches: batch_source.BatchSource,
  mesh: jax.sharding.Mesh,
  config: model_config.ModelConfig,
  freeze_experts: bool,
  optimizer: optimizers.Optimizer,
) -> None:
  """Prints the table of parameters and the sizes of a run, before it starts.

  Args:
    state: the abstract TrainState, which has shapes instead of arrays.
    data: the DataConfig of the run.
    batches: what `data.open` returned.
    mesh: the mesh of devices.
    config: the config of the model.
    freeze_experts: whether the expert tables are frozen.
    optimizer: the optimizer of ordinary parameters.
  """
  console = rich.console.Console(
    highlight=False, soft_wrap=True, color_system=None
  )
  cost = costs.model_costs(
    config, parameters.merge_tables(state.params, state.tables)
  )
  tables = jax.tree.leaves(state.tables) if freeze_experts else []
  frozen_tables = sum(int(np.prod(leaf.shape)) for leaf in tables)
  rows = 'experts, memories' if config.memories else 'experts'
  console.print(
    _parameter_table(
      state.params, cost, optimizer.num_frozen, frozen_tables, rows
    )
  )
  shapes = ', '.join(
    f'{name} {tuple(array.shape)}'
    for name, array in batches.first_batch.items()
  )
  mesh_shape = ' x '.join(f'{n} {name}' for name, n in mesh.shape.items())
  console.print(f'Batch      {shapes}')
  console.print(f'Data       {data.mixture_or_task_name}')
  for task, counts in batches.report().items():
    said = ', '.join(f'{name} {count:,}' for name, count in counts.items())
    console.print(f'  {task}: {said}')
  console.print(f'Devices    {mesh_shape}')


def show_experts(
  routing: Any, seen_loads: np.ndarray, mesh: jax.sharding.Mesh
) -> None:
  """Prints how evenly the blocks of word experts are loaded.

  Prints nothing if all experts are in one block.

  Args:
    routing: the RoutingVocabulary of the model.
    seen_loads: <int64>[num_experts], tokens of each expert in the trial
      batches.
    mesh: the mesh of devices; its axis `expert` has one block for each part.
  """
  num_blocks = mesh.shape['expert']
  if num_blocks == 1:
    return
  expected, seen = (
    placement.balance(loads, num_blocks).max_over_mean
    for loads in (routing.loads().shares, seen_loads)
  )
  print(
    f'Experts    {num_blocks} blocks of {routing.num_experts // num_blocks:,}; '
    f'the busiest has {expected:.2f} times the mean load by the counts of '
    f'words, {seen:.2f} times in trial batches'
  )
  hot = placement.describe_hot_words(routing, num_blocks)
  if hot:
    print(hot)
  elif expected > _UNEVEN:
    print(
      'Blocks of experts should be evenly loaded, but the busiest has '
      f'{expected:.2f} times the mean load, so all devices wait for it. Build '
      'the routing vocabulary with --num_blocks, such as 128. A model that is '
      'already trained must keep its routing vocabulary.'
    )


def _parameter_table(params, cost, num_frozen, frozen_tables, rows):
  table = rich.table.Table(title='Parameters', title_justify='left')
  table.add_column('part')
  for column in ('total', 'active per token', 'frozen'):
    table.add_column(column, justify='right')
  groups: dict[str, int] = {}
  frozen = {'experts': frozen_tables}
  for path, leaf in flax.traverse_util.flatten_dict(params).items():
    group = '/'.join(path[:1] if path[0] == 'token_embedder' else path[:2])
    if costs.is_expert(path):
      group = 'experts'
    else:
      groups[group] = groups.get(group, 0) + int(np.prod(leaf.shape))
    frozen[group] = frozen.get(group, 0) + num_frozen(path, leaf.shape)
  for group, count in groups.items():
    table.add_row(group, f'{count:,}', f'{count:,}', f'{frozen[group]:,}')
  if cost.expert_parameters:
    table.add_row(
      rows,
      f'{cost.expert_parameters:,}',
      f'{cost.active_expert_parameters:,}',
      f'{frozen["experts"]:,}',
    )
  table.add_section()
  table.add_row(
    'all',
    f'{cost.total_parameters:,}',
    f'{cost.active_parameters:,}',
    f'{sum(frozen.values()):,}',
  )
  table.caption = (
    f'forward FLOPs: {cost.flops_per_input_token:,} per input token, '
    f'{cost.flops_per_target_token:,} per target token (without attention '
    'scores)'
  )
  table.caption_justify = 'left'
  return table
