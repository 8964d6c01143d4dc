"""Tests experts on disk: same bits, checkpoints unharmed, damage found.

Also tests `background`, `expert_records`, and `row_index`.
"""

import contextlib
import errno
import os
import shutil

import numpy as np
import pytest

from mowe.stores.row_files import row_file, row_index
from mowe.training import manifests

_EXPERTS = 7
_DTYPE = np.dtype(
  [
    ('kernels/experts/wi', '<f4', (2, 3)),
    ('kernels/experts/wo', '<u2', (3, 2)),
    ('state/experts/counts', '<i4'),
  ]
)


def _records(number, seed=0):
  rng = np.random.default_rng(seed)
  # Such bytes are no NaN and no infinity.
  data = rng.integers(0, 0x7F, number * _DTYPE.itemsize, np.uint8)
  return data.view(_DTYPE)


def _checkpoint(folder, step):
  path = folder / f'checkpoint_{step}'
  path.mkdir()
  return path


def _finish(path):
  (path / manifests.FILE_NAME).write_text('{}')


def _fresh(folder, **processes):
  index = row_index.RowIndex(_DTYPE, _EXPERTS)
  process = processes.get('process', 0)
  locked = row_file.LockedFile(folder, process)
  return row_file.RowFile(locked, index, **processes)


def _read(checkpoint, **settings):
  index = row_index.RowIndex.load(checkpoint)
  reader = row_index.RowReader(checkpoint.parent, index, **settings)
  records = reader(np.arange(_EXPERTS))
  reader.close()
  return records


def _assert_same_bits(actual, expected):
  assert actual.tobytes() == expected.tobytes()


@pytest.fixture
def saved(tmp_path):
  """A file with a checkpoint of all experts, and their records."""
  file = _fresh(tmp_path)
  records = _records(_EXPERTS)
  file.write(np.arange(_EXPERTS), records)
  path = _checkpoint(tmp_path, 1)
  file.save(path)
  _finish(path)
  yield file, path, records
  with contextlib.suppress(OSError):
    file.close()


def test_records_come_back_in_any_order(saved):
  file, path, records = saved
  order = np.array([5, 0, 1, 2, 6, 3])
  _assert_same_bits(file.read(order), records[order])
  _assert_same_bits(_read(path), records)
  kernels = _read(path, kernels_only=True)
  assert kernels.dtype.names == _DTYPE.names[:2]
  for name in kernels.dtype.names:
    np.testing.assert_array_equal(kernels[name], records[name])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_checkpoints_stay_as_they_were(tmp_path, seed):
  """Compares random writes, checkpoints, removals and restarts with copies."""
  rng = np.random.default_rng(seed)
  file = _fresh(tmp_path)
  now = _records(_EXPERTS, seed)
  file.write(np.arange(_EXPERTS), now)
  copies = {}
  for step in range(30):
    number = rng.integers(1, _EXPERTS + 1)
    some = rng.permutation(_EXPERTS)[:number]
    new = _records(number, 100 * seed + step)
    file.write(some, new)
    now = now.copy()
    now[some] = new
    path = _checkpoint(tmp_path, step)
    file.save(path)
    if rng.random() < 0.6:
      _finish(path)
      copies[path] = now
    if len(copies) > 2:
      removed = next(iter(copies))
      del copies[removed]
      (removed / manifests.FILE_NAME).unlink()
      for part in removed.iterdir():
        part.unlink()
      removed.rmdir()
    if copies and rng.random() < 0.3:
      # After a kill, what was written since the last checkpoint is lost.
      file.close()
      last = max(copies, key=lambda path: int(path.name.split('_')[1]))
      file = row_file.RowFile(
        row_file.LockedFile(tmp_path), row_index.RowIndex.load(last)
      )
      now = copies[last]
    _assert_same_bits(file.read(np.arange(_EXPERTS)), now)
    for path, records in copies.items():
      _assert_same_bits(_read(path), records)
  size = row_index.data_path(tmp_path, 'experts', 0).stat().st_size
  file.close()
  # The file has room for two checkpoints, the present state, and one checkpoint
  # that may be unfinished.
  assert size <= 5 * _EXPERTS * _DTYPE.itemsize


def test_only_what_changed_takes_room(saved, tmp_path):
  file, _, _ = saved
  size = lambda: row_index.data_path(tmp_path, 'experts', 0).stat().st_size
  before = size()
  for seed in range(3):
    file.write(np.array([2, 4]), _records(2, seed))
  assert size() == before + 2 * _DTYPE.itemsize


def test_processes_share_a_table(tmp_path):
  records = _records(_EXPERTS)
  files = [_fresh(tmp_path, process=i, num_processes=2) for i in range(2)]
  path = _checkpoint(tmp_path, 1)
  for file in files:
    file.write(np.arange(_EXPERTS), records)
    file.save(path)
    file.close()
  _finish(path)
  _assert_same_bits(_read(path), records)
  # One process continues with the files that two have written.
  file = row_file.RowFile(
    row_file.LockedFile(tmp_path), row_index.RowIndex.load(path)
  )
  new = _records(2, 1)
  file.write(np.array([1, 6]), new)
  path = _checkpoint(tmp_path, 2)
  file.save(path)
  file.close()
  records[[1, 6]] = new
  _assert_same_bits(_read(path), records)


def test_two_processes_with_one_table(saved, tmp_path):
  with pytest.raises(
    row_file.TableInUseError,
    match=r'One process at a time may train .* but another one has '
    r'experts\.0\.rows open\. Wait until it ends',
  ):
    _fresh(tmp_path)


