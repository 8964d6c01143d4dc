"""Tests FEVER's TFDS builder on local files, and its seqio tasks."""

import importlib
import json

import pytest

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

from mowe.data import seqio_stream
from mowe.data.text import claims
from mowe.words import byte_vocabulary
from tasks import closed_book_qa, fever

_BYTES = byte_vocabulary.ByteVocabulary()
_LENGTHS = {'inputs': 64, 'targets': 32}
# These lines have the form of the files that are downloaded.
_FILES = {
  'train': [
    {'id': 7, 'verifiable': 'VERIFIABLE', 'label': 'SUPPORTS'}
    | {'claim': 'Oslo is a city.', 'evidence': [[[1, 2, 'Oslo', 0]]]},
    {'id': 9, 'label': 'REFUTES', 'claim': 'Où is a fish.', 'evidence': []},
  ],
  'validation': [
    {'id': 8, 'label': 'NOT ENOUGH INFO', 'claim': 'Bo ran.', 'evidence': []}
  ],
}


@pytest.fixture
def downloads(tmp_path, monkeypatch):
  """A folder for TFDS, where downloads give the files above."""

  def download(self, urls):
    assert urls == fever.URLS
    paths = {split: tmp_path / f'{split}.jsonl' for split in urls}
    for split, path in paths.items():
      path.write_text(
        ''.join(json.dumps(line) + '\n' for line in _FILES[split])
      )
    return paths

  monkeypatch.setattr(tfds.download.DownloadManager, 'download', download)
  return tmp_path / 'tfds'


@pytest.fixture
def fever_tasks():
  closed_book_qa.register_tfds_tasks('bytes')
  yield
  for name in list(seqio.TaskRegistry.names()):
    if name.removesuffix('_test') in {
      row[0] for row in (*closed_book_qa._QUESTIONS, closed_book_qa._CLAIMS)
    }:
      seqio.TaskRegistry.remove(name)
  for name in ('closed_book_qa', 'closed_book_qa_test'):
    seqio.MixtureRegistry.remove(name)


def test_the_builder_reads_the_files(downloads):
  builder = tfds.builder('fever', data_dir=downloads)
  builder.download_and_prepare()
  assert builder.info.features['label'].names == list(fever.LABELS)
  found = {
    split: {
      (int(one['id']), one['claim'].decode(), int(one['label']))
      for one in tfds.as_numpy(builder.as_dataset(split=split))
    }
    for split in builder.info.splits
  }
  assert found == {
    'train': {(7, 'Oslo is a city.', 0), (9, 'Où is a fish.', 1)},
    'validation': {(8, 'Bo ran.', 2)},
  }


def test_the_other_name_of_the_module_registers_nothing():
  other = importlib.import_module('mowe.tasks.fever')
  assert other is not fever
  assert tfds.builder_cls('fever') in (fever.Fever, other.Fever)


def test_files_become_a_cache(downloads, fever_tasks, tmp_path):
  tfds.builder('fever', data_dir=downloads).download_and_prepare()
  seqio.set_tfds_data_dir_override(str(downloads))
  try:
    cache = seqio_stream.cache_seqio_task(
      'fever_test', tmp_path / 'c', _BYTES, split='validation'
    )
  finally:
    seqio.set_tfds_data_dir_override(None)
  assert _BYTES.decode(cache.tokens('inputs', 0)) == 'fever claim: Bo ran.'
  assert _BYTES.decode(cache.tokens('targets', 0)) == 'not enough info'
  assert cache.record(0)['answers'] == ['not enough info']


def test_each_label_has_its_words(fever_tasks):
  import tensorflow as tf

  def give(self, *args, **kwargs):
    del self, args, kwargs
    raw = {'id': [1, 2, 3], 'claim': ['a', 'b', 'c'], 'label': [0, 1, 2]}
    return tf.data.Dataset.from_tensor_slices(raw)

  with tfds.testing.mock_data(num_examples=3, as_dataset_fn=give):
    task = seqio.get_mixture_or_task('fever')
    assert set(task.splits) == {'train', 'validation', 'test'}
    examples = list(
      task.get_dataset(
        _LENGTHS, 'train', shuffle=False, try_in_mem_cache=False
      ).as_numpy_iterator()
    )
  assert [_BYTES.decode(one['inputs']) for one in examples] == [
    'fever claim: a',
    'fever claim: b',
    'fever claim: c',
  ]
  words = [_BYTES.decode(one['targets']) for one in examples]
  assert words == ['supports', 'refutes', 'not enough info']
  (metric,) = task.metric_fns
  targets = [
    task.postprocess_fn('', example=one, is_target=True) for one in examples
  ]
  assert metric(targets, ['supports', 'supports', 'not enough info']) == {
    'accuracy': pytest.approx(200 / 3)
  }


def test_random_data_of_the_declared_features(fever_tasks):
  with tfds.testing.mock_data(num_examples=4):
    dataset = seqio.get_mixture_or_task('fever_test').get_dataset(
      _LENGTHS, 'validation', shuffle=False, try_in_mem_cache=False
    )
    for example in dataset.as_numpy_iterator():
      target = _BYTES.decode(example['targets'])
      assert target in claims.TARGETS.values()
