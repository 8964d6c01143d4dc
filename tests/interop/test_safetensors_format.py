"""Tests the format by hand, against its package, and with damaged files."""

import io
import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as reference

from mowe.interop import safetensors_format

_ARRAYS = {
  'b': np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
  'a': np.asarray([1.5, -2.0, 3.0, 1e30, 0.0], ml_dtypes.bfloat16),
  'scalar': np.asarray(2.5, np.float32),
  'empty': np.zeros((0, 4), np.float32),
}


def _assert_same(actual, expected):
  assert set(actual) == set(expected)
  for name, value in expected.items():
    assert actual[name].shape == value.shape
    assert actual[name].dtype == value.dtype
    assert actual[name].tobytes() == value.tobytes()


def test_written_bytes_by_hand(tmp_path):
  file = tmp_path / 'x.safetensors'
  # A transposed view must be written in the order of its own rows.
  safetensors_format.write(
    file, {'w': np.asarray([[1, 3], [2, 4]], np.float32).T}
  )
  header = (
    b'{"__metadata__":{"format":"pt"},'
    b'"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
  )
  header += b' ' * (-len(header) % 8)
  expected = len(header).to_bytes(8, 'little') + header
  expected += np.asarray([1, 2, 3, 4], '<f4').tobytes()
  assert file.read_bytes() == expected


def test_what_is_written_is_read(tmp_path):
  file = tmp_path / 'x.safetensors'
  safetensors_format.write(file, _ARRAYS)
  _assert_same(safetensors_format.read(file), _ARRAYS)
  with pytest.raises(FileExistsError):
    safetensors_format.write(file, _ARRAYS)


def test_the_package_reads_what_is_written(tmp_path):
  file = tmp_path / 'x.safetensors'
  floats = {
    name: array for name, array in _ARRAYS.items() if array.dtype == np.float32
  }
  safetensors_format.write(file, floats)
  _assert_same(reference.load_file(file), floats)


def test_what_the_package_writes_is_read(tmp_path):
  file = tmp_path / 'x.safetensors'
  halves = {'h': np.asarray([0.1, 7], np.float16), 'b': _ARRAYS['b']}
  reference.save_file(halves, file)
  _assert_same(safetensors_format.read(file), halves)


def test_other_dtypes_are_refused(tmp_path):
  file = tmp_path / 'x.safetensors'
  with pytest.raises(ValueError, match='but w is float64. Convert'):
    safetensors_format.write(file, {'w': np.zeros(2)})
  assert not file.exists()
  reference.save_file({'w': np.zeros(2)}, file)
  with pytest.raises(ValueError, match="but w in .* is 'F64'. Convert"):
    safetensors_format.read(file)


def _file(header, data=b'', size=None):
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  size = len(header) if size is None else size
  return size.to_bytes(8, 'little') + header + data


def _entry(first, last, shape=(2,), dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [first, last]}


