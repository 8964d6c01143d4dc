"""Tests what a dry run tells before a run, and that it holds.

Also tests `compiled_step` and `step_time`.
"""

import dataclasses
import re

import jax
import pytest
import small_runs

from mowe.commands import train
from mowe.commands.ahead import compiled_step, dry_run, step_time
from mowe.stores import expert_stores
from mowe.training import partitioning
from mowe.training.compiling import compile_ahead, program_facts


def test_a_dry_run_writes_nothing(world, tmp_path, capsys):
  dry_run.dry_run(world.training(tmp_path / 'run', 2))
  assert not (tmp_path / 'run').exists()
  shown = capsys.readouterr().out
  for part in ('Parameters', 'experts', 'active per token', 'forward FLOPs'):
    assert part in shown
  assert '(8, 18)' in shown and 'decoder_target_tokens (8, 11)' in shown
  assert re.search(
    r'^Memory +[\d.]+ MiB of [\d.]+ GiB on each device: ', shown, re.MULTILINE
  )
  assert 'Exchanges' not in shown and 'Roofline' not in shown


def test_a_dry_run_measures_steps(world, tmp_path, capsys, monkeypatch):
  store = expert_stores.DiskStore(num_slots=small_runs.NUM_EXPERTS)
  training = world.training(tmp_path / 'run', 300, store=store)
  monkeypatch.setattr(step_time, '_MOST_STEPS', 3)
  dry_run.dry_run(training, is_measured=True)
  assert not (tmp_path / 'run').exists()
  shown = capsys.readouterr().out
  assert re.search(
    r'^Time +a step takes [\d.e-]+ s \(median of 3\), the first one .* all 300 '
    r'take about ',
    shown,
    re.MULTILINE,
  )


def test_steps_and_seconds_are_those_of_a_run():
  taken = step_time.StepTime(30.0, 0.5, 10)
  assert taken.of_steps(1) == 30.0 and taken.of_steps(61) == 60.0
  assert taken.steps_in(60.0) == 120 and taken.steps_in(0.1) == 1


def _compiled(training):
  mesh = training.make_mesh()
  training.check(mesh)
  return compiled_step.compile_step(
    training, train.Prepared.make(training, mesh)
  )


@pytest.mark.slow
def test_tables_have_the_rows_that_a_store_keeps_on_the_device(world, tmp_path):
  few = expert_stores.HostStore(num_slots=11)
  step = _compiled(world.training(tmp_path / 'run', 2, store=few))
  whole = _compiled(world.training(tmp_path / 'run', 2))
  saved = (
    program_facts.memory(whole.program).arguments
    - program_facts.memory(step.program).arguments
  )
  # The three kernels have 12 x 4 numbers in float32. Their optimizer's state
  # comes on top.
  of_one = 3 * 12 * 4 * 4
  fewer = small_runs.NUM_EXPERTS - 11
  assert fewer * of_one < saved < 2 * fewer * of_one


@pytest.mark.slow
def test_several_devices_exchange(world, tmp_path, capsys):
  make_mesh = lambda devices=None: partitioning.make_mesh(
    data=1, expert=2, devices=jax.devices()[:2]
  )
  dry_run.dry_run(world.training(tmp_path / 'run', 2, make_mesh=make_mesh))
  shown = capsys.readouterr().out
  assert re.search(r'^Exchanges +\d+ all-', shown, re.MULTILINE)


def test_a_topology_gets_a_roofline(world, tmp_path, capsys, monkeypatch):
  # A device of this machine stands for one whose compiler is not installed.
  here = jax.devices()[:1]
  monkeypatch.setattr(compile_ahead.Topology, 'devices', lambda self: here)
  one = compile_ahead.Topology.parse('v5e:1x1')
  training = world.training(tmp_path / 'run', 2)
  training = dataclasses.replace(training, make_mesh=partitioning.make_mesh)
  dry_run.dry_run(training, one)
  shown = capsys.readouterr().out
  assert 'of 16.0 GiB' in shown
  assert re.search(r'^Roofline +a step takes at least', shown, re.MULTILINE)
  # The widest matrix is 12 x 14, of which a tile has 8 x 128.
  assert re.search(
    r'^Advice .* \d\d% of that of parameters is padding', shown, re.MULTILINE
  )


def test_a_step_that_does_not_fit_gets_advice(world, tmp_path, capsys):
  training = world.training(tmp_path / 'run', 2)
  mesh = training.make_mesh()
  prepared = train.Prepared.make(training, mesh)
  small = program_facts.Memory(1, 0, 2 * 2**30, 0)
  large = program_facts.Memory(90 * 2**30, 0, 2 * 2**30, 0)
  chip = compile_ahead.Topology.parse('v4:2x2x1')
  advise = lambda memory: list(dry_run._memory_advice(prepared, memory, chip))
  assert advise(small) == []
  (said,) = advise(large)
  assert 'needs 92.0 GiB of 32.0 GiB. State is most of it' in said
  (said,) = advise(large._replace(arguments=1, temporary=90 * 2**30))
  assert 'take more NUM_MICROBATCHES' in said
