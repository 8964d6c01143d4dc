"""Tests which pieces of a vocabulary count as the same one."""

import numpy as np

from mowe.words import base_vocabulary
from mowe.words.addresses import compressed_vocabulary


def test_case_accents_and_spaces():
  texts = ['the', ' The', 'café', 'CAFE', ' ', '\t', 'x\ufffd', 'x', '']
  pieces = ['the', '_The', 'café', 'CAFE', '_', '<9>', '<81>', 'x', '<0>']
  ids = compressed_vocabulary.compressed_ids(pieces, texts)
  assert ids == (0, 0, 1, 1, 2, 2, 3, 4, 5)


def test_of_vocabulary(tiny):
  ids = compressed_vocabulary.of_vocabulary(tiny)
  assert len(ids) == tiny.size
  # New ids are numbered in order of first appearance.
  firsts = np.unique(ids, return_index=True)[1]
  assert (np.diff(firsts) > 0).all()
  special = tiny.piece_kinds() == base_vocabulary.SPECIAL
  counts = np.bincount(ids)
  assert (counts[np.array(ids)[special]] == 1).all()
  same = {}
  for i in range(base_vocabulary.UNK_ID + 1, tiny.size - tiny.extra_ids):
    text = tiny.piece(i).replace('\u2581', '').lower()
    same.setdefault(text, set()).add(ids[i])
  assert all(len(of_text) == 1 for text, of_text in same.items() if text)
  assert max(counts) > 1
