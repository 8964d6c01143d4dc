"""Tests seqio tasks of GLUE on mocked TFDS: texts, labels, metrics, mixture."""

import pytest
import raw_examples

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

from mowe.data import seqio_stream
from mowe.evaluation import classification_metrics
from mowe.words import byte_vocabulary
from tasks import glue

_BYTES = byte_vocabulary.ByteVocabulary()
_TWO = ['sentence1', 'sentence2']
# The fields of TFDS, and the inputs if these hold 'A b.' and 'C?' in this
# order.
_TEXTS = {
  'cola': (['sentence'], 'cola sentence: A b.'),
  'sst2': (['sentence'], 'sst2 sentence: A b.'),
  'mrpc': (_TWO, 'mrpc sentence1: A b. sentence2: C?'),
  'stsb': (_TWO, 'stsb sentence1: A b. sentence2: C?'),
  'qqp': (['question1', 'question2'], 'qqp question1: A b. question2: C?'),
  'mnli': (['premise', 'hypothesis'], 'mnli hypothesis: C? premise: A b.'),
  'qnli': (['question', 'sentence'], 'qnli question: A b. sentence: C?'),
  'rte': (_TWO, 'rte sentence1: A b. sentence2: C?'),
  'wnli': (_TWO, 'wnli sentence1: A b. sentence2: C?'),
}
for _name in ('mnli_matched', 'mnli_mismatched', 'ax'):
  _TEXTS[_name] = _TEXTS['mnli']


@pytest.fixture(scope='module', autouse=True)
def names():
  with raw_examples.registered(glue) as names:
    yield names


def _raw(kind, labels):
  fields = dict(zip(_TEXTS[kind][0], ('A b.', 'C?'), strict=False))
  raw = {field: [text] * len(labels) for field, text in fields.items()}
  return raw | {'label': labels, 'idx': list(range(7, 7 + len(labels)))}


@pytest.mark.slow
@pytest.mark.parametrize('kind', list(_TEXTS))
def test_each_task_is_written_as_in_t5(kind):
  name = f'glue_{kind}_v002'
  split = seqio.get_mixture_or_task(name).splits[-1]
  labels = [1.34] if kind == 'stsb' else [1]
  (example,) = raw_examples.read(name, split, _raw(kind, labels))
  assert _BYTES.decode(example['inputs']) == _TEXTS[kind][1]
  assert example['inputs'][-1] == example['targets'][-1] == 1
  assert example['idx'] == 7
  target = _BYTES.decode(example['targets'])
  assert example['answers'].tolist() == [target.encode()]
  # These are the second labels in the list of TFDS; stsb has a number.
  assert target == {
    'cola': 'acceptable',
    'sst2': 'positive',
    'mrpc': 'equivalent',
    'stsb': '1.4',
    'qqp': 'duplicate',
    'qnli': 'not_entailment',
    'rte': 'not_entailment',
    'wnli': 'entailment',
  }.get(kind, 'neutral')


def test_labels_are_those_of_tfds():
  for config in tfds.text.Glue.builder_configs.values():
    if config.name == 'stsb':
      continue
    kind = 'mnli' if config.name[:4] in ('mnli', 'ax') else config.name
    labels = classification_metrics.LABELS[kind]
    assert labels == tuple(config.label_classes)


def test_tasks_are_those_of_tfds(names):
  configs = tfds.text.Glue.builder_configs.values()
  assert {f'glue_{config.name}_v002' for config in configs} == set(names)
  assert set(seqio.get_mixture_or_task('glue_mnli_v002').splits) == {
    'train',
    'validation_matched',
    'validation_mismatched',
    'test_matched',
    'test_mismatched',
  }


def test_similarities_are_rounded_to_a_fifth():
  examples = raw_examples.read(
    'glue_stsb_v002', 'train', _raw('stsb', [0.0, 2.75, 3.26, 5.0, -1.0])
  )
  targets = [_BYTES.decode(example['targets']) for example in examples]
  assert targets == ['0.0', '2.8', '3.2', '5.0', '-1.0']
  scores = raw_examples.scores(
    'glue_stsb_v002', examples[:4], ['0.0', '2.8', '3.2', '5']
  )
  assert scores['pearson_corrcoef'] == pytest.approx(100)


def test_a_label_that_is_not_public_is_unknown():
  (example,) = raw_examples.read('glue_rte_v002', 'test', _raw('rte', [-1]))
  assert _BYTES.decode(example['targets']) == '<unk>'


def test_metrics_are_those_of_the_task():
  examples = raw_examples.read(
    'glue_mrpc_v002', 'validation', _raw('mrpc', [1, 0, 1])
  )
  scores = raw_examples.scores(
    'glue_mrpc_v002', examples, ['equivalent', 'equivalent', 'equivalent']
  )
  assert scores == {
    'f1': pytest.approx(80.0),
    'accuracy': pytest.approx(200 / 3),
  }
  assert seqio.get_mixture_or_task('glue_ax_v002').metric_fns == []
  (metric,) = seqio.get_mixture_or_task('glue_cola_v002').metric_fns
  assert metric is classification_metrics.of_task('glue_cola_v002')


def test_the_mixture_takes_tasks_by_their_size():
  mixture = seqio.get_mixture_or_task('glue_v002_proportional')
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  assert rates['glue_mnli_v002'] == 392_702
  assert rates['glue_mnli_matched_v002'] == 0
  assert 'glue_wnli_v002' not in rates and len(rates) == 11

  def raw(kind):
    return _raw(kind, [0.0 if kind == 'stsb' else 0])

  examples = raw_examples.read('glue_v002_proportional', 'train', raw, most=60)
  starts = [_BYTES.decode(one['inputs']).split()[0] for one in examples]
  # The two tasks have about eight of ten examples.
  assert 35 < starts.count('mnli') + starts.count('qqp') < 60


@pytest.mark.parametrize('kind', ['stsb', 'mnli'])
def test_random_data_of_the_declared_features(kind):
  with tfds.testing.mock_data(num_examples=2):
    task = seqio.get_mixture_or_task(f'glue_{kind}_v002')
    examples = task.get_dataset(
      {'inputs': 9, 'targets': 5}, shuffle=False, try_in_mem_cache=False
    )
    for example in examples.as_numpy_iterator():
      assert example['inputs'].dtype == example['targets'].dtype == 'int32'


def test_a_task_becomes_a_cache(tmp_path):
  with raw_examples.mocked(_raw('cola', [1, 0])):
    cache = seqio_stream.cache_seqio_task(
      'glue_cola_v002', tmp_path / 'c', _BYTES, split='validation'
    )
  assert _BYTES.decode(cache.tokens('inputs', 1)) == 'cola sentence: A b.'
  assert cache.record(1) == {
    'answers': ['unacceptable'],
    'idx': 8,
    'inputs_pretokenized': 'cola sentence: A b.',
    'targets_pretokenized': 'unacceptable',
  }
