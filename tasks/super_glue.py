"""seqio tasks of SuperGLUE: texts to words, in T5's format.

`register_tfds_tasks` registers the tasks of T5, `super_glue_NAME_v102`, and
their mixture `super_glue_v102_proportional`. Importing this module registers
nothing.

| name | inputs | targets |
|---|---|---|
| boolq | boolq passage: question: | False, True |
| cb | cb hypothesis: premise: | entailment, contradiction, neutral |
| copa | copa choice1: choice2: premise: question: | choice1, choice2 |
| multirc | multirc question: answer: paragraph: | False, True |
| record | record query: entities: passage: | one answer, of each an example |
| rte, axb, axg | rte hypothesis: premise: | entailment, not_entailment |
| wic | wic sentence1: sentence2: word: | False, True |
| wsc | wsc: text with the *pronoun* | the noun |

wsc is two tasks: `super_glue_wsc_v102_simple_train` has the pronouns that mean
the noun, and `super_glue_wsc_v102_simple_eval` has all pronouns. Since wsc has
259 such pronouns alone, `dpr_v001_simple` (Definite Pronoun Resolution) is
trained on beside it. The labels of test splits are not public. The metrics are
those of `classification_metrics.of_task`; axb and axg have a test split alone.
"""

import re
from typing import Any

from mowe.data import seqio_stream
from mowe.evaluation import classification_metrics

from . import text_to_text

tf, seqio = seqio_stream.import_seqio()

MIXTURE = 'super_glue_v102_proportional'

_SPLITS = ('train', 'validation', 'test')
_PREMISES = {'hypothesis': 'hypothesis', 'premise': 'premise'}
# Each row has the name of a task, its first word and labels, the names of its
# inputs with those of TFDS, and its splits.
_LABELLED = (
  ('boolq', 'boolq', {'passage': 'passage', 'question': 'question'}, _SPLITS),
  ('cb', 'cb', _PREMISES, _SPLITS),
  (
    'copa',
    'copa',
    {name: name for name in ('choice1', 'choice2', 'premise', 'question')},
    _SPLITS,
  ),
  (
    'multirc',
    'multirc',
    {name: name for name in ('question', 'answer', 'paragraph')},
    _SPLITS,
  ),
  ('rte', 'rte', _PREMISES, _SPLITS),
  (
    'wic',
    'wic',
    {name: name for name in ('sentence1', 'sentence2', 'word')},
    _SPLITS,
  ),
  # The first sentence is the premise in T5's axb.
  (
    'axb',
    'rte',
    {'hypothesis': 'sentence2', 'premise': 'sentence1'},
    _SPLITS[2:],
  ),
  ('axg', 'rte', _PREMISES, _SPLITS[2:]),
)
# The rates of T5's mixture are numbers of training examples; a task with the
# rate 0 is for evaluation alone.
_RATES = {
  'dpr_v001_simple': 1_322,
  'super_glue_wsc_v102_simple_train': 259,
  'super_glue_wsc_v102_simple_eval': 0,
  'super_glue_boolq_v102': 9_427,
  'super_glue_cb_v102': 250,
  'super_glue_copa_v102': 400,
  'super_glue_multirc_v102': 27_243,
  'super_glue_record_v102': 138_854,
  'super_glue_rte_v102': 2_490,
  'super_glue_wic_v102': 5_428,
  'super_glue_axb_v102': 0,
  'super_glue_axg_v102': 0,
}


def register_tfds_tasks(vocabulary: text_to_text.Vocabulary) -> list[str]:
  """Registers the tasks and the mixture, unless they are registered already.

  Args:
    vocabulary: a SentencePiece file, 'bytes', or a loaded vocabulary.

  Returns:
    The names of the tasks.
  """
  tasks = _make_tasks()
  for name, (tfds_name, splits, preprocessors) in tasks.items():
    if name in seqio.TaskRegistry.names():
      continue
    metric = classification_metrics.of_task(name)
    text_to_text.register(
      name,
      seqio.TfdsDataSource(tfds_name=tfds_name, splits=splits),
      preprocessors,
      vocabulary,
      metrics=[metric] if metric else [],
    )
  if MIXTURE not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add(
      MIXTURE, [(name, float(rate)) for name, rate in _RATES.items()]
    )
  return list(tasks)


