"""Tests folders of safetensors: whole, in parts, incomplete, or hostile.

Also tests `mowe_safetensors` and `weights`.
"""

import json
import os
import stat

import numpy as np
import pytest

from mowe.interop import safetensors_folder, safetensors_format

_CONFIG = {'model_type': 'x'}
_TENSORS = {
  'a': np.arange(5, dtype=np.float32),
  'b': np.arange(6, dtype=np.float32).reshape(2, 3),
  'c': np.arange(4, dtype=np.float32),
}
_INDEX = 'model.safetensors.index.json'


def _write(folder, max_file_bytes=10**9):
  safetensors_folder.write(
    folder, _CONFIG, _TENSORS, max_file_bytes=max_file_bytes
  )
  return folder


def _assert_whole(folder):
  config, tensors = safetensors_folder.read(folder)
  assert config == _CONFIG
  assert set(tensors) == set(_TENSORS)
  for name, value in _TENSORS.items():
    np.testing.assert_array_equal(tensors[name], value)


def test_one_file(tmp_path):
  folder = _write(tmp_path / 'new' / 'model')
  names = {path.name for path in folder.iterdir()}
  assert names == {'config.json', 'model.safetensors'}
  _assert_whole(folder)
  umask = os.umask(0)
  os.umask(umask)
  assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def test_parts_with_an_index(tmp_path):
  # a, b and c have 20, 24 and 16 bytes, so a file of 40 bytes holds b and c
  # together.
  folder = _write(tmp_path / 'model', max_file_bytes=40)
  first = 'model-00001-of-00002.safetensors'
  second = 'model-00002-of-00002.safetensors'
  assert json.loads((folder / _INDEX).read_text()) == {
    'metadata': {'total_parameters': 15, 'total_size': 60},
    'weight_map': {'a': first, 'b': second, 'c': second},
  }
  assert set(safetensors_format.read(folder / second)) == {'b', 'c'}
  _assert_whole(folder)


def test_a_tensor_above_the_size_has_a_file(tmp_path):
  folder = _write(tmp_path / 'model', max_file_bytes=1)
  assert len(list(folder.glob('model-0000?-of-00003.safetensors'))) == 3
  _assert_whole(folder)


def test_links_of_a_cache_are_followed(tmp_path):
  folder = _write(tmp_path / 'model', max_file_bytes=40)
  (tmp_path / 'blobs').mkdir()
  for number, file in enumerate(sorted(folder.iterdir())):
    blob = tmp_path / 'blobs' / str(number)
    file.rename(blob)
    file.symlink_to(blob)
  _assert_whole(folder)


def test_nothing_is_overwritten(tmp_path):
  folder = tmp_path / 'model'
  folder.mkdir()
  with pytest.raises(
    FileExistsError, match='must not be there yet, but is. Ch'
  ):
    _write(folder)
  assert list(tmp_path.iterdir()) == [folder]
  assert not list(folder.iterdir())


def test_a_write_that_fails_leaves_nothing(tmp_path):
  broken = _TENSORS | {'z': np.zeros(2, np.int32)}
  with pytest.raises(ValueError, match='z is int32'):
    safetensors_folder.write(
      tmp_path / 'model', _CONFIG, broken, max_file_bytes=1
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'name',
  [
    '../secret.safetensors',
    '/secret.safetensors',
    'parts/a.safetensors',
    '..\\secret.safetensors',
    '..',
    '.',
    '',
    'a\0.safetensors',
    'pytorch_model.bin',
  ],
)
def test_an_index_that_points_outside_is_refused(name, tmp_path):
  folder = _write(tmp_path / 'model', max_file_bytes=40)
  safetensors_format.write(
    tmp_path / 'secret.safetensors', {'a': _TENSORS['a']}
  )
  index = json.loads((folder / _INDEX).read_text())
  index['weight_map']['a'] = name
  (folder / _INDEX).write_text(json.dumps(index))
  with pytest.raises(
    ValueError, match='safetensors files beside it, but names'
  ):
    safetensors_folder.read(folder)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
  folder = _write(tmp_path / 'model', max_file_bytes=40)
  index = json.loads((folder / _INDEX).read_text())
  second = index['weight_map'].pop('c')
  (folder / _INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match='says, but differs in c. Fetch both'):
    safetensors_folder.read(folder)
  index['weight_map'] |= {'c': second, 'd': second}
  (folder / _INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match='says, but differs in d. Fetch both'):
    safetensors_folder.read(folder)
  (folder / second).unlink()
  with pytest.raises(FileNotFoundError, match=f'but {second} is not. Fetch'):
    safetensors_folder.read(folder)
  for damaged in ({'weight_map': [1]}, {'weight_map': {'a': 1}}, {}):
    (folder / _INDEX).write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match='must have a weight_map'):
      safetensors_folder.read(folder)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"a', 'must be JSON, but is not'),
    (b'\xff', 'must be JSON, but is not'),
    (b'[' * 20000, 'must be JSON, but is not'),
    (b'[]', 'must be a JSON object, but is a list'),
  ],
)
def test_a_damaged_config_is_refused(content, message, tmp_path):
  folder = _write(tmp_path / 'model')
  (folder / 'config.json').write_bytes(content)
  with pytest.raises(ValueError, match=message):
    safetensors_folder.read(folder)


@pytest.mark.parametrize(
  'name', ['pytorch_model.bin', 'model.pt', 'weights.pth', 'x.ckpt']
)
def test_pickled_weights_are_refused(name, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  (tmp_path / name).write_bytes(b'\x80\x02}.')
  message = f'but has {name}: a pickle, which can run any code'
  with pytest.raises(ValueError, match=message):
    safetensors_folder.read(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='is not there. Give the folder'):
    safetensors_folder.read(tmp_path / 'nothing')
  file = tmp_path / 'model.pt'
  file.write_bytes(b'')
  with pytest.raises(FileNotFoundError, match='is a file. Give the folder'):
    safetensors_folder.read(file)
  folder = _write(tmp_path / 'model', max_file_bytes=40)
  (folder / _INDEX).unlink()
  with pytest.raises(FileNotFoundError, match=r"has \['config.json', 'model-"):
    safetensors_folder.read(folder)
  folder = _write(tmp_path / 'other')
  (folder / 'config.json').unlink()
  with pytest.raises(
    FileNotFoundError, match=r"has \['model.safetensors'\]. S"
  ):
    safetensors_folder.read(folder)


def test_two_sets_of_weights_are_refused(tmp_path):
  folder = _write(tmp_path / 'model')
  (folder / _INDEX).write_text('{}')
  with pytest.raises(ValueError, match='has both. Remove the one'):
    safetensors_folder.read(folder)
