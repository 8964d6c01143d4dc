"""Registers seqio tasks whose examples are a text and its answer."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mowe.data import seqio_stream
from mowe.evaluation import classification_metrics
from mowe.words import base_vocabulary, subword_vocabularies

tf, seqio = seqio_stream.import_seqio()

Vocabulary = str | os.PathLike | base_vocabulary.Vocabulary


def register(
  name: str,
  source: Any,
  preprocessors: Sequence[Any],
  vocabulary: Vocabulary,
  *,
  metrics: Sequence[Callable[..., dict[str, float]]] = (),
  postprocess: Callable[..., Any] | None = None,
) -> Any:
  """Registers a task with the features 'inputs' and 'targets'.

  Args:
    name: name of the new task.
    source: data source of seqio.
    preprocessors: functions that make the texts 'inputs' and 'targets'. Other
      fields become the records of a token cache; an evaluation compares with
      the list in the field 'answers'.
    vocabulary: a SentencePiece file, 'bytes', or a loaded vocabulary.
    metrics: functions that score predictions, given targets and predictions.
    postprocess: function that makes the targets and predictions that metrics
      are given; None takes `record_or_text`.

  Returns:
    The task.

  Raises:
    ValueError: the name is in use.
  """
  if isinstance(vocabulary, str | os.PathLike):
    vocabulary = subword_vocabularies.load_subwords(vocabulary)
  features = {
    feature: seqio.Feature(
      seqio_stream.seqio_vocabulary(vocabulary), add_eos=True
    )
    for feature in ('inputs', 'targets')
  }
  return seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[
      *preprocessors,
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=features,
    postprocess_fn=postprocess or record_or_text,
    metric_fns=list(metrics),
  )


def record_or_text(
  text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> Any:
  """Returns the record of a target, as in a token cache, or a prediction."""
  if not is_target:
    return text
  return {
    key: seqio_stream.as_json(value)
    for key, value in example.items()
    if key not in ('inputs', 'targets')
  }


def labelled(
  start: str, fields: Mapping[str, str], labels: Sequence[str]
) -> Callable[[Any], Any]:
  """Returns a preprocessor that turns texts into the text of a label.

  The inputs are 'start name: text name: text'.

  Args:
    start: the first word of the inputs.
    fields: the names of texts in the inputs, in order, with the names of their
      fields in the data set.
    labels: the texts of labels, by number. The label -1, which is not public,
      becomes '<unk>'.
  """
  texts = [*labels, classification_metrics.UNKNOWN]

  @seqio.map_over_dataset
  def convert(example):
    parts = [start]
    for name, field in fields.items():
      parts += [f'{name}:', example[field]]
    label = tf.cast(example['label'], tf.int32)
    target = tf.gather(texts, tf.where(label < 0, len(labels), label))
    inputs = tf.strings.join(parts, separator=' ')
    return asked(inputs, target, [target]) | index_of(example)

  return convert


def asked(inputs: Any, target: Any, answers: Any) -> dict[str, Any]:
  """Returns an example: the inputs, the answer to learn, all right answers."""
  return {'inputs': inputs, 'targets': target, 'answers': answers}


def index_of(example: Mapping[str, Any]) -> dict[str, Any]:
  """Returns 'idx' of TFDS, or its parts as 'idx/part'."""
  index = example['idx']
  if not isinstance(index, Mapping):
    return {'idx': index}
  return {f'idx/{part}': number for part, number in index.items()}
