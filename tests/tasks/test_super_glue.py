"""Tests seqio tasks of SuperGLUE on mocked TFDS: texts, metrics, mixture."""

import numpy as np
import pytest
import raw_examples

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

from mowe.data import seqio_stream
from mowe.evaluation import classification_metrics
from mowe.words import byte_vocabulary
from tasks import super_glue

_BYTES = byte_vocabulary.ByteVocabulary()
_PREMISES = {'premise': ['A b.'], 'hypothesis': ['C?']}
_SENTENCES = {'sentence1': ['A b.'], 'sentence2': ['C?']}
# Each task has the fields of TFDS with label 1, the inputs, and the target.
_LABELLED = {
  'boolq': (
    {'question': ['is it'], 'passage': ['A b.']},
    'boolq passage: A b. question: is it',
    'True',
  ),
  'cb': (_PREMISES, 'cb hypothesis: C? premise: A b.', 'contradiction'),
  'copa': (
    {
      'premise': ['A b.'],
      'question': ['cause'],
      'choice1': ['D.'],
      'choice2': ['E.'],
    },
    'copa choice1: D. choice2: E. premise: A b. question: cause',
    'choice2',
  ),
  'rte': (_PREMISES, 'rte hypothesis: C? premise: A b.', 'not_entailment'),
  'axg': (_PREMISES, 'rte hypothesis: C? premise: A b.', 'not_entailment'),
  'axb': (_SENTENCES, 'rte hypothesis: C? premise: A b.', 'not_entailment'),
  'wic': (
    _SENTENCES | {'word': ['b'], 'start1': [2], 'end1': [3]},
    'wic sentence1: A b. sentence2: C? word: b',
    'True',
  ),
}
_MULTIRC = {
  'paragraph': ['<b>One: </b>Ada ran.<br>It rained.'] * 3,
  'question': ['Who?', 'Who?', 'When?'],
  'answer': ['Ada', '<b>Bo</b>', 'Now'],
  'label': [1, 0, 1],
  'idx': {'paragraph': [2, 2, 2], 'question': [5, 5, 6], 'answer': [0, 1, 2]},
}
_RECORD = {
  'passage': ['Ada ran\n@highlight\nShe won!\n@highlight\nBo sat.'] * 2,
  'query': ['@placeholder ran.', '@placeholder sat.'],
  'entities': [['Ada', 'Bo']] * 2,
  'answers': [['Ada', 'Ada B.'], ['Bo', 'B.']],
  'idx': {'passage': [3, 3], 'query': [8, 9]},
}
_WSC = {
  'text': ['Bo asked Al if he could pay.', 'Bo asked Al if he could pay.'],
  'span1_text': ['Bo', 'Al'],
  'span1_index': [0, 2],
  'span2_text': ['he', 'he'],
  'span2_index': [4, 4],
  'label': [1, 0],
  'idx': [6, 7],
}


@pytest.fixture(scope='module', autouse=True)
def names():
  with raw_examples.registered(super_glue) as names:
    yield names


def _texts(examples):
  return [
    (_BYTES.decode(one['inputs']), _BYTES.decode(one['targets']))
    for one in examples
  ]


@pytest.mark.parametrize('kind', list(_LABELLED))
def test_labelled_tasks_are_written_as_in_t5(kind):
  name = f'super_glue_{kind}_v102'
  fields, inputs, target = _LABELLED[kind]
  task = seqio.get_mixture_or_task(name)
  raw = fields | {'label': [1], 'idx': [7]}
  (example,) = raw_examples.read(name, task.splits[-1], raw)
  assert _texts([example]) == [(inputs, target)]
  assert example['answers'].tolist() == [target.encode()]
  assert example['idx'] == 7
  if kind[:2] == 'ax':
    assert (*task.splits, *task.metric_fns) == ('test',)
  else:
    metric = 'mean_3class_f1' if kind == 'cb' else 'accuracy'
    assert metric in raw_examples.scores(name, [example], [target])


def test_labels_are_those_of_tfds():
  for config in tfds.text.SuperGlue.builder_configs.values():
    kind = 'rte' if config.name[:2] == 'ax' else config.name
    if kind not in ('record', 'wsc', 'wsc.fixed'):
      labels = classification_metrics.LABELS[kind]
      assert labels == tuple(config.label_classes)


def test_multirc_has_no_markup_and_its_questions_are_grouped():
  name = 'super_glue_multirc_v102'
  examples = raw_examples.read(name, 'validation', _MULTIRC)
  paragraph = 'paragraph: One: Ada ran. It rained.'
  assert _texts(examples) == [
    (f'multirc question: Who? answer: Ada {paragraph}', 'True'),
    (f'multirc question: Who? answer: Bo {paragraph}', 'False'),
    (f'multirc question: When? answer: Now {paragraph}', 'True'),
  ]
  scores = raw_examples.scores(name, examples, ['True', 'True', 'True'])
  # The precision is 2/3 and the recall 1. One of two questions is all right.
  assert scores == {'f1': pytest.approx(80.0), 'exact_match': 50.0}


def test_record_has_an_example_for_each_answer():
  name = 'super_glue_record_v102'
  examples = raw_examples.read(name, 'train', _RECORD)
  rest = 'entities: Ada, Bo passage: Ada ran. She won! Bo sat.'
  first = f'record query: @placeholder ran. {rest}'
  second = f'record query: @placeholder sat. {rest}'
  assert _texts(examples) == [
    (first, 'Ada'),
    (first, 'Ada B.'),
    (second, 'Bo'),
    (second, 'B.'),
  ]
  assert examples[1]['answers'].tolist() == [b'Ada', b'Ada B.']
  # Only the first prediction for each query counts.
  scores = raw_examples.scores(name, examples, ['ada b', 'x', 'x', 'Bo'])
  assert scores == {'em': 50.0, 'f1': 50.0}