def _make_tasks() -> dict[str, tuple[str, tuple[str, ...], list[Any]]]:
  """Returns the TFDS name, the splits and the preprocessors of each task."""
  tasks = {}
  for kind, start, fields, splits in _LABELLED:
    labels = classification_metrics.LABELS[start]
    preprocessors = [text_to_text.labelled(start, fields, labels)]
    if kind == 'multirc':
      preprocessors.append(_without_markup)
    tasks[f'super_glue_{kind}_v102'] = (
      f'super_glue/{kind}:1.0.2',
      splits,
      preprocessors,
    )
  wsc = 'super_glue/wsc.fixed:1.0.2'
  return tasks | {
    'super_glue_record_v102': (
      'super_glue/record:1.0.2',
      _SPLITS,
      [_one_for_each_answer],
    ),
    'super_glue_wsc_v102_simple_train': (
      wsc,
      _SPLITS[:1],
      [_that_mean_the_noun, _pronoun_and_noun],
    ),
    'super_glue_wsc_v102_simple_eval': (wsc, _SPLITS[1:], [_pronoun_and_noun]),
    'dpr_v001_simple': (
      'definite_pronoun_resolution:1.1.0',
      ('train', 'test'),
      [_resolved_pronoun],
    ),
  }


def mark_pronoun(text: str, pronoun: str, index: int) -> str:
  """Puts asterisks around the pronoun at a word.

  Args:
    text: words with single blanks between them.
    pronoun: the pronoun as the text writes it.
    index: index of the pronoun among the words. One example of WSC gives that
      of the word before.

  Raises:
    ValueError: the pronoun is not in the text.
  """
  words = text.split(' ')
  places = [
    place
    for place, word in enumerate(words)
    if re.fullmatch(re.escape(pronoun) + r'\W*', word)
  ]
  if not places:
    raise ValueError(
      f'A pronoun must be a word of its text, but {pronoun!r} is not in '
      f'{text!r}. Correct span2_text of the data set.'
    )
  place = min(places, key=lambda place: abs(place - index))
  rest = words[place][len(pronoun) :]
  # T5 writes the one pronoun with punctuation in this way: *him* ,"
  words[place] = f'*{pronoun}* {rest}' if rest else f'*{pronoun}*'
  return ' '.join(words)


@seqio.map_over_dataset
def _without_markup(example: Any) -> dict[str, Any]:
  inputs = tf.strings.regex_replace(example['inputs'], '<br>', ' ')
  return example | {'inputs': tf.strings.regex_replace(inputs, '</?b>', '')}


def _one_for_each_answer(dataset: Any) -> Any:
  """Makes an example of ReCoRD for each answer of a query, or one if none."""

  def convert(example):
    # Highlights are turned into sentences of the passage.
    passage = tf.strings.regex_replace(
      example['passage'], r'([.?!"\'])\n@highlight\n', r'\1 '
    )
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(example['entities'], separator=', ')
    inputs = tf.strings.join(
      ['record query:', example['query'], 'entities:', entities]
      + ['passage:', passage],
      separator=' ',
    )
    answers = example['answers']
    answers = tf.cond(
      tf.size(answers) > 0,
      lambda: answers,
      lambda: tf.constant([classification_metrics.UNKNOWN]),
    )
    index = text_to_text.index_of(example)
    return tf.data.Dataset.from_tensor_slices(answers).map(
      lambda answer: text_to_text.asked(inputs, answer, answers) | index
    )

  return dataset.flat_map(convert)


def _that_mean_the_noun(dataset: Any) -> Any:
  return dataset.filter(lambda example: tf.equal(example['label'], 1))


@seqio.map_over_dataset
def _pronoun_and_noun(example: Any) -> dict[str, Any]:
  def mark(text, pronoun, index):
    return mark_pronoun(text.decode(), pronoun.decode(), index).encode()

  parts = [example['text'], example['span2_text'], example['span2_index']]
  marked = tf.ensure_shape(tf.numpy_function(mark, parts, tf.string), [])
  noun = example['span1_text']
  return {
    **text_to_text.asked(tf.strings.join(['wsc: ', marked]), noun, [noun]),
    'label': example['label'],
    'idx': example['idx'],
  }


@seqio.map_over_dataset
def _resolved_pronoun(example: Any) -> dict[str, Any]:
  def mark(text, pronoun):
    # If there are several, the first one is meant.
    pattern = f' ({re.escape(pronoun.decode())})([ .,])'
    return re.sub(pattern, r' *\1*\2', text.decode(), count=1).encode()

  parts = [example['sentence'], example['pronoun']]
  marked = tf.ensure_shape(tf.numpy_function(mark, parts, tf.string), [])
  noun = example['candidates'][example['label']]
  inputs = tf.strings.join(['wsc: ', marked])
  return text_to_text.asked(inputs, noun, [noun])
