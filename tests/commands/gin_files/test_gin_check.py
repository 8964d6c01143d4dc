"""Tests `mowe config check`: all is found, and nothing is run.

Also tests `config_verbs`.
"""

import pathlib

import pytest

from mowe.cli import main
from mowe.commands.gin_files import gin_check, gin_config

_SHIPPED = pathlib.Path(__file__).resolve().parents[3] / 'gin_configs'
_FILE = """
from __gin__ import dynamic_registration
from mowe.models.t5 import t5_config
from theirs import tools
import other.parts as parts
import os.path
include 'inner.gin'

SIZE = 3
MODEL = @t5_config.T5Config()
t5_config.T5Config:
  emb_dim = %SIZE
  norm = @tools.Norm
scope/parts.Runner.command = @tools.command()
"""
_INNER = """
from __gin__ import dynamic_registration
from mowe.models import decoding
STRATEGY = [@decoding.Greedy()]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder whose module `theirs` leaves a mark when it is imported."""
  package = tmp_path / 'theirs'
  package.mkdir()
  (package / '__init__.py').write_text(
    'import pathlib\npathlib.Path("was_run").touch()\n'
  )
  (package / 'tools.py').write_text('')
  (tmp_path / 'run.gin').write_text(_FILE)
  (tmp_path / 'inner.gin').write_text(_INNER)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path


def test_all_is_found_and_nothing_is_run(folder, capsys):
  checked = gin_check.check(['run.gin'])
  assert checked.files == ('inner.gin', 'run.gin')
  assert [one.name for one in checked.imports] == [
    'mowe.models.decoding',
    'mowe.models.t5.t5_config',
    'theirs.tools',
    'other.parts',
    'os.path',
  ]
  assert [(one.name, one.place) for one in checked.called] == [
    ('mowe.models.decoding.Greedy', 'inner.gin:4'),
    ('mowe.models.t5.t5_config.T5Config', 'run.gin:10'),
    ('theirs.tools.command', 'run.gin:14'),
  ]
  outside = {one.name for one in checked.outside()}
  assert outside == {
    'theirs.tools', 'other.parts', 'os.path', 'theirs.tools.Norm',
    'theirs.tools.command', 'other.parts.Runner',
  }  # fmt: skip
  assert not (folder / 'was_run').exists()
  # Reading the file does run the code.
  with pytest.raises(gin_config.GinError):
    gin_config.parse(['run.gin'])
  assert (folder / 'was_run').exists()
  assert main.main(['config', 'check', 'run.gin']) == 0
  assert 'theirs.tools.command  (run.gin:14)' in capsys.readouterr().out


@pytest.mark.parametrize(
  'name', ['train.os.system', 'train.Training.check', 'absent.Thing']
)
def test_what_a_module_of_ours_has_imported_is_outside(folder, name):
  (folder / 'run.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    f'from mowe.commands import {name.split(".")[0]}\n'
    f'A = @{name}()\n'
  )
  outside = {one.name for one in gin_check.check(['run.gin']).outside()}
  assert f'mowe.commands.{name}' in outside


def test_shipped_files_have_nothing_from_outside(capsys):
  files = sorted(_SHIPPED.rglob('*.gin'))
  # Those for T5X use its own trainer.
  files = [str(file) for file in files if file.parent.name != 't5x']
  assert len(files) > 100
  assert gin_check.check(files).outside() == []
  assert main.main(['config', 'check', files[0]]) == 0
  assert 'Nothing is from outside of mowe.' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ("include 'absent.gin'", 'there is no absent.gin'),
    ("include 'absent.gin'", 'run.gin includes it'),
    ("include 'run.gin'", 'must not include itself'),
    ('SIZE = \nB = 3', 'run.gin is not'),
    ('SIZE = \x00', 'run.gin is not'),
    ('SIZES = (3,', 'run.gin is not'),
  ],
)
def test_what_cannot_be_read_is_named(folder, capsys, text, message):
  (folder / 'run.gin').write_text(text)
  assert main.main(['config', 'check', 'run.gin']) == 1
  assert message in capsys.readouterr().err
