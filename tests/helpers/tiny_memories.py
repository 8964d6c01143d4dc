"""A tiny model with memories of every payload and place, for tests."""

import dataclasses
import functools

import tiny_training

from mowe.layers.memory.payloads import (
  bank,
  diagonal,
  gated_vector,
  ngram_embedding,
  per_layer_embedding,
)
from mowe.models import token_memories
from mowe.words.addresses import hashed_ngrams, ngram_hashes, piece_address

_VOCAB = tiny_training.VOCAB


def make_memories():
  """Memories in two blocks of each stack; those with an identity start do not.

  All sizes differ.
  """
  (engram,) = ngram_hashes.engram_hashes(_VOCAB, [30, 40], 2)
  ngrams = hashed_ngrams.HashedNGrams(engram)
  longcat = ngram_hashes.longcat_hash(_VOCAB, 1.5, 2, 3)
  pieces = piece_address.Pieces(_VOCAB)
  make = functools.partial
  changes = {'starts_as_identity': False}
  return (
    token_memories.Memory(
      'engram',
      ngrams,
      make(gated_vector.GatedVector, 16, convolution_size=3, **changes),
      token_memories.BeforeAttention((1,), (0,)),
    ),
    token_memories.Memory(
      'stem',
      pieces,
      make(diagonal.Diagonal, 28),
      token_memories.InsteadOfFeedForward((0,), (1,)),
      shares_rows=True,
    ),
    token_memories.Memory(
      'per_layer',
      pieces,
      make(per_layer_embedding.PerLayerEmbedding, 10, **changes),
      token_memories.AfterFeedForward((0, 1), (0, 1)),
    ),
    token_memories.Memory(
      'bank',
      ngrams,
      make(bank.MixedBank, read_dim=14, up_dim=18, **changes),
      token_memories.BesideFeedForward((1,), (0,)),
    ),
    token_memories.Memory(
      'ngrams',
      hashed_ngrams.HashedNGrams(longcat, start_id=2),
      make(ngram_embedding.NGramEmbedding, 8, is_mean=True),
      token_memories.AtInput(encoder=True, decoder=True),
    ),
  )


def make_config(names=None, **changes):
  """A T5 with these memories, or with all of them."""
  memories = tuple(
    one for one in make_memories() if names is None or one.name in names
  )
  return tiny_training.make_config(
    sparse=False,
    num_encoder_layers=2,
    num_decoder_layers=2,
    memories=memories,
    **changes,
  )


def in_decoder(memory):
  """The memory without what it has in an encoder."""
  none = False if isinstance(memory.place, token_memories.AtInput) else ()
  place = dataclasses.replace(memory.place, encoder=none)
  return dataclasses.replace(memory, place=place)