_GOOD = _file({'w': _entry(0, 8)}, bytes(8))
_TWICE = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{}}'


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'is 0 bytes long with a header of 0 bytes'),
    (_GOOD[:8], 'is 8 bytes long'),
    (_GOOD[:30], 'is 30 bytes long with a header of'),
    (_file(b'{}', size=2**60), f'with a header of {2**60} bytes'),
    (_file(b'{"w"'), 'no JSON'),
    (_file(b'{"w": "\xff"}'), 'no JSON'),
    (_file(b'{' * 20000), 'no JSON'),
    (_file(b'[]'), 'a list'),
    (_file(_TWICE, bytes(8)), 'a name is there twice'),
    (_file({'w': 3}), 'describes w as 3'),
    (_file({'w': {'dtype': 'F32'}}), 'describes w as'),
    (_file({'w': _entry(0, 8) | {'x': 1}}, bytes(8)), 'describes w as'),
    (_file({'w': _entry(0, 8, [-2])}, bytes(8)), 'describes w as'),
    (_file({'w': _entry(0, 8, [2.0])}, bytes(8)), 'describes w as'),
    (_file({'w': _entry(0, 8, [True])}, bytes(8)), 'describes w as'),
    (_file({'w': _entry(0, 8, dtype=['F32'])}, bytes(8)), 'describes w as'),
    (_file({'w': _entry(-8, 0)}, bytes(8)), 'describes w as'),
    (
      _file({'w': _entry(0, 8) | {'data_offsets': [8]}}, bytes(8)),
      r'gives w the bytes \[8\]',
    ),
    (_GOOD[:-1], 'the bytes 0 to 8 of 7'),
    (_file({'w': _entry(8, 0)}, bytes(8)), 'the bytes 8 to 0 of 8'),
    (_file({'w': _entry(0, 8, [3])}, bytes(8)), '8 bytes, .* shape needs 12'),
    (
      _file({'w': _entry(0, 8, [2**40, 2**40])}, bytes(8)),
      r'w the shape \[1099',
    ),
    (_file({'w': _entry(0, 0, [2**62, 0])}), r'w the shape \[4611'),
    (_file({'w': _entry(0, 0, [2**39] * 4 + [0])}), r'w the shape \[549'),
    (_file({'w': _entry(0, 4, [1] * 100)}, bytes(4)), r'w the shape \[1, 1'),
    (
      _file({'v': _entry(0, 8), 'w': _entry(4, 12)}, bytes(12)),
      'w start at byte 4, where the array before it ends at 8',
    ),
    (
      _file({'v': _entry(0, 8), 'w': _entry(0, 8)}, bytes(8)),
      'w start at byte 0, where the array before it ends at 8',
    ),
    (
      _file({'v': _entry(0, 8), 'w': _entry(12, 20)}, bytes(20)),
      'w start at byte 12',
    ),
    (_GOOD + b'\0', '1 bytes after its last array'),
    (_file({}, b'abc'), '3 bytes after its last array'),
  ],
)
def test_damaged_files_are_refused(content, message, tmp_path):
  file = tmp_path / 'x.safetensors'
  file.write_bytes(content)
  whole = f'must be a whole safetensors file, but .*{message}.*fetch it again'
  with pytest.raises(ValueError, match=whole):
    safetensors_format.read(file)


def test_every_truncation_is_refused(tmp_path):
  file = tmp_path / 'x.safetensors'
  safetensors_format.write(file, {'w': np.ones(3, np.float32)})
  content = file.read_bytes()
  for length in range(len(content)):
    file.write_bytes(content[:length])
    with pytest.raises(ValueError, match='fetch it again'):
      safetensors_format.read(file)


def _zip():
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('archive/data.pkl', pickle.dumps({}))
  return file.getvalue()


class _Bomb:
  def __reduce__(self):
    return pytest.fail, ('the pickle was executed',)


@pytest.mark.parametrize(
  ('content', 'kind'),
  [
    *(
      (pickle.dumps(_Bomb(), protocol), 'a pickle') for protocol in range(2, 6)
    ),
    (_zip(), 'a zip archive, as torch.save writes'),
  ],
)
def test_a_pickle_with_another_name_is_refused(content, kind, tmp_path):
  file = tmp_path / 'model.safetensors'
  file.write_bytes(content)
  message = f'but is {kind}, which can run any code'
  with pytest.raises(ValueError, match=message):
    safetensors_format.read(file)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
  file = tmp_path / 'x.safetensors'
  # The header has 0x0280 bytes, so the file starts with the bytes 80 02, as a
  # pickle of protocol 2 does.
  header = json.dumps({'w': _entry(0, 8)}).encode().ljust(0x280)
  file.write_bytes(_file(header, bytes(8)))
  assert file.read_bytes()[:2] == b'\x80\x02'
  np.testing.assert_array_equal(safetensors_format.read(file)['w'], [0, 0])
