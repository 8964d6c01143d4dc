"""`mowe train --dry_run`: says what a run would be and need, and starts none."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mowe.commands import train
from mowe.commands.ahead import compiled_step, run_plan, step_time
from mowe.models import parameters
from mowe.models.families import costs
from mowe.training import progress_lines
from mowe.training.compiling import compile_ahead, program_facts, roofline

# A backward pass has two products for each one of the forward pass.
_PASSES = 3
# Rows and columns of a tile in a TPU's memory, into which arrays are padded.
_TILE = (8, 128)
# Shares from which a remedy is worth a line.
_MUCH_PADDING, _MUCH_MEMORY = 0.1, 0.1


def dry_run(
  training: train.Training,
  topology: compile_ahead.Topology | None = None,
  *,
  is_measured: bool = False,
) -> None:
  """Prepares a run and compiles its step, and prints what it found.

  Nothing is written, but for the compiled program in JAX's cache, where the run
  finds it.

  Args:
    training: all parts and settings of the run.
    topology: the devices that the run is to have, which need not be there; None
      for the devices of this machine.
    is_measured: whether a few steps are made on the devices of this machine,
      to say how long the run takes. What they trained is thrown away.

  Raises:
    ValueError: parts do not fit together.
    ModuleNotFoundError: the compiler for the topology is not installed.
  """
  if topology is None:
    mesh = training.make_mesh()
  else:
    mesh = training.make_mesh(devices=topology.devices())
  training.check(mesh)
  prepared = train.Prepared.make(training, mesh)
  prepared.show(training)
  for line in run_plan.lines(training, prepared):
    print(line)
  print('Compiling the step ...', flush=True)
  step = compiled_step.compile_step(
    training, prepared, topology.compiler_options if topology else {}
  )
  print(f'Compiled   in {step.seconds:.1f} s, with tracing')
  text = step.program.as_text()
  memory = program_facts.memory(step.program)
  print(
    f'Memory     {run_plan.in_words(memory.peak)}{_room(mesh, topology)} on each device: '
    f'{run_plan.in_words(memory.arguments)} of state and batch, {run_plan.in_words(memory.temporary)} '
    f'while a step runs, {run_plan.in_words(memory.results)} of results, '
    f'{run_plan.in_words(memory.program)} of program'
  )
  exchanges = program_facts.collectives(text)
  if mesh.size > 1:
    _show_exchanges(exchanges)
  copies = program_facts.table_copies(text, step.table_sizes)
  if step.table_sizes:
    print(f'Tables     {_tables_said(copies)}')
  if is_measured:
    print(f'Time       {_time(training, prepared)}')
  advice = [*_memory_advice(prepared, memory, topology)]
  if topology is not None:
    _show_roofline(training, prepared, step, exchanges, topology)
    if topology.chip.platform == 'tpu':
      advice += _padding_advice(prepared)
  for line in advice:
    print(f'Advice     {line}')


def _time(training, prepared) -> str:
  taken = step_time.measure(training, prepared)
  whole = progress_lines.duration(taken.of_steps(training.total_steps))
  return (
    f'a step takes {taken.seconds:.3g} s (median of {taken.num_steps}), the '
    f'first one {taken.first_seconds:.3g} s; all {training.total_steps:,} take '
    f'about {whole}, without saving and evaluations'
  )


def _show_exchanges(exchanges):
  said = ', '.join(
    f'{one.number} {kind} of {one.result_bytes / 2**20:,.1f} MiB'
    for kind, one in exchanges.items()
  )
  print(f'Exchanges  {said or "none"}, on each device')


def _tables_said(copies: list[str]) -> str:
  if not copies:
    return 'no instruction of the program copies a whole table'
  return (
    f'{len(copies)} instructions of the program copy a whole table, the first: '
    f'{copies[0][:100]}'
  )


def _show_roofline(training, prepared, step, exchanges, topology):
  """Prints the least time of a step, and what takes it."""
  num_chips = prepared.setup.mesh.size
  of_model = _model_flops(training, prepared, step.batch) / num_chips
  counted, traffic = program_facts.flops_and_bytes(step.program)
  # XLA counts what is in a loop once, and nothing at all for GPUs.
  flops = max(of_model, counted or 0)
  least = roofline.roofline(
    topology.chip,
    num_chips=num_chips,
    flops=flops,
    memory_bytes=step.least_bytes,
    collectives=exchanges,
  )
  share = of_model / topology.chip.flops / least.seconds
  print(
    f'Roofline   a step takes at least {_ms(least.seconds)}, for '
    f'{least.cause}: compute {_ms(least.compute)} ({flops / 1e12:,.3g} TFLOP '
    f'on each device), memory {_ms(least.memory)} '
    f'({step.least_bytes / 1e9:,.3g} GB of state and batch), '
    f'links {_ms(least.links)}. The share of peak FLOPs (MFU) is at most '
    f'{share:.0%}'
  )
  if traffic is not None:
    print(
      f'Traffic    XLA counts {traffic / 1e9:,.3g} GB that are read and written, '
      f'{_ms(traffic / topology.chip.memory_speed)} for the memory if none of it '
      'stays on the chip'
    )


def _model_flops(training, prepared, batch) -> float:
  """FLOPs of a step, forward and backward, without attention scores."""
  state = prepared.setup.abstract
  cost = costs.model_costs(
    training.model, parameters.merge_tables(state.params, state.tables)
  )
  inputs = batch.get('encoder_input_tokens')
  forward = cost.flops_per_target_token * batch['decoder_target_tokens'].size
  if inputs is not None:
    forward += cost.flops_per_input_token * inputs.size
  return _PASSES * forward


def _memory_advice(prepared, memory, topology) -> Iterable[str]:
  """What would make a step fit, or leave room for more."""
  mesh = prepared.setup.mesh
  room = _memory_of_device(mesh, topology)
  if room is None:
    return
  table_bytes = sum(
    np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(prepared.setup.abstract.tables)
    if leaf.dtype == np.float32
  )
  if memory.peak > room:
    yield (
      f'The step does not fit: it needs {run_plan.in_words(memory.peak)} of {run_plan.in_words(room)}. '
      + (
        'State is most of it: split it over more devices '
        '(partitioning.make_mesh.expert or .model).'
        if memory.arguments > memory.temporary
        else 'What is needed while a step runs is most of it: take more '
        'NUM_MICROBATCHES, a smaller BATCH_SIZE, or more devices.'
      )
    )
  if table_bytes > _MUCH_MEMORY * room:
    yield (
      f"TABLE_DTYPE = 'bfloat16' saves {run_plan.in_words(table_bytes / 2)} on each device; "
      'updates are then rounded stochastically.'
    )


def _padding_advice(prepared) -> Iterable[str]:
  """Names the parameter that loses the most memory to tiles."""
  state = prepared.setup.abstract
  leaves = jax.tree_util.tree_leaves_with_path(
    parameters.merge_tables(state.params, state.tables)
  )
  lost, whole, worst = 0, 0, (0, '', ())
  for path, leaf in leaves:
    shape = leaf.sharding.shard_shape(leaf.shape)
    if len(shape) < 2:
      continue
    size = int(np.prod(shape))
    padding = size // (shape[-2] * shape[-1]) * _padded(*shape[-2:]) - size
    lost, whole = lost + padding, whole + size
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    worst = max(worst, (padding, name, shape))
  if lost > _MUCH_PADDING * whole:
    _, name, shape = worst
    yield (
      f'Memory of a TPU has tiles of {_TILE[0]} x {_TILE[1]} numbers, and '
      f'{lost / (lost + whole):.0%} of that of parameters is padding; most of '
      f'it in {name} of {" x ".join(map(str, shape))}. Widths that are '
      f'multiples of {_TILE[1]} have none.'
    )


def _padded(outer: int, inner: int) -> int:
  """Numbers of a matrix with its padding, in the better order of its axes."""
  rows, columns = _TILE
  up = lambda size, unit: -(-size // unit) * unit
  return min(
    up(outer, rows) * up(inner, columns), up(inner, rows) * up(outer, columns)
  )


def _room(mesh, topology) -> str:
  room = _memory_of_device(mesh, topology)
  return '' if room is None else f' of {run_plan.in_words(room)}'


def _memory_of_device(mesh: Any, topology: Any) -> int | None:
  """Bytes of memory of a device; None if it does not say.

  The devices of a CPU share its memory.
  """
  if topology is not None:
    return topology.chip.memory_bytes
  device = mesh.devices.flat[0]
  if device.platform == 'cpu':
    return _memory_of_machine() // len(mesh.local_devices)
  return (device.memory_stats() or {}).get('bytes_limit')


def _memory_of_machine() -> int:
  """Bytes that this process may have: those of its container, if in one."""
  limits = [os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
  limit = pathlib.Path('/sys/fs/cgroup/memory.max')
  if limit.exists() and (text := limit.read_text().strip()).isdigit():
    limits.append(int(text))
  return min(limits)


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:,.3g} ms'
