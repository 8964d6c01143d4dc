"""Tests counts of ids against the tokens of the cached texts."""

import collections

import pytest

from mowe.data.caches import cache_builders, token_counts
from mowe.words import byte_vocabulary

_BYTES = byte_vocabulary.ByteVocabulary()


def test_all_features_but_spans_are_counted(tmp_path, monkeypatch):
  monkeypatch.setattr(token_counts, '_CHUNK', 4)
  questions = [{'question': 'who?', 'answers': ['Ada']}]
  cache_builders.cache_questions(questions, tmp_path / 'q', _BYTES)
  texts = [{'text': 'Ada in 1981', 'spans': [[0, 3], [7, 11]]}]
  cache_builders.cache_text(texts, tmp_path / 't', _BYTES)
  for name, text in (('q', 'question: who?Ada'), ('t', 'Ada in 1981')):
    counts = token_counts.count_tokens(tmp_path / name, 359)
    assert counts.shape == (359,)
    ends = 2 if name == 'q' else 1
    found = {i - 3: n for i, n in enumerate(counts.tolist()) if n and i > 1}
    assert found == collections.Counter(text.encode()) and counts[1] == ends
  with pytest.raises(ValueError, match='359, but is 358. Set it to vocab_size'):
    token_counts.count_tokens(tmp_path / 'q', 358)