def test_a_full_disk_harms_no_checkpoint(saved, tmp_path, monkeypatch):
  file, path, records = saved
  real = os.pwrite

  def full(*arguments):
    if arguments[2] >= _EXPERTS * _DTYPE.itemsize:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return real(*arguments)

  monkeypatch.setattr(os, 'pwrite', full)
  with pytest.raises(
    row_file.DiskFullError,
    match=r'must take 40 more bytes .* No space left on device\. Finished '
    'checkpoints are unharmed: make room',
  ):
    file.write(np.array([3, 1])[:1], _records(1, 9))
  _assert_same_bits(_read(path), records)


def test_a_table_larger_than_the_disk_is_refused_early(saved, monkeypatch):
  file, _, _ = saved
  file.check_room(_EXPERTS)
  usage = shutil.disk_usage('.')._replace(free=7 * 40 - 1)
  monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage)
  with pytest.raises(
    row_file.DiskFullError,
    match=r'must have room for 0\.0 GB of experts, but 0\.0 GB are free\. Make',
  ):
    file.check_room(_EXPERTS)


def test_room_that_may_end_is_said(saved, monkeypatch, capsys):
  file, _, _ = saved
  file.say_if_room_may_end()
  assert capsys.readouterr().out == ''
  usage = shutil.disk_usage('.')._replace(free=7 * 40 - 1)
  monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage)
  file.say_if_room_may_end()
  assert 'experts.0.rows may grow to 0.0 GB, and' in capsys.readouterr().out


def _change(path, change):
  data = bytearray(path.read_bytes())
  change(data)
  path.write_bytes(data)


def test_damaged_records_are_found_by_name(saved, tmp_path):
  _, path, _ = saved
  data = row_index.data_path(tmp_path, 'experts', 0)
  error = manifests.DamagedCheckpointError

  def flip(data):
    data[3 * _DTYPE.itemsize + 5] ^= 1

  _change(data, flip)
  with pytest.raises(error, match=r'Expert 3 must be in .* other contents'):
    _read(path)
  _change(data, flip)
  _read(path)
  _change(data, lambda data: data.pop())
  with pytest.raises(error, match=r'Expert 0 must be in .* the file ends'):
    _read(path)
  data.unlink()
  with pytest.raises(error, match='that file is missing'):
    _read(path)


def test_a_file_that_lacks_records_is_found_when_it_is_opened(saved, tmp_path):
  file, path, _ = saved
  file.close()
  index = row_index.RowIndex.load(path)
  data = row_index.data_path(tmp_path, 'experts', 0)
  for size in (_EXPERTS * _DTYPE.itemsize - 1, 0):
    os.truncate(data, size)
    locked = row_file.LockedFile(tmp_path)
    with pytest.raises(
      manifests.DamagedCheckpointError,
      match=f'must hold at least 280 bytes, .* but has {size}. Copy that file',
    ):
      row_file.RowFile(locked, index)
    locked.close()
    assert data.stat().st_size == size


def test_damaged_state_does_not_matter_to_who_reads_kernels(saved, tmp_path):
  _, path, _ = saved

  def flip(data):
    data[4 * _DTYPE.itemsize - 1] ^= 1

  _change(row_index.data_path(tmp_path, 'experts', 0), flip)
  _read(path, kernels_only=True)
  with pytest.raises(manifests.DamagedCheckpointError, match='Expert 3'):
    _read(path)


def test_rows_that_were_never_written_are_drawn(tmp_path):
  fresh = _records(_EXPERTS, 5)
  key = np.array([1, 2], np.uint32)
  index = row_index.RowIndex(_DTYPE, 10**9, fresh_key=key)
  draw = lambda experts, dtype: fresh[experts % _EXPERTS].astype(dtype)
  file = row_file.RowFile(row_file.LockedFile(tmp_path), index, draw)
  rows = np.array([10**9 - 1, 3, 5 * 10**8])
  _assert_same_bits(file.read(rows), fresh[rows % _EXPERTS])
  new = _records(2, 6)
  file.write(rows[:2], new)
  index.mark_seen(rows[:1])
  path = _checkpoint(tmp_path, 1)
  file.save(path)
  # Only what was written takes room, in the file and in the index.
  assert os.stat(row_index.data_path(tmp_path, 'experts', 0)).st_size == 80
  assert (path / 'experts.0.npz').stat().st_size < 4000
  file.close()
  again = row_index.RowIndex.load(path)
  assert (again.num_rows, again.num_seen) == (10**9, 1)
  assert again.fresh_key.tolist() == [1, 2]
  assert again.written_rows().tolist() == sorted(rows[:2].tolist())
  assert again.seen_rows().tolist() == [10**9 - 1]
  reader = row_index.RowReader(tmp_path, again, draw)
  expected = fresh[rows % _EXPERTS]
  expected[:2] = new
  _assert_same_bits(reader(rows), expected)
  reader.close()
  reader = row_index.RowReader(tmp_path, again)
  with pytest.raises(KeyError, match='Expert 500000000 was never written'):
    reader(rows)
  reader.close()


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('kernels/experts/wi', np.nan),
    ('kernels/experts/wi', -np.inf),
    # The bits of infinity and of a NaN in bfloat16.
    ('kernels/experts/wo', 0x7F80),
    ('kernels/experts/wo', 0xFFC1),
  ],
)
def test_rows_that_are_not_finite_are_not_written(saved, name, value):
  file, path, records = saved
  new = _records(3, 1)
  new[name][2, 1, 1] = value
  with pytest.raises(row_file.NotFiniteError, match='made 1 of .* number 6'):
    file.write(np.array([1, 4, 6]), new)
  _assert_same_bits(file.read(np.arange(_EXPERTS)), records)
  file.write(np.array([1, 4]), new[:2])
  _assert_same_bits(_read(path), records)
