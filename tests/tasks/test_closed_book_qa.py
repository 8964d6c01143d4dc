"""Tests seqio tasks of question answering on local files and mocked TFDS."""

import json

import pytest

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

from mowe.data import seqio_stream
from mowe.words import byte_vocabulary
from tasks import closed_book_qa

_BYTES = byte_vocabulary.ByteVocabulary()
_LENGTHS = {'inputs': 64, 'targets': 32}


@pytest.fixture
def name(request):
  name = request.node.name.split('[')[0]
  yield name
  seqio.TaskRegistry.remove(name)


def _write(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


def _examples(name, split='train'):
  # TFDS does not mock the count of examples that caching in memory needs.
  dataset = seqio.get_mixture_or_task(name).get_dataset(
    _LENGTHS, split, shuffle=False, try_in_mem_cache=False
  )
  return list(dataset.as_numpy_iterator())


def test_local_questions(tmp_path, name):
  files = {
    'train': _write(
      tmp_path / 'a.jsonl', [{'question': 'who?', 'answers': ['Ada', 'A.']}]
    ),
    'validation': _write(
      tmp_path / 'b.jsonl', [{'question': 'où?', 'answers': 'Oslo'}]
    ),
  }
  task = closed_book_qa.register_question_task(name, files, 'bytes')
  (example,) = _examples(name)
  assert _BYTES.decode(example['inputs']) == 'question: who?'
  assert _BYTES.decode(example['targets']) == 'Ada'
  assert example['inputs'][-1] == example['targets'][-1] == 1
  (other,) = _examples(name, 'validation')
  assert _BYTES.decode(other['inputs']) == 'question: où?'
  # As a target an example is all its answers; as a prediction it is a text.
  assert task.postprocess_fn('x', example=example, is_target=True) == [
    'Ada',
    'A.',
  ]
  assert task.postprocess_fn('x', example=example, is_target=False) == 'x'
  (metric,) = task.metric_fns
  found = metric([['Ada', 'A.'], ['Oslo']], ['ada', 'Rome'])
  assert found == {'em': 50.0, 'f1': 50.0}


def test_a_question_cache_keeps_the_answers(tmp_path, name):
  path = _write(
    tmp_path / 'a.jsonl', [{'question': 'who?', 'answers': ['Ada', 'A.']}]
  )
  closed_book_qa.register_question_task(name, path, 'bytes')
  cache = seqio_stream.cache_seqio_task(name, tmp_path / 'c', _BYTES)
  assert cache.features == ('inputs', 'targets')
  assert cache.kind == 'text_to_text'
  assert _BYTES.decode(cache.tokens('targets', 0)) == 'Ada'
  assert cache.record(0)['answers'] == ['Ada', 'A.']
  assert cache.record(0)['inputs_pretokenized'] == 'question: who?'


def test_claims(tmp_path, name):
  path = _write(
    tmp_path / 'a.jsonl',
    [
      {'claim': 'Oslo is a city.', 'label': 'SUPPORTS'},
      {'claim': 'Oslo is a fish.', 'label': 'REFUTES'},
    ],
  )
  task = closed_book_qa.register_claim_task(name, path, 'bytes')
  first, second = _examples(name)
  assert _BYTES.decode(first['inputs']) == 'fever claim: Oslo is a city.'
  assert _BYTES.decode(first['targets']) == 'supports'
  assert _BYTES.decode(second['targets']) == 'refutes'
  (metric,) = task.metric_fns
  targets = [['supports'], ['refutes']]
  assert metric(targets, ['supports', 'supports']) == {'accuracy': 50.0}


def test_a_bad_record_stops_the_stream(tmp_path, name):
  path = _write(tmp_path / 'a.jsonl', [{'claim': 'Oslo', 'label': 'MAYBE'}])
  closed_book_qa.register_claim_task(name, path, 'bytes')
  with pytest.raises(Exception, match="label of a claim must be.*'MAYBE'"):
    _examples(name)


# For each data set one example of TFDS, and what must become of it.
_RAW = {
  'trivia_qa_open': (
    {
      'question': 'who?',
      'answer': {'value': 'Ada', 'aliases': ['Ada', 'Ada L.']},
    },
    'trivia_qa question: who?',
  ),
  'natural_questions_open': (
    {'question': 'who?', 'answer': ['Ada', 'Ada L.']},
    'nq question: who?',
  ),
  'web_questions_open': (
    {'question': 'who?', 'answers': ['Ada', 'Ada L.'], 'url': 'u'},
    'wq question: who?',
  ),
}


@pytest.fixture(scope='module')
def tfds_tasks():
  names = closed_book_qa.register_tfds_tasks('bytes')
  assert names == closed_book_qa.register_tfds_tasks('bytes')
  yield names
  for name in names:
    seqio.TaskRegistry.remove(name)
  for name in ('closed_book_qa', 'closed_book_qa_test'):
    seqio.MixtureRegistry.remove(name)


def test_tfds_tasks_and_mixtures_are_registered(tfds_tasks):
  assert tfds_tasks == [
    base + suffix for base in (*_RAW, 'fever') for suffix in ('', '_test')
  ]
  mixture = seqio.get_mixture_or_task('closed_book_qa')
  assert {task.name for task in mixture.tasks} == set(_RAW)
  splits = set(seqio.get_mixture_or_task('trivia_qa_open').splits)
  assert splits == {'train', 'validation', 'test'}


@pytest.mark.parametrize('base', list(_RAW))
def test_tfds_tasks_on_examples_by_hand(base, tfds_tasks):
  import tensorflow as tf

  raw, expected = _RAW[base]

  def give(self, *args, **kwargs):
    del self, args, kwargs
    return tf.data.Dataset.from_tensors(raw)

  with tfds.testing.mock_data(num_examples=1, as_dataset_fn=give):
    for name in (base, base + '_test'):
      (example,) = _examples(name)
      assert _BYTES.decode(example['inputs']) == expected
      assert _BYTES.decode(example['targets']) == 'Ada'
      assert example['answers'].tolist() == [b'Ada', b'Ada L.']


@pytest.mark.parametrize('base', list(_RAW))
def test_tfds_features_are_those_of_the_release(base, tfds_tasks):
  # TFDS makes random data with the features that its builder declares.
  with tfds.testing.mock_data(num_examples=2):
    for example in _examples(base):
      assert example['inputs'].dtype == 'int32'
      assert example['inputs_pretokenized'].startswith(
        _RAW[base][1][:3].encode()
      )
