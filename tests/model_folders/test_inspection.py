"""Tests what `mowe inspect` prints of a model folder."""

import pytest

from mowe.cli import main
from mowe.model_folders import inspection
from mowe.training import run_history


@pytest.mark.slow
def test_what_a_folder_holds(world, tmp_path, capsys):
  folder = tmp_path / 'run'
  settings = {'model': world.config(sparse=False)}
  world.train(folder, 3, config_text=lambda: 'RATE = 1\n', **settings)
  world.train(folder, 5, config_text=lambda: 'RATE = 2\n', **settings)
  found = inspection.inspect(str(folder))
  assert [one.step for one in found.steps] == [3, 5]
  assert all(one.problem is None for one in found.steps)
  assert found.last_good == 5 and found.row_bytes == 0
  assert [line['step'] for line in found.history] == [0, 3]
  for one in found.steps:
    assert one.origin['version'] == run_history.origin()['version']
  largest = max(
    (p for p in (folder / 'checkpoint_5').rglob('*') if p.is_file()),
    key=lambda path: path.stat().st_size,
  )
  largest.write_bytes(largest.read_bytes()[:-1])
  capsys.readouterr()
  assert main.main(['inspect', str(folder)]) == 0
  shown = capsys.readouterr().out
  assert f'{found.cost.total_parameters:,} parameters' in shown
  assert 'RATE: 1 -> 2' in shown
  assert 'Step       3:' in shown and 'DAMAGED' in shown
  assert '--from_step 3` goes on from the newest step that is whole' in shown


def test_what_is_no_folder_is_refused(tmp_path, capsys):
  assert main.main(['inspect', str(tmp_path)]) == 1
  assert 'must have a model.json' in capsys.readouterr().err
