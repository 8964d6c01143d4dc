"""Tests how many rows and bytes a token reads, worked out by hand."""

import functools

import numpy as np
import pytest
import tiny_training

from mowe.comparison import memory_reads
from mowe.layers.memory import memory_plus, peer
from mowe.layers.memory.payloads import gated_vector
from mowe.models import token_memories
from mowe.words.addresses import piece_address

# Six tokens: four in the encoder, of which two are alike, and two targets,
# whose inputs are the start and the first of them.
_BATCH = {
  'encoder_input_tokens': np.array([[5, 6, 5, 7, 0]], np.int32),
  'decoder_input_tokens': np.array([[0, 6, 0]], np.int32),
  'decoder_target_tokens': np.array([[6, 8, 0]], np.int32),
}

# Two heads choose three of sixteen values each.
_SIZES = {'num_half_keys': 4, 'num_heads': 2, 'key_dim': 8, 'knn': 3}


def _config(**changes):
  return tiny_training.make_config(sparse=False, **changes)


def test_rows_of_a_memory_with_a_part_for_each_block():
  memory = token_memories.Memory(
    'engram',
    piece_address.Pieces(tiny_training.VOCAB),
    functools.partial(gated_vector.GatedVector, 10),
    token_memories.BeforeAttention((0,), (0,)),
  )
  reads = memory_reads.of_model(_config(memories=(memory,)), [_BATCH] * 2)
  # A row has two parts of ten numbers. The start of the targets names none.
  row = 2 * 10 * 4
  assert reads.rows == pytest.approx(5 / 6)
  assert reads.bytes == pytest.approx(row * 5 / 6)
  # 5, 6 and 7, once for each batch.
  assert reads.moved == pytest.approx(row * 3 / 6)


@pytest.mark.parametrize(
  ('layer', 'rows_each', 'numbers'),
  [
    # A value is a row of one table.
    (functools.partial(memory_plus.MemoryPlus, **_SIZES), 6, 24),
    # An expert is a row of two tables.
    (functools.partial(peer.Peer, **_SIZES), 12, 24),
  ],
)
def test_rows_that_are_learned_cannot_be_moved(layer, rows_each, numbers):
  config = _config(
    sparse_feed_forward=layer,
    sparse_encoder_layers=(0,),
    sparse_decoder_layers=(0,),
  )
  reads = memory_reads.of_model(config, [_BATCH])
  assert reads.rows == pytest.approx(rows_each)
  assert reads.bytes == pytest.approx(rows_each * numbers * 4)
  assert reads.moved is None


def test_a_dense_model_reads_no_rows():
  assert memory_reads.of_model(_config(), [_BATCH]) is None
  assert memory_reads.of_model(_config(), []) is None
