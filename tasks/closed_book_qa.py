"""seqio tasks of closed-book question answering and fact checking.

`register_question_task` and `register_claim_task` register tasks of local JSON
lines, with the fields "question" and "answers", or "claim" and "label" as in
FEVER. `register_tfds_tasks` registers tasks of TFDS. Importing this module
registers nothing and reads no file.

Prompts, splits and targets of the TFDS questions are those of the closed-book
QA experiments of T5 (Roberts et al. 2020): the model learns the first answer,
and a prediction is right if it equals any of the answers. The test sets of
these collections are not public, or have been used too often. `NAME` therefore
holds out the last tenth of the training questions (the numbers are ORQA's) and
keeps the public validation set as 'test'. `NAME_test` trains on everything and
reports on the split that papers report. The claims of FEVER, whose answers are
'supports', 'refutes' or 'not enough info', are split in the same way; the data
set `fever` is built by our own `fever.py`.

| task | train | validation | test |
|---|---|---|---|
| trivia_qa_open | train[:78785] | train[78785:] | validation |
| trivia_qa_open_test | train+validation | - | test (answers not public) |
| natural_questions_open | train[:79168] | train[79168:] | validation |
| natural_questions_open_test | train | validation | - |
| web_questions_open | train[:3417] | train[3417:] | test |
| web_questions_open_test | train | test | - |
| fever | train[:130904] | train[130904:] | validation |
| fever_test | train | validation | - |
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mowe.data import seqio_stream
from mowe.data.text import claims, record_fields, text_files

from . import fever, text_to_text

tf, seqio = seqio_stream.import_seqio()

Files = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Vocabulary = text_to_text.Vocabulary


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]):
  """Returns EM and F1, 0 to 100, as `mowe.evaluation.text_metrics.squad`."""
  from mowe.evaluation import text_metrics

  return text_metrics.squad(targets, predictions)


def trivia_qa(targets: Sequence[Sequence[str]], predictions: Sequence[str]):
  """Returns EM and F1, 0 to 100, as `text_metrics.trivia_qa` does."""
  from mowe.evaluation import text_metrics

  return text_metrics.trivia_qa(targets, predictions)


def accuracy(targets: Sequence[Sequence[str]], predictions: Sequence[str]):
  """Returns the percentage of predictions that are the label."""
  right = [
    prediction.strip() in accepted
    for accepted, prediction in zip(targets, predictions, strict=True)
  ]
  return {'accuracy': 100 * sum(right) / len(right)}


def register_question_task(
  name: str,
  files: Files,
  vocabulary: Vocabulary,
  prompt: str = 'question: {question}',
  metric: Any = squad,
) -> Any:
  """Registers closed-book questions in local JSON lines.

  Args:
    name: name of the new task.
    files: patterns of the files of the split 'train', or a mapping from splits
      to patterns. Records have 'question' and 'answers' (a list, or one text).
    vocabulary: a SentencePiece file, 'bytes', or a loaded vocabulary.
    prompt: the text of the inputs, with '{question}' for the question.
    metric: function that scores predictions, given targets and predictions.

  Returns:
    The task.

  Raises:
    ValueError: no file matches, a question has no answer, or the name is in
      use.
  """

  def convert(record):
    return prompt.format(question=record['question']), record['answers']

  return _register_files(
    name, files, vocabulary, record_fields.QUESTIONS, convert, metric
  )


def register_claim_task(
  name: str,
  files: Files,
  vocabulary: Vocabulary,
  prompt: str = claims.PROMPT,
) -> Any:
  """Registers claims in local JSON lines, in the form of FEVER.

  Args:
    name: name of the new task.
    files: patterns of the files of the split 'train', or a mapping from splits
      to patterns. Records have 'claim' and 'label'.
    vocabulary: a SentencePiece file, 'bytes', or a loaded vocabulary.
    prompt: the text of the inputs, with '{claim}' for the claim.

  Returns:
    The task.

  Raises:
    ValueError: no file matches, a label is not in `claims.TARGETS`, or the name
      is in use.
  """

  def convert(record):
    answers = claims.as_question(record)['answers']
    return prompt.format(claim=record['claim']), answers

  fields = record_fields.all_texts(claims.FIELDS)
  return _register_files(name, files, vocabulary, fields, convert, accuracy)


def register_tfds_tasks(vocabulary: Vocabulary) -> list[str]:
  """Registers the TFDS tasks above, unless they are registered already.

  It also registers the mixtures 'closed_book_qa' and 'closed_book_qa_test' of
  the three collections of questions, with rates by their numbers of examples.

  Returns:
    The names of the tasks.
  """
  tasks = {}
  for row in (*_QUESTIONS, _CLAIMS):
    name, tfds_name, prepare, metric, splits, test_splits = row
    for suffix, table in (('', splits), ('_test', test_splits)):
      tasks[name + suffix] = tfds_name, table, prepare, metric
  for name, (tfds_name, table, prepare, metric) in tasks.items():
    if name not in seqio.TaskRegistry.names():
      source = seqio.TfdsDataSource(tfds_name=tfds_name, splits=table)
      _register(name, source, [prepare], vocabulary, metric)
  for suffix in ('', '_test'):
    if f'closed_book_qa{suffix}' not in seqio.MixtureRegistry.names():
      seqio.MixtureRegistry.add(
        f'closed_book_qa{suffix}',
        [row[0] + suffix for row in _QUESTIONS],
        default_rate=seqio.mixing_rate_num_examples,
      )
  return list(tasks)


def _register_files(
  name: str,
  files: Files,
  vocabulary: Vocabulary,
  fields: Mapping[str, record_fields.Check],
  convert: Any,
  metric: Any,
) -> Any:
  files = files if isinstance(files, Mapping) else {'train': files}
  for patterns in files.values():
    text_files.match_files(patterns)

  def examples(split) -> Iterator[dict[str, Any]]:
    for record in text_files.read_records(files[split], fields):
      inputs, answers = convert(record)
      yield {'inputs': inputs, 'targets': answers[0], 'answers': answers}

  def read(split, shuffle_files=False, seed=None):
    del shuffle_files, seed  # seqio.Task shuffles examples, not files.
    return tf.data.Dataset.from_generator(
      functools.partial(examples, split),
      output_signature={
        'inputs': tf.TensorSpec([], tf.string),
        'targets': tf.TensorSpec([], tf.string),
        'answers': tf.TensorSpec([None], tf.string),
      },
    )

  source = seqio.FunctionDataSource(read, splits=tuple(files))
  return _register(name, source, [], vocabulary, metric)


def _register(
  name: str,
  source: Any,
  preprocessors: Sequence[Any],
  vocabulary: Vocabulary,
  metric: Any,
) -> Any:
  return text_to_text.register(
    name,
    source,
    preprocessors,
    vocabulary,
    metrics=[metric],
    postprocess=_answers_or_text,
  )


def _answers_or_text(text: str, example: Any = None, is_target: bool = False):
  """Returns the accepted answers of a target, or the text of a prediction."""
  if not is_target:
    return text
  return [tf.compat.as_text(answer) for answer in example['answers']]


def _asked(prompt: str, question: Any, target: Any, answers: Any) -> dict:
  inputs = tf.strings.join([prompt, question])
  return {'inputs': inputs, 'targets': target, 'answers': answers}


@seqio.map_over_dataset
def _trivia_qa(example):
  answer = example['answer']
  return _asked(
    'trivia_qa question: ',
    example['question'],
    answer['value'],
    answer['aliases'],
  )


@seqio.map_over_dataset
def _natural_questions(example):
  answers = example['answer']
  return _asked('nq question: ', example['question'], answers[0], answers)


@seqio.map_over_dataset
def _web_questions(example):
  answers = example['answers']
  return _asked('wq question: ', example['question'], answers[0], answers)


@seqio.map_over_dataset
def _fever(example):
  targets = tf.constant([claims.TARGETS[label] for label in fever.LABELS])
  target = targets[example['label']]
  return _asked('fever claim: ', example['claim'], target, [target])


# Each row has the name of a task, its name in TFDS, how an example is
# converted, the metric, the splits, and the splits of NAME_test.
_QUESTIONS = (
  (
    'trivia_qa_open',
    'trivia_qa/unfiltered.nocontext:1.1.0',
    _trivia_qa,
    trivia_qa,
    {
      'train': 'train[:78785]',
      'validation': 'train[78785:]',
      'test': 'validation',
    },
    {'train': 'train+validation', 'test': 'test'},
  ),
  (
    'natural_questions_open',
    'natural_questions_open:1.0.0',
    _natural_questions,
    squad,
    {
      'train': 'train[:79168]',
      'validation': 'train[79168:]',
      'test': 'validation',
    },
    {'train': 'train', 'validation': 'validation'},
  ),
  (
    'web_questions_open',
    'web_questions:1.0.0',
    _web_questions,
    squad,
    {'train': 'train[:3417]', 'validation': 'train[3417:]', 'test': 'test'},
    {'train': 'train', 'validation': 'test'},
  ),
)
_CLAIMS = (
  'fever',
  'fever:1.0.0',
  _fever,
  accuracy,
  {
    'train': 'train[:130904]',
    'validation': 'train[130904:]',
    'test': 'validation',
  },
  {'train': 'train', 'validation': 'validation'},
)
