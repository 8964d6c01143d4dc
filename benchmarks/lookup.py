"""Times the look-up of words on the host, and the reading of its file.

  python -m benchmarks.lookup

Words are made up, because only sizes matter. The vocabulary has one million
words with up to four spellings, and most of the [128, 512] tokens are in known
words.
"""

import argparse
import os
import tempfile
import time

import numpy as np

from mowe.words import base_vocabulary, lookup, routing_vocabulary

_VOCAB_SIZE = 32_100
_BATCH, _LENGTH = 128, 512
_SPELLINGS = 4


def make_vocabulary(
  num_words: int, rng: np.random.Generator
) -> tuple[routing_vocabulary.RoutingVocabulary, np.ndarray]:
  """Returns a vocabulary and its spellings <int32>[spellings, 3 pieces]."""
  kinds = np.full(_VOCAB_SIZE, base_vocabulary.CONTINUES, np.uint8)
  kinds[3:20_000] = base_vocabulary.STARTS
  kinds[[0, 1]] = kinds[32_000:] = base_vocabulary.SPECIAL
  kinds[20_000:20_200] = base_vocabulary.ALONE
  num_spellings = num_words * _SPELLINGS
  pieces = np.stack(
    [
      rng.integers(3, 20_000, num_spellings, dtype=np.int32),
      rng.integers(20_200, 32_000, num_spellings, dtype=np.int32),
      rng.integers(20_200, 32_000, num_spellings, dtype=np.int32),
    ],
    axis=1,
  )
  hashes = lookup.hash_words(
    lookup.hash_pieces(_VOCAB_SIZE),
    pieces.reshape(-1),
    np.arange(num_spellings + 1) * 3,
  )
  keys, first = np.unique(hashes, return_index=True)
  text = np.frombuffer(b'wordword', np.uint8)
  num_entries = num_words + _VOCAB_SIZE
  counts = num_entries - np.arange(num_entries, dtype=np.int64)
  piece_word_ids = num_words + np.arange(_VOCAB_SIZE, dtype=np.int32)
  piece_word_ids[kinds == base_vocabulary.SPECIAL] = num_entries
  vocabulary = routing_vocabulary.RoutingVocabulary(
    words_utf8=np.tile(text, num_entries),
    word_offsets=np.arange(num_entries + 1, dtype=np.int64) * len(text),
    counts=counts,
    is_piece=np.arange(num_entries) >= num_words,
    keys=keys,
    key_word_ids=(first // _SPELLINGS).astype(np.int32),
    piece_kinds=kinds,
    piece_word_ids=piece_word_ids,
    experts=routing_vocabulary.assign_experts(
      counts, 32_768, routing_vocabulary.assign_by_hash, 16
    ),
    collisions=np.zeros((0, 2), np.int32),
    num_experts=32_768,
    num_skipped=16,
    subwords_sha256='0' * 64,
    subwords_size=_VOCAB_SIZE,
  )
  return vocabulary, pieces


def seconds(function, *arguments, repeats: int) -> float:
  """Returns the time of the shortest run, because the machine may be shared."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    function(*arguments)
    times.append(time.perf_counter() - start)
  return min(times)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num_words', type=int, default=1_000_000)
  parser.add_argument('--repeats', type=int, default=10)
  arguments = parser.parse_args()
  rng = np.random.default_rng(0)
  vocabulary, pieces = make_vocabulary(arguments.num_words, rng)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'words.npz')
    vocabulary.save(path)
    megabytes = os.path.getsize(path) / 1e6
    load_time = seconds(routing_vocabulary.load, path, repeats=3)
  print(f'file of {megabytes:.0f} MB: load and verify {load_time:.2f} s')
  start = time.perf_counter()
  assert vocabulary.tables.num_probes
  print(f'tables from the file: {time.perf_counter() - start:.2f} s')
  start = time.perf_counter()
  vocabulary.with_experts(32_768, assign=routing_vocabulary.assign_balanced)
  print(f'assign_balanced: {time.perf_counter() - start:.2f} s')
  words = pieces[rng.integers(0, len(pieces), _BATCH * _LENGTH // 3)]
  tokens = np.resize(words, (_BATCH, _LENGTH))
  tokens[rng.random(tokens.shape) < 0.1] = 20_100  # Punctuation: more words.
  rates = {}
  for name in ('decoder_ids', 'encoder_ids'):
    function = getattr(vocabulary, name)
    time_taken = seconds(function, tokens, repeats=arguments.repeats)
    rates[name] = tokens.size / time_taken
    print(f'{name}: {rates[name] / 1e6:.1f} million tokens/s')
  print(f'tokens_per_second={rates["encoder_ids"]:.0f}')


if __name__ == '__main__':
  main()
