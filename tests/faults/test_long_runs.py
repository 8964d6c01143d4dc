"""A long run takes no more of the machine at its end than after its begin."""

import os
import pathlib
import threading

import jax
import numpy as np
import pytest

from mowe.commands import evaluations, train
from mowe.training import train_metrics

# A step with word experts takes ten times as long: with them it was measured by
# hand (docs/reliability.md).
_STEPS = 5000

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


class _Meter:
  """What the process holds, noted with each line of metrics."""

  def __init__(self):
    self.num_compiled = 0
    # Rows of resident bytes, threads, open files, and compiled programs.
    self.rows: list[tuple[int, ...]] = []

  def note(self) -> None:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    self.rows.append(
      (
        pages * os.sysconf('SC_PAGE_SIZE'),
        threading.active_count(),
        len(os.listdir('/proc/self/fd')),
        self.num_compiled,
      )
    )

  def count(self, event: str, duration: float, **unused) -> None:
    del duration, unused
    self.num_compiled += event.endswith('backend_compile_duration')


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/statm').exists(), reason='needs /proc'
)
def test_a_long_run_grows_in_nothing(world, tmp_path, monkeypatch):
  meter, write = _Meter(), train_metrics.JsonLinesWriter.write

  def noted(self, step, values):
    write(self, step, values)
    meter.note()

  monkeypatch.setattr(train_metrics.JsonLinesWriter, 'write', noted)
  jax.monitoring.register_event_duration_secs_listener(meter.count)
  world.train(
    tmp_path / 'run',
    _STEPS,
    model=world.config(sparse=False),
    log_period=25,
    save=train.SaveConfig(period=_STEPS // 10, keep_last=1),
    eval_period=_STEPS // 10,
    eval_configs=[evaluations.LossEvaluation(world.data())],
  )
  rows = np.array(meter.rows, np.int64)
  assert len(rows) >= _STEPS // 25
  # The first third warms up: buffers of files and pools of memory grow.
  rows = rows[len(rows) // 3 :]
  memory, *others = rows.T
  slope = np.polyfit(np.arange(len(memory)), memory, 1)[0] * len(memory)
  assert slope < 16 << 20, f'{slope / 2**20:.1f} MB more'
  for of_kind in others:
    # A checkpoint that is being written has a few files and threads of its own.
    assert np.median(of_kind[:9]) == np.median(of_kind[-9:])
  assert len(set(rows[:, 3])) == 1
