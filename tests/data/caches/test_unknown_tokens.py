"""Tests that a cache says what its vocabulary cannot write."""

import pytest
import small_runs

from mowe.commands import cache_task
from mowe.data.caches import unknown_tokens
from mowe.words import sentencepiece_vocabulary


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp('v') / 'v.model'
  return sentencepiece_vocabulary.train_sentencepiece(
    ['aa bb cc question:'] * 9, path, 16
  )


def _cache(vocabulary, tmp_path, source, name, records):
  small_runs.write_lines(tmp_path / f'{name}.jsonl', records)
  return cache_task.cache_task(
    tmp_path / name, vocabulary.path, source(files=[tmp_path / f'{name}.jsonl'])
  )


def test_unknown_tokens_of_text_are_counted(vocabulary, tmp_path):
  records = [{'text': 'aa'}, {'text': 'aa % bb'}, {'text': '$'}]
  cache = _cache(vocabulary, tmp_path, cache_task.TextFiles, 'text', records)
  ids = [vocabulary.encode(record['text']) for record in records]
  # Each text ends with EOS.
  total = sum(map(len, ids)) + len(ids)
  assert sum(one.count(2) for one in ids) == 2
  assert unknown_tokens.share(cache) == pytest.approx(2 / total)
  assert unknown_tokens.num_unwritable(cache, vocabulary) == 0
  said = cache_task.describe(cache, vocabulary)
  assert f'; {2 / total:.2%} of the tokens are unknown to the voc' in said


def test_questions_count_whose_answers_cannot_be_written(vocabulary, tmp_path):
  answers = [['aa'], ['% a'], ['%', 'bb'], ['aa', 'b$'], ['#', '$']]
  records = [{'question': 'cc', 'answers': one} for one in answers]
  source = cache_task.QuestionFiles
  cache = _cache(vocabulary, tmp_path, source, 'questions', records)
  assert unknown_tokens.num_unwritable(cache, vocabulary) == 2
  said = cache_task.describe(cache, vocabulary)
  assert said.endswith('cannot write the answers to 2 of the questions.')
