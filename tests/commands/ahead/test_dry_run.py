"""Tests what a dry run tells before a run, and that it holds.

Also tests `compiled_step`.
"""

import re

import jax
import pytest
import small_runs

from mowe.commands import train
from mowe.commands.ahead import compiled_step, dry_run
from mowe.stores import expert_stores
from mowe.training import partitioning
from mowe.training.compiling import program_facts


def test_a_dry_run_writes_nothing(world, tmp_path, capsys):
  dry_run.dry_run(world.training(tmp_path / 'run', 2))
  assert not (tmp_path / 'run').exists()
  shown = capsys.readouterr().out
  for part in ('Parameters', 'experts', 'active per token', 'forward FLOPs'):
    assert part in shown
  assert '(8, 18)' in shown and 'decoder_target_tokens (8, 11)' in shown
  assert re.search(r'^Memory +[\d.]+ MiB on each device: ', shown, re.MULTILINE)
  assert 'Exchanges' not in shown and 'Roofline' not in shown


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
