"""Tests the ids of engram.json and over_encoding.json, and the banks of l3.json.

The tests run on any folder in that format: `pytest tests/parity
--golden_dir=DIR`. All options of a case come from the JSON file.
"""

import golden_cases
import jax
import numpy as np
import pytest

from mowe.words.addresses import (
  bank_widths,
  compressed_vocabulary,
  hashed_ngrams,
  ngram_hashes,
)

_FILES = {
  'test_engram': ('engram', {'engram_ids'}),
  'test_bank_widths': ('l3', {'l3_allocation'}),
  'test_over_encoding': ('over_encoding', {'oe_ids', 'over_encoding'}),
}


def pytest_generate_tests(metafunc):
  golden_cases.parametrize(metafunc, *_FILES[metafunc.function.__name__])


@pytest.fixture
def golden(request):
  name, _ = _FILES[request.function.__name__]
  return golden_cases.read(request.config.parity_dir, name)


def both_ways(address, tokens, segment_ids=None):
  """Rows in the part of each slot, by NumPy, which JAX must equal."""
  found = address.rows_of_all(tokens, segment_ids)
  in_jax = jax.jit(address.rows_of_all)(tokens, segment_ids)
  np.testing.assert_array_equal(in_jax, found)
  return found - np.array(ngram_hashes.offsets(address.hash.moduli)[:-1])


def test_engram(case, golden):
  document, arrays = golden
  options = document['cases'][case]
  roles = options['arrays']
  given = {role: arrays[name] for role, name in roles['inputs'].items()}
  expected = {role: arrays[name] for role, name in roles['outputs'].items()}
  compressed = None
  if options['vocabulary'] is not None:
    vocabulary = options['vocabulary']
    compressed = compressed_vocabulary.compressed_ids(
      vocabulary['pieces'], vocabulary['texts']
    )
    np.testing.assert_array_equal(compressed, expected['compressed_ids'])
  hashes = ngram_hashes.engram_hashes(
    options['compressed_vocab_size'],
    options['rows_wanted'],
    options['heads_per_ngram'],
    options['layers'],
    options['seed'],
    options['hash_bits'],
  )
  for layer, one in enumerate(hashes):
    assert list(one.multipliers) == expected['multipliers'][layer].tolist()
    assert [*map(list, one.moduli)] == expected['moduli'][layer].tolist()
    *starts, total = ngram_hashes.offsets(one.moduli)
    assert starts == expected['offsets'][layer].tolist()
    assert total == options['rows_per_layer'][layer]
    address = hashed_ngrams.HashedNGrams(one, compressed, options['pad_id'])
    tokens = given['token_ids']
    np.testing.assert_array_equal(
      address.compress(tokens), expected['compressed_token_ids']
    )
    np.testing.assert_array_equal(
      both_ways(address, tokens, given.get('segment_ids')),
      expected['hash_ids'][layer],
    )


def test_over_encoding(case, golden):
  document, arrays = golden
  options = document['cases'][case]
  roles = options['arrays']
  moduli = tuple(map(tuple, options['moduli']))
  hash_ = ngram_hashes.Polynomial(options['base'], moduli)
  *starts, _ = ngram_hashes.offsets(moduli)
  assert starts == options['offsets']
  address = hashed_ngrams.HashedNGrams(
    hash_, start_id=options['missing_token'], eos_id=options['eos_id']
  )
  tokens = arrays[roles['inputs']['token_ids']]
  np.testing.assert_array_equal(
    both_ways(address, tokens), arrays[roles['outputs']['ids']]
  )


def test_bank_widths(case, golden):
  document, arrays = golden
  options = document['cases'][case]
  outputs = options['arrays']['outputs']
  counts = bank_widths.count_codewords(
    options['corpus'],
    options['num_tokens'],
    as_listed=options['line_end'] == 'paper',
  )
  expected = [(tuple(ids), count) for ids, count in options['codewords']]
  assert list(counts.items()) == expected
  np.testing.assert_array_equal([*counts.values()], arrays[outputs['counts']])
  widths = bank_widths.share_rows(
    counts, options['num_tokens'], options['target_rows'], options['max_rows']
  )
  np.testing.assert_array_equal(widths, arrays[outputs['rows']])
