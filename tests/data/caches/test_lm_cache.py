"""Tests damaged files of running text."""

import gzip

import pytest

from mowe.data.caches import lm_cache
from mowe.words import byte_vocabulary


def test_bytes_of_a_packed_file_that_is_not_whole_are_named(tmp_path):
  lines = b''.join(b'%d\n' % (i * i) for i in range(20_000))
  (tmp_path / 'a.gz').write_bytes(gzip.compress(lines)[:-100])
  with pytest.raises(ValueError, match=r'a\.gz breaks off after line \d+: '):
    lm_cache.cache_texts(
      [str(tmp_path / 'a.gz')],
      tmp_path / 'cache',
      byte_vocabulary.ByteVocabulary(0),
      unit='file',
    )
  assert not (tmp_path / 'cache').exists()
