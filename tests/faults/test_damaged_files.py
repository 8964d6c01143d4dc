"""Every file of a model folder, damaged in every way, read by every verb.

A verb does what it does on the whole folder, or ends with one sentence that has
the file's name; it never changes another file. `pytest --slow` runs all cases,
and otherwise a handful.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from mowe.cli import main
from mowe.commands import train
from mowe.model_folders import model_folder
from mowe.models.families import saved_config
from mowe.stores import expert_stores
from mowe.training import manifests

_TOTAL = 4
_STORE = expert_stores.DiskStore(num_slots=16)


def _train(world, folder):
  return world.train(
    folder,
    _TOTAL,
    store=_STORE,
    save=train.SaveConfig(period=2),
    config_text=lambda: 'NAME = 1\n',
  )


# What each verb does with a folder, and what of it depends on all files that
# matter to it.
def _resume(world, folder, out):
  del out
  state = jax.device_get(_train(world, folder))
  return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(state.params)]


def _load(world, folder, out):
  """What `ask`, `evaluate` and `infer` do first."""
  del world, out
  loaded = model_folder.load(str(folder))
  rows = loaded.model.config.routing.sha256
  return rows, [
    np.asarray(leaf).tolist() for leaf in jax.tree.leaves(loaded.params)
  ]


def _convert(world, folder, out):
  del world
  _main('convert', folder, out, '--to', 'safetensors')
  (file,) = out.glob('*.safetensors')
  return hashlib.sha256(file.read_bytes()).hexdigest()


def _inspect(world, folder, out):
  """It only looks, and so it shows damage in place of raising an error."""
  del world, out
  shown = io.StringIO()
  with contextlib.redirect_stdout(shown):
    _main('inspect', folder)
  # Sizes and the history are not compared.
  lines = shown.getvalue().splitlines()
  others = ('Rows ', 'Started ', ' ')
  return [
    re.sub(r'[\d.]+ MB', '', line)
    for line in lines
    if not line.startswith(others)
  ]


def _main(*arguments):
  with pytest.MonkeyPatch.context() as patch:
    # Errors are raised, as they are with this variable.
    patch.setenv('MOWE_TRACE', '1')
    assert main.main([str(one) for one in arguments]) == 0


_VERBS = {
  'resume': _resume,
  'load': _load,
  'convert': _convert,
  'inspect': _inspect,
}

# Files, as globs of which the first match is taken.
_FILES = (
  'model.json',
  'vocabulary.model',
  'routing_vocabulary.npz',
  'config.gin',
  'history.jsonl',
  'train_metrics.jsonl',
  'experts.0.rows',
  f'checkpoint_{_TOTAL}/manifest.json',
  f'checkpoint_{_TOTAL}/metadata.json',
  f'checkpoint_{_TOTAL}/metrics.json',
  f'checkpoint_{_TOTAL}/experts.0.npz',
  f'checkpoint_{_TOTAL}/state/_METADATA',
  f'checkpoint_{_TOTAL}/state/manifest.ocdbt',
  f'checkpoint_{_TOTAL}/state/ocdbt.process_0/d/*',
  'checkpoint_2/manifest.json',
  'checkpoint_2/experts.0.npz',
  'checkpoint_2/state/_METADATA',
)


def _flipped(path):
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle] ^= 0x55
  path.write_bytes(content)


def _folder(path):
  path.unlink()
  path.mkdir()


_DAMAGES = {
  'missing': pathlib.Path.unlink,
  'empty': lambda path: path.write_bytes(b''),
  'cut': lambda path: path.write_bytes(path.read_bytes()[:-7]),
  'flipped': _flipped,
  'folder': _folder,
  'a list': lambda path: path.write_bytes(b'[1, "two"]\n'),
  'a pickle': lambda path: path.write_bytes(b'\x80\x04N.'),
}


@pytest.fixture(scope='module')
def whole(world, tmp_path_factory):
  """A whole folder, and what each verb makes of it."""
  jax.config.update('jax_disable_most_optimizations', True)
  folder = tmp_path_factory.mktemp('whole') / 'run'
  _train(world, folder)
  expected = {}
  for name, verb in _VERBS.items():
    place = tmp_path_factory.mktemp(name)
    copy = shutil.copytree(folder, place / 'run')
    expected[name] = verb(world, copy, place / 'out')
  return folder, expected


_READ = {}


@pytest.fixture(autouse=True)
def configs_are_read_once(monkeypatch):
  """Gives the same object for the same text, so its model is traced once."""
  from_json = saved_config.from_json

  def once(tree, routing=None, **changes):
    key = json.dumps(tree), routing and routing.sha256, repr(changes)
    if key not in _READ:
      _READ[key] = from_json(tree, routing, **changes)
    return _READ[key]

  monkeypatch.setattr(saved_config, 'from_json', once)


def _contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def _check(world, whole, tmp_path, verb, file, damage, manifest=False):
  """Runs a verb on a damaged copy of a folder."""
  source, expected = whole
  folder = shutil.copytree(source, tmp_path / 'run')
  path = sorted(folder.glob(file))[0]
  _DAMAGES[damage](path)
  if manifest:
    _match_manifest(path)
  before = _contents(folder)
  try:
    result = _VERBS[verb](world, folder, tmp_path / 'out')
  except (ValueError, OSError) as error:
    message = str(error)
    # The file, or the checkpoint that it belongs to, is named.
    names = [path.name, *(one for one in path.parts if one[:6] == 'checkp')]
    assert any(name in message for name in names), message
    assert message.endswith('.') or isinstance(error, OSError), message
    assert '\n' not in message
    after = _contents(folder)
    changed = {name for name in before if after.get(name) != before[name]}
    # A resume looks for damage of older steps, and keeps what it sets aside.
    assert all(name.startswith('checkpoint_2/') for name in changed)
    assert not (tmp_path / 'out').exists()
    return
  in_checkpoint = path.parent != folder
  if verb == 'inspect' and in_checkpoint and not manifest:
    text = '\n'.join(result)
    is_missing = file.endswith('manifest.json') and damage in (
      'missing',
      'folder',
    )
    assert is_missing or ('DAMAGED' in text and path.name in text), text
    return
  is_seen = (folder / f'checkpoint_{_TOTAL}' / manifests.FILE_NAME).exists()
  # Without its manifest a checkpoint is not finished: the one before is read,
  # and a resume does the steps after it again.
  assert (result == expected[verb]) == (
    is_seen or verb in ('resume', 'inspect')
  )


_QUICK = {
  ('resume', 'model.json', 'cut'),
  ('resume', f'checkpoint_{_TOTAL}/metadata.json', 'flipped'),
  ('load', 'routing_vocabulary.npz', 'a pickle'),
  ('load', f'checkpoint_{_TOTAL}/experts.0.npz', 'missing'),
  ('convert', f'checkpoint_{_TOTAL}/state/_METADATA', 'flipped'),
  ('inspect', 'history.jsonl', 'a list'),
}
_CASES = [
  pytest.param(
    *case,
    id='-'.join(case),
    marks=() if case in _QUICK else pytest.mark.slow,
  )
  for file in _FILES
  for damage in _DAMAGES
  for verb in _VERBS
  for case in [(verb, file, damage)]
  # `convert` reads a folder as the others do, and takes the longest.
  if verb != 'convert' or damage in ('missing', 'flipped')
]


@pytest.mark.parametrize('verb, file, damage', _CASES)
def test_a_damaged_file_is_named_or_does_not_matter(
  verb, file, damage, whole, world, tmp_path
):
  _check(world, whole, tmp_path, verb, file, damage)


def _match_manifest(path):
  """Makes the manifest of a checkpoint name what is there now."""
  folder = next(one for one in path.parents if 'checkpoint_' in one.name)
  (folder / manifests.FILE_NAME).unlink()
  manifests.write(folder)


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['empty', 'a list', 'a pickle'])
@pytest.mark.parametrize(
  'name',
  [
    'metadata.json',
    'metrics.json',
    'experts.0.npz',
    'state/_METADATA',
    'state/manifest.ocdbt',
  ],
)
@pytest.mark.parametrize('verb', _VERBS)
def test_files_that_pose_as_others_are_named(
  verb, name, damage, whole, world, tmp_path
):
  file = f'checkpoint_{_TOTAL}/{name}'
  _check(world, whole, tmp_path, verb, file, damage, manifest=True)
