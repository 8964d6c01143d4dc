"""The seqio task of examples that are a text and the text to answer it with."""

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
    name: of the new task.
    source: of seqio.
    preprocessors: make the texts 'inputs' and 'targets'. Other fields become
      the records of a token cache; 'answers', a list, is what an evaluation
      compares with.
    vocabulary: a SentencePiece file, 'bytes', or a loaded vocabulary.
    metrics: functions of targets and predictions.
    postprocess: makes what metrics are given; None: `record_or_text`.

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
  """The record of a target, as a token cache keeps it; else the text."""
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
  """A preprocessor: 'start name: text name: text' to the text of a label.

  Args:
    start: the first word of the inputs.
    fields: names in the inputs, in order, and those of the data set.
    labels: texts of the labels; a label of -1, not public, becomes '<unk>'.
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
  """An example: the inputs, the text to learn, and all that are right."""
  return {'inputs': inputs, 'targets': target, 'answers': answers}


def index_of(example: Mapping[str, Any]) -> dict[str, Any]:
  """'idx' of TFDS, or its parts as 'idx/part'."""
  index = example['idx']
  if not isinstance(index, Mapping):
    return {'idx': index}
  return {f'idx/{part}': number for part, number in index.items()}
