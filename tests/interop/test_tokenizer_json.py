"""Pieces of a tokenizer.json give the ids of the model that they came from."""

import base64
import json

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from mowe.interop import tokenizer_json
from mowe.words import sentencepiece_vocabulary

_MARKED = {
  'type': 'Sequence',
  'pretokenizers': [
    {'type': 'WhitespaceSplit'},
    {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'always'},
  ],
}


def _content(vocabulary, **changes):
  """What transformers writes for a SentencePiece model with T5's sentinels."""
  processor = sentencepiece.SentencePieceProcessor(model_file=vocabulary.path)
  vocab = [
    [processor.IdToPiece(i), processor.GetScore(i)]
    for i in range(processor.GetPieceSize())
  ]
  vocab += [[f'<extra_id_{i}>', 0.0] for i in reversed(range(100))]
  ordinary = {'pad': 0, '/s': 1, 'unk': 2}
  return {
    'added_tokens': [
      {'id': i, 'content': f'<{name}>', 'special': True}
      for name, i in ordinary.items()
    ],
    'normalizer': None,
    'pre_tokenizer': _MARKED,
    'model': {'type': 'Unigram', 'unk_id': 2, 'vocab': vocab},
  } | changes


def _read(folder, content):
  path = folder / 'tokenizer.json'
  path.write_text(json.dumps(content))
  model = folder / 'read.model'
  model.write_bytes(tokenizer_json.sentencepiece_model(path))
  return sentencepiece_vocabulary.SentencePieceVocabulary(model)


@pytest.fixture(scope='module')
def read(world, tmp_path_factory):
  content = _content(world.vocabulary)
  return _read(tmp_path_factory.mktemp('tokenizer'), content)


def test_pieces_and_kinds_are_those_of_the_model(world, read):
  own = world.vocabulary
  assert (read.size, read.sentinels) == (own.size, own.sentinels)
  assert [read.piece(i) for i in range(read.size)] == [
    own.piece(i) for i in range(own.size)
  ]
  np.testing.assert_array_equal(read.piece_kinds(), own.piece_kinds())


@hypothesis.given(
  st.text(st.sampled_from('abcdeiou rstAK.,?{</s>'), max_size=40)
)
def test_ids_are_those_of_the_model(world, read, text):
  # The table of the model folds no character of these.
  assert read.encode(text) == world.vocabulary.encode(text)
  assert read.decode(read.encode(text)) == world.vocabulary.decode(
    world.vocabulary.encode(text)
  )


def test_the_table_of_t5_normalises_text(shared_data, tmp_path):
  """The file is made of the released model, as transformers does it."""
  pb2 = pytest.importorskip('sentencepiece.sentencepiece_model_pb2')
  released = shared_data / 't5_vocab' / 'spiece.model'
  own = sentencepiece_vocabulary.SentencePieceVocabulary(released)
  proto = pb2.ModelProto.FromString(released.read_bytes())
  table = base64.b64encode(proto.normalizer_spec.precompiled_charsmap)
  step = {'type': 'Precompiled', 'precompiled_charsmap': table.decode()}
  for normalizer in (
    step,
    {'type': 'Sequence', 'normalizers': [step]},
  ):
    read = _read(tmp_path, _content(own, normalizer=normalizer))
    for text in ('\ufb01ne \u2167 \uff11\uff12', ' a   b\t\nc\u3000d ', '{x}'):
      assert read.encode(text) == own.encode(text), text


def test_other_settings_are_kept(world, tmp_path):
  content = _content(world.vocabulary)
  content['pre_tokenizer'] = _MARKED['pretokenizers'][1] | {
    'prepend_scheme': 'never'
  }
  content['normalizer'] = {
    'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': ' ',
  }  # fmt: skip
  read = _read(tmp_path, content)
  marked = world.vocabulary.encode('Anna')
  assert read.encode('Anna') != marked
  assert read.encode('of  Anna')[-len(marked) :] == marked
  # An author's symbol is one piece wherever it stands.
  content = _content(world.vocabulary)
  content['added_tokens'].append({'id': 9, 'content': '<sep>'})
  content['model']['vocab'][9] = ['<sep>', 0.0]
  assert 9 in _read(tmp_path, content).encode('Anna<sep>Karl')
  # Bytes of a model that falls back on them.
  content = _content(world.vocabulary)
  first = len(content['model']['vocab']) - 100
  content['model']['vocab'][first:first] = [
    [f'<0x{byte:02X}>', -9.0] for byte in range(256)
  ]
  content['model']['byte_fallback'] = True
  read = _read(tmp_path, content)
  assert read.size == world.vocabulary.size + 256
  assert read.decode(read.encode('\u4e16')) == '\u4e16'


def _changed(content, path, value):
  *parents, name = path
  for parent in parents:
    content = content[parent]
  content[name] = value


@pytest.mark.parametrize(
  'path, value, message',
  [
    (
      ['model', 'type'],
      'BPE',
      "must be Unigram, as those of T5 are, but is 'BPE'",
    ),
    (['model'], 'x', 'must be Unigram, as those of T5 are, but is None'),
    (
      ['model', 'vocab'],
      {'a': 1},
      'must be a list of pieces with their scores',
    ),
    (
      ['model', 'vocab', 5],
      ['a'],
      'must be a list of pieces with their scores',
    ),
    (['model', 'vocab', 5], ['a', 'b'], 'must be a list of pieces with their'),
    (
      ['model', 'vocab', 5],
      ['a', 1e999],
      'must be a list of pieces with their',
    ),
    (['model', 'vocab'], [['a', 1.0]], 'but there are 1, and unk_id is 2'),
    (
      ['model', 'unk_id'],
      0,
      'and unk_id is 0. Only tokenizers like those of T5',
    ),
    (['normalizer'], {'type': 'Lowercase'}, "T5 has, but has 'Lowercase'"),
    (['pre_tokenizer'], {'type': 'ByteLevel'}, "T5 has, but has 'ByteLevel'"),
    (
      ['normalizer'],
      {'type': 'Precompiled', 'precompiled_charsmap': '%'},
      'must be a table in base64, but cannot be read',
    ),
    (['normalizer'], {'type': 'Precompiled'}, 'must be a table in base64, but'),
  ],
)
def test_other_tokenizers_are_refused(path, value, message, world, tmp_path):
  content = _content(world.vocabulary)
  _changed(content, path, value)
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, content)
