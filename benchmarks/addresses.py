"""Times the addresses of memories on the host, in NumPy and in one thread.

  python -m benchmarks.addresses

Batches have random pieces of a SentencePiece vocabulary's size, of which a part
continues words. For each address the table has its rows per second, which are
tokens times slots, and the time to plan the rows of a batch. The last line is
the slowest rate in millions.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np

from mowe.words import base_vocabulary, lookup, routing_vocabulary
from mowe.words.addresses import (
  address_base,
  hashed_ngrams,
  ngram_hashes,
  piece_address,
  word_address,
  word_ngrams,
)
from mowe.words.plans import row_plans

_ROWS = 262_144
# One piece in three goes on with a word.
_CONTINUES = 3


def make_routing(
  vocab_size: int, num_words: int
) -> routing_vocabulary.RoutingVocabulary:
  """Returns a vocabulary of random words of two pieces, and of all pieces."""
  rng = np.random.default_rng(0)
  kinds = np.full(vocab_size, base_vocabulary.STARTS, np.uint8)
  kinds[::_CONTINUES] = base_vocabulary.CONTINUES
  kinds[: base_vocabulary.UNK_ID + 1] = base_vocabulary.SPECIAL
  first = rng.integers(3, vocab_size, num_words)
  second = rng.integers(1, vocab_size // _CONTINUES, num_words) * _CONTINUES
  pieces = np.stack([first, second], axis=1).astype(np.int32)
  keys = lookup.hash_words(
    lookup.hash_pieces(vocab_size),
    pieces.reshape(-1),
    2 * np.arange(num_words + 1),
  )
  keys, index = np.unique(keys, return_index=True)
  num_entries = num_words + vocab_size
  experts = np.arange(num_entries + 1, dtype=np.int32) % _ROWS
  return routing_vocabulary.RoutingVocabulary(
    words_utf8=np.zeros(0, np.uint8),
    word_offsets=np.zeros(num_entries + 1, np.int64),
    counts=np.ones(num_entries, np.int64),
    is_piece=np.arange(num_entries) >= num_words,
    keys=keys,
    key_word_ids=index.astype(np.int32),
    piece_kinds=kinds,
    piece_word_ids=np.arange(num_words, num_entries, dtype=np.int32),
    experts=experts,
    collisions=np.zeros((0, 2), np.int32),
    num_experts=_ROWS,
    num_skipped=0,
    subwords_sha256='',
    subwords_size=vocab_size,
  )


def make_addresses(
  arguments: argparse.Namespace,
) -> dict[str, address_base.Address]:
  """Returns an address of each kind."""
  size = arguments.vocab_size
  routing = make_routing(size, arguments.num_words)
  (engram,) = ngram_hashes.engram_hashes(size, [_ROWS] * 2, 8)
  (of_words,) = ngram_hashes.engram_hashes(
    word_ngrams.num_ids(routing), [_ROWS] * 2, 8
  )
  compressed = tuple((np.arange(size) * 3 // 4).tolist())
  return {
    'pieces': piece_address.Pieces(size),
    'words': word_address.Words(routing),
    'n-grams of words, 16 slots': word_ngrams.WordNGrams(routing, of_words),
    'Engram, 16 slots': hashed_ngrams.HashedNGrams(engram, compressed),
    'Over-Encoding, 4 slots': hashed_ngrams.HashedNGrams(
      ngram_hashes.over_encoding_hash(size, 10**6, 2, 3)
    ),
  }


def seconds(function: Callable[[], object], repeats: int) -> float:
  """Returns the median time of a call."""
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    function()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--vocab_size', type=int, default=32_100)
  parser.add_argument('--num_words', type=int, default=1_000_000)
  parser.add_argument('--batch_size', type=int, default=128)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=7)
  arguments = parser.parse_args()
  rng = np.random.default_rng(1)
  shape = arguments.batch_size, arguments.length
  tokens = rng.integers(3, arguments.vocab_size, shape).astype(np.int32)
  slowest = float('inf')
  for name, address in make_addresses(arguments).items():
    rows = tokens.size * address.num_slots
    once = seconds(
      functools.partial(address.encoder_rows, tokens), arguments.repeats
    )
    planner = row_plans.RowPlanner(
      address,
      streams=('encoder',),
      num_rows=address.num_rows,
      trial_batches=[{'encoder_input_tokens': tokens}],
    )
    plan = seconds(
      functools.partial(planner, {'encoder_input_tokens': tokens}),
      arguments.repeats,
    )
    rate = rows / once / 1e6
    slowest = min(slowest, rate)
    print(
      f'{name}: {rate:.1f} million rows/s, a batch of {tokens.size:,} tokens '
      f'in {1e3 * once:.1f} ms, with its plan in {1e3 * plan:.1f} ms'
    )
  print(f'slowest={slowest:.1f}')


if __name__ == '__main__':
  main()
