"""Fixtures: a tiny subword vocabulary, and a routing vocabulary built on it."""

import pytest
import sentencepiece

from mowe.words import (
  sentencepiece_vocabulary,
  subword_vocabularies,
  vocabulary_builder,
)

# The texts have names of many pieces, punctuation, accents and capitals.
TEXTS = [
  'The quick brown fox (Zorblat) jumps over the lazy dog, again and again.',
  'Zorblat met Quimby. "Zorblat!" said Quimby; the dog was not amused.',
  'A dog, a fox, and ZORBLAT: the café in the old town of Karlsburg.',
  'Karlsburg is an old town. The old café is in the old town of Karlsburg!',
  'Many men of many towns were met in winter; nobody knew the northern hills.',
  'Heavy rain fell on mountains, valleys and rivers while children sang.',
  "Don't jump over the lazy-dog's fence in 1987 or 2024.",
] * 4


@pytest.fixture(scope='session')
def texts():
  return list(TEXTS)


@pytest.fixture(scope='session')
def model_path(tmp_path_factory):
  path = tmp_path_factory.mktemp('subwords') / 'tiny.model'
  sentencepiece_vocabulary.train_sentencepiece(TEXTS, path, 90)
  return path


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """Returns the path of a SentencePiece model with other settings than T5's."""

  def train(**settings):
    path = tmp_path_factory.mktemp('unusual') / 'unusual.model'
    settings = {
      'vocab_size': 90,
      'pad_id': 0,
      'eos_id': 1,
      'unk_id': 2,
      'bos_id': -1,
      'minloglevel': 3,
    } | settings
    with path.open('wb') as file:
      sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS), model_writer=file, **settings
      )
    return path

  return train


@pytest.fixture(scope='session')
def tiny(model_path):
  return subword_vocabularies.load_subwords(model_path, extra_ids=10)


@pytest.fixture(scope='session')
def t5_vocabulary(shared_data):
  return subword_vocabularies.load_subwords(
    shared_data / 't5_vocab' / 'spiece.model'
  )


@pytest.fixture(scope='session')
def routing(tiny):
  vocabulary, _ = vocabulary_builder.build_routing_vocabulary(
    TEXTS, tiny, num_words=20, num_experts=7, num_skipped=3
  )
  return vocabulary
