"""Tests banks that are allotted by texts, against each text by itself."""

import numpy as np
import pytest

from mowe.data import bank_allocation
from mowe.data.caches import token_cache
from mowe.words.addresses import (
  bank_widths,
  hashed_ngrams,
  ngram_hashes,
  piece_address,
)

_VOCAB = 20


@pytest.fixture(scope='module')
def texts():
  rng = np.random.default_rng(0)
  return [rng.integers(3, _VOCAB, rng.integers(1, 30)) for _ in range(40)]


@pytest.fixture(scope='module')
def folder(texts, tmp_path_factory):
  path = tmp_path_factory.mktemp('caches')
  recipe = {
    'format_version': token_cache.FORMAT_VERSION,
    'kind': 'text',
    'vocabulary': {'size': _VOCAB},
  }
  lengths = np.array([len(text) for text in texts])
  with token_cache.build_cache(path / 'text', recipe) as writer:
    writer.add({'targets': (np.concatenate(texts), lengths)}, [{}] * 40)
  return path


@pytest.mark.parametrize('at_once', [7, 2**16])
def test_banks_are_those_of_the_texts_one_by_one(
  texts, folder, monkeypatch, at_once
):
  monkeypatch.setattr(bank_allocation, '_AT_ONCE', at_once)
  (hashed,) = ngram_hashes.engram_hashes(_VOCAB, [30], 1)
  for address in (
    piece_address.Pieces(_VOCAB),
    hashed_ngrams.HashedNGrams(hashed),
  ):
    found = bank_allocation.allotted(address, folder, 'text', 90, 6)
    counts = bank_widths.count_codewords(
      [address.encoder_rows(text[None])[0, :, 0].tolist() for text in texts],
      address.num_rows,
    )
    assert found.widths == bank_widths.share_rows(
      counts, address.num_rows, 90, 6
    )
    assert found.num_rows == 90 and max(found.widths) > 2


def test_only_the_first_tokens_are_read(texts, folder):
  address = piece_address.Pieces(_VOCAB)
  number = len(texts[0]) + len(texts[1]) + 1
  found = bank_allocation.allotted(address, folder, 'text', 90, 6, number)
  counts = bank_widths.count_codewords(
    [text.tolist() for text in texts[:2]], _VOCAB
  )
  assert found.widths == bank_widths.share_rows(counts, _VOCAB, 90, 6)


def test_several_slots_are_refused(folder):
  (hashed,) = ngram_hashes.engram_hashes(_VOCAB, [30], 2)
  with pytest.raises(ValueError, match='one row for each token, but Hashed'):
    bank_allocation.allotted(
      hashed_ngrams.HashedNGrams(hashed), folder, 'text', 90, 6
    )