def test_a_query_without_public_answers_is_one_example():
  raw = {key: value[:1] for key, value in _RECORD.items() if key != 'idx'}
  raw |= {
    'answers': np.zeros([1, 0], 'S1'),
    'idx': {'passage': [3], 'query': [8]},
  }
  (example,) = raw_examples.read('super_glue_record_v102', 'test', raw)
  assert _texts([example])[0][1] == '<unk>'
  assert example['answers'].tolist() == [b'<unk>']


def test_wsc_is_trained_on_pronouns_that_mean_the_noun():
  asked = 'wsc: Bo asked Al if *he* could pay.'
  train = raw_examples.read('super_glue_wsc_v102_simple_train', 'train', _WSC)
  assert _texts(train) == [(asked, 'Bo')]
  name = 'super_glue_wsc_v102_simple_eval'
  examples = raw_examples.read(name, 'validation', _WSC)
  assert _texts(examples) == [(asked, 'Bo'), (asked, 'Al')]
  # Both predictions name what the pronoun means. Only in the second example
  # this is not the noun.
  assert raw_examples.scores(name, examples, ['Bo', 'Bo']) == {
    'accuracy': 100.0
  }
  assert raw_examples.scores(name, examples, ['Al', 'Al']) == {'accuracy': 0.0}


@pytest.mark.parametrize(
  ('text', 'pronoun', 'index', 'expected'),
  [
    # The word at the index is marked, and not the first one that is equal.
    ('if it is , it was', 'it', 4, 'if it is , *it* was'),
    ('"Good for him," he said. ', 'him', 2, '"Good for *him* ," he said. '),
    # In one place of WSC, the index is that of the word before.
    ('to use it , but now', 'it', 1, 'to use *it* , but now'),
    ('They ran', 'They', 0, '*They* ran'),
  ],
)
def test_a_pronoun_is_marked(text, pronoun, index, expected):
  assert super_glue.mark_pronoun(text, pronoun, index) == expected


def test_a_pronoun_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match="'she' is not in 'he ran'"):
    super_glue.mark_pronoun('he ran', 'she', 0)


def test_definite_pronouns_are_written_as_wsc():
  raw = {
    'sentence': ['Bo saw Al as he ran, but he fell.', 'Bo hit Al: I saw him.'],
    'pronoun': ['he', 'him'],
    'candidates': [['Bo', 'Al'], ['Bo', 'Al']],
    'label': [0, 1],
  }
  examples = raw_examples.read('dpr_v001_simple', 'train', raw)
  assert _texts(examples) == [
    ('wsc: Bo saw Al as *he* ran, but he fell.', 'Bo'),
    ('wsc: Bo hit Al: I saw *him*.', 'Al'),
  ]
  assert raw_examples.scores('dpr_v001_simple', examples, ['Bo', 'Bo']) == {
    'accuracy': 50.0
  }


def _raw(kind):
  if kind in _LABELLED:
    return _LABELLED[kind][0] | {'label': [1], 'idx': [7]}
  others = {'multirc': _MULTIRC, 'record': _RECORD, 'wsc.fixed': _WSC}
  return others.get(kind) or {
    'sentence': ['Bo saw him.'],
    'pronoun': ['him'],
    'candidates': [['Bo', 'Al']],
    'label': [1],
  }


def test_the_mixture_holds_what_is_trained_on(names):
  mixture = seqio.get_mixture_or_task('super_glue_v102_proportional')
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  assert set(rates) == set(names)
  assert rates['super_glue_record_v102'] == 138_854
  assert rates['super_glue_wsc_v102_simple_eval'] == 0
  examples = raw_examples.read(
    'super_glue_v102_proportional', 'train', _raw, most=40
  )
  starts = [_BYTES.decode(one['inputs']).split()[0] for one in examples]
  # Three of four examples are ReCoRD, and multirc is the largest of the others.
  assert 20 < starts.count('record') < 40 and 'multirc' in starts
  assert set(examples[0]) == {'inputs', 'targets'}


@pytest.mark.parametrize('kind', ['multirc', 'record'])
def test_random_data_of_the_declared_features(kind):
  with tfds.testing.mock_data(num_examples=2):
    task = seqio.get_mixture_or_task(f'super_glue_{kind}_v102')
    examples = task.get_dataset(
      {'inputs': 9, 'targets': 5}, shuffle=False, try_in_mem_cache=False
    )
    for example in examples.as_numpy_iterator():
      assert example['inputs'].dtype == example['targets'].dtype == 'int32'


def test_a_task_becomes_a_cache_with_what_its_metric_needs(tmp_path):
  name = 'super_glue_multirc_v102'
  with raw_examples.mocked(_MULTIRC):
    cache = seqio_stream.cache_seqio_task(
      name, tmp_path / 'c', _BYTES, split='validation'
    )
  records = list(cache.records())
  assert records[2]['idx/question'] == 6
  metric = classification_metrics.of_task(name)
  assert metric(records, ['True', 'False', 'False']) == {
    'f1': pytest.approx(200 / 3),
    'exact_match': 50.0,
  }
