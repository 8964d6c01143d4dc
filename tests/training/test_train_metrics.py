"""Tests metrics: exact merging, lines that survive a kill, no TensorFlow."""

import importlib.machinery
import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mowe.training import train_metrics


def test_merging_weighs_by_count():
  # Two tokens have the mean 1 and six have the mean 3, so all have (2 + 18) / 8
  # and not 2.
  first = train_metrics.Mean.of(jnp.full(2, 1.0))
  second = train_metrics.Mean.of(
    jnp.array([3.0] * 6 + [100.0]), jnp.array([1.0] * 6 + [0.0])
  )
  assert first.merge(second).compute() == pytest.approx(2.5)
  assert math.isnan(train_metrics.Mean(0.0, 0.0).compute())


def test_merging_by_name_and_under_jit():
  a = {
    'loss': train_metrics.Mean(2.0, 1.0),
    'only_a': train_metrics.Mean(1.0, 1.0),
  }
  b = {
    'loss': train_metrics.Mean(4.0, 3.0),
    'only_b': train_metrics.Mean(5.0, 2.0),
  }
  merged = jax.jit(train_metrics.merge)(a, b)
  expected = {'loss': 1.5, 'only_a': 1.0, 'only_b': 2.5}
  assert train_metrics.compute(merged) == pytest.approx(expected)


def test_json_lines_append_and_resume(tmp_path):
  path = tmp_path / 'run' / 'metrics.jsonl'
  writer = train_metrics.JsonLinesWriter(path)
  for step in (1, 2, 3):
    writer.write(step, {'loss': np.float32(step) / 2})
    # Each line is flushed at once, so another reader sees it.
    assert train_metrics.read_json_lines(path)[-1] == {
      'step': step,
      'loss': step / 2,
    }
  writer.close()
  with path.open('a') as file:
    file.write('{"step": 4, "lo')
  writer = train_metrics.JsonLinesWriter(path, resume_step=2)
  writer.write(3, {'loss': float('nan')})
  writer.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {'step': 1, 'loss': 0.5},
    {'step': 2, 'loss': 1.0},
    {'step': 3, 'loss': None},
  ]
  assert [p.name for p in path.parent.iterdir()] == ['metrics.jsonl']


def test_a_foreign_file_is_refused(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\nhello\n')
  with pytest.raises(ValueError, match="line 2 is 'hello.*Repair that line"):
    train_metrics.JsonLinesWriter(path)
  assert path.read_text() == '{"step": 1}\nhello\n'


def test_tensorboard_without_tensorflow(tmp_path):
  # A process of its own is needed, as another test may have imported
  # TensorFlow.
  script = textwrap.dedent(f"""
      import sys
      from mowe.training import train_metrics
      writer = train_metrics.TensorBoardWriter({str(tmp_path)!r}, resume_step=3)
      writer.write(4, {{'loss': 1.5, 'mean_of_none': float('nan')}})
      writer.close()
      assert 'tensorflow' not in sys.modules
  """)
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=root,
    check=True,
    capture_output=True,
    text=True,
  )
  assert 'NaN' not in done.stdout + done.stderr
  (path,) = tmp_path.iterdir()
  assert path.name.startswith('events.out.tfevents')
  assert b'loss' in path.read_bytes()
  assert b'mean_of_none' not in path.read_bytes()


class _StandIn(types.ModuleType):
  """A module in place of wandb that keeps what it is told."""

  def __init__(self):
    super().__init__('wandb')
    self.__spec__ = importlib.machinery.ModuleSpec(
      'wandb', None, origin='wandb.py'
    )
    self.told = []
    self.Histogram = lambda values: ('histogram', values.tolist())

  def init(self, **settings):
    if settings['project'] == 'without a key':
      raise RuntimeError('api_key not configured')
    self.told.append(settings)
    run = types.SimpleNamespace(
      define_metric=lambda name, step_metric=None: None,
      log=self.told.append,
      finish=lambda: self.told.append('finished'),
    )
    return run


@pytest.fixture
def wandb(monkeypatch):
  module = _StandIn()
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return module


def test_weights_and_biases_continue_a_run(wandb, tmp_path):
  board = train_metrics.WeightsAndBiases('words')
  board.check()
  values = {'loss': 1.5, 'none': math.nan, 'loads': np.array([1.0, math.nan])}
  for step in (4, 3):
    writer = board.open(tmp_path, step)
    writer.write(step, values)
    writer.close()
  first, points, finished, again, other, _ = wandb.told
  assert first == again and first['resume'] == 'allow'
  assert (first['project'], first['name']) == ('words', tmp_path.name)
  assert points == {
    'step': 4, 'loss': 1.5, 'loads': ('histogram', [1.0, 0.0])
  }  # fmt: skip
  assert other['step'] == 3 and finished == 'finished'


def test_weights_and_biases_without_a_project_write_nothing(tmp_path):
  board = train_metrics.WeightsAndBiases()
  board.check()
  writer = board.open(tmp_path, 0)
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


def test_what_weights_and_biases_lack_is_said(wandb, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match='led to: api_key not .* `wandb login`'):
    train_metrics.WeightsAndBiases('without a key').open(tmp_path, 0)
  folder = importlib.machinery.ModuleSpec('wandb', None)
  for found in (None, folder):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, f=found: f)
    with pytest.raises(ModuleNotFoundError, match=r"install 'mowe\[wandb\]'"):
      train_metrics.WeightsAndBiases('words').check()
