"""Metrics of GLUE and SuperGLUE, as T5 computes them, and of FEVER.

A metric takes `targets`, the records of examples with their 'answers', and
`predictions`, one text for each example. It returns numbers by name: from 0 to
100, or from -100 to 100 for correlations. `of_task` finds the metric by the
name of a task, so that a token cache can be evaluated without TensorFlow.

The number of a label is its place in `LABELS`. A prediction that is no label
has the number INVALID.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mowe.evaluation import text_metrics

Record = Mapping[str, Any]
Metric = Callable[[Sequence[Record], Sequence[str]], dict[str, float]]
# Takes the label numbers of targets and of predictions, each
# <float64>[examples], and returns one number.
Score = Callable[[np.ndarray, np.ndarray], float]

INVALID = -1
# Examples whose label is not public have this answer.
UNKNOWN = '<unk>'
_TWO_WAY = ('entailment', 'not_entailment')
_TRUTH = ('False', 'True')
LABELS = {
  'cola': ('unacceptable', 'acceptable'),
  'sst2': ('negative', 'positive'),
  'mrpc': ('not_equivalent', 'equivalent'),
  'qqp': ('not_duplicate', 'duplicate'),
  'mnli': ('entailment', 'neutral', 'contradiction'),
  'qnli': _TWO_WAY,
  'rte': _TWO_WAY,
  'wnli': _TWO_WAY[::-1],
  'boolq': _TRUTH,
  'cb': ('entailment', 'contradiction', 'neutral'),
  'copa': ('choice1', 'choice2'),
  'multirc': _TRUTH,
  'wic': _TRUTH,
  'fever': ('supports', 'refutes', 'not enough info'),
}
# These words do not help to tell one referent from another.
_DETERMINERS = frozenset(
  'a an the this that these those my your his her our their which whose '
  'few some many much each every'.split()
)


def accuracy(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Share of predictions that are the target, 0 to 1."""
  return float(np.mean(targets == predictions))


def f1_of_class(
  targets: np.ndarray, predictions: np.ndarray, label: int
) -> float:
  """F1 of one class, 0 to 1; 0 if it is neither a target nor a prediction."""
  target, predicted = targets == label, predictions == label
  both = target.sum() + predicted.sum()
  return float(2 * (target & predicted).sum() / both) if both else 0.0


def binary_f1(targets: np.ndarray, predictions: np.ndarray) -> float:
  """F1 of class 1 of two, 0 to 1; an INVALID prediction counts as wrong."""
  wrong = 1 - targets
  return f1_of_class(
    targets, np.where(predictions == INVALID, wrong, predictions), 1
  )


def mean_f1(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Mean of the F1 of three classes, 0 to 1."""
  return float(
    np.mean([f1_of_class(targets, predictions, label) for label in range(3)])
  )


def matthews_correlation(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Correlation of classes, -1 to 1; 0 if targets or predictions are constant.

  For two classes this is Matthews' phi. INVALID counts as a third class, for
  which it is the R_K of Gorodkin 2004.
  """
  classes = np.unique(np.concatenate([targets, predictions]))
  target = (targets[:, None] == classes).astype(np.float64)
  predicted = (predictions[:, None] == classes).astype(np.float64)
  return _correlation(target, predicted)


def pearson(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Pearson's correlation, -1 to 1; 0 if one of the arrays is constant."""
  return _correlation(targets[:, None], predictions[:, None])


def spearman(targets: np.ndarray, predictions: np.ndarray) -> float:
  """Pearson's correlation of ranks; equal values share their mean rank."""
  return pearson(_ranks(targets), _ranks(predictions))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Correlation of [examples, columns], summed over columns; 0 if constant.

  The covariances of the columns are added up, and divided by the geometric mean
  of both arrays' total variances.
  """
  a, b = a - a.mean(axis=0), b - b.mean(axis=0)
  scale = np.sqrt((a * a).sum() * (b * b).sum())
  return float((a * b).sum() / scale) if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
  """Ranks from 1; equal values share the mean of their ranks."""
  _, inverse, counts = np.unique(
    values, return_inverse=True, return_counts=True
  )
  # The cumulative sum is the last rank of equal values, and their mean rank is
  # half of the others' number below it.
  return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


@dataclasses.dataclass(frozen=True)
class LabelMetric:
  """A metric of tasks whose answers are labels.

  Attributes:
    labels: the texts of the classes.
    scores: pairs of the name of a score and its function.

  Call: records and predicted texts of examples to numbers by name. Each is 100
    times a score.

  Raises:
    ValueError: there are no records, not as many predictions as records, or an
      answer is no label.
  """

  labels: tuple[str, ...]
  scores: tuple[tuple[str, Score], ...]

  def __call__(
    self, targets: Sequence[Record], predictions: Sequence[str]
  ) -> dict[str, float]:
    right, found = _classes(self.labels, targets, predictions)
    return {name: 100 * score(right, found) for name, score in self.scores}


def multirc(
  targets: Sequence[Record], predictions: Sequence[str]
) -> dict[str, float]:
  """F1 over all answers, and the share of questions with all answers right.

  Records need 'idx/paragraph' and 'idx/question', which tell the questions
  apart.
  """
  right, found = _classes(LABELS['multirc'], targets, predictions)
  questions: dict[tuple[int, int], bool] = {}
  for one, is_right in zip(targets, right == found, strict=True):
    key = one['idx/paragraph'], one['idx/question']
    questions[key] = questions.get(key, True) and bool(is_right)
  return {
    'f1': 100 * binary_f1(right, found),
    'exact_match': 100 * float(np.mean(list(questions.values()))),
  }


def record(
  targets: Sequence[Record], predictions: Sequence[str]
) -> dict[str, float]:
  """EM and F1 of ReCoRD, computed as for SQuAD.

  A query with several answers is stored as several examples with the same
  inputs, so only the first of them counts. Records need 'idx/passage' and
  'idx/query', which tell the queries apart.
  """
  _check_lengths(targets, predictions)
  queries: dict[tuple[int, int], tuple[list[str], str]] = {}
  for one, prediction in zip(targets, predictions, strict=True):
    key = one['idx/passage'], one['idx/query']
    queries.setdefault(key, (one['answers'], prediction))
  answers, texts = zip(*queries.values(), strict=True)
  return text_metrics.squad(answers, texts)


def stsb(
  targets: Sequence[Record], predictions: Sequence[str]
) -> dict[str, float]:
  """Correlations of similarities; a text that is no number counts as -1."""
  _check_lengths(targets, predictions)
  right = np.array([float(one['answers'][0]) for one in targets])
  found = np.array([_number(text) for text in predictions])
  return {
    'pearson_corrcoef': 100 * pearson(right, found),
    'spearman_corrcoef': 100 * spearman(right, found),
  }


def wsc(
  targets: Sequence[Record], predictions: Sequence[str]
) -> dict[str, float]:
  """Accuracy of deciding whether a pronoun refers to a noun.

  The model says to what the pronoun refers. If `means` finds that this is the
  noun in the record's answer, the decision is 1. It is right if it equals the
  record's 'label'.
  """
  _check_lengths(targets, predictions)
  said = [
    means(text, one['answers'][0])
    for one, text in zip(targets, predictions, strict=True)
  ]
  right = [
    answer == one['label'] for one, answer in zip(targets, said, strict=True)
  ]
  return {'accuracy': 100 * float(np.mean(right))}


def means(prediction: str, referent: str) -> int:
  """Returns 1 if a text means the referent, 0 if not, INVALID if it is empty.

  It does if all words of one of them are in the other, where case and
  determiners are ignored. But 'Bob' does not mean "Bob's hat": either both have
  an apostrophe or neither has one.
  """
  said, meant = (_content(text) for text in (prediction, referent))
  if not said:
    return INVALID
  if ("'" in prediction) != ("'" in referent):
    return 0
  return int(said <= meant or meant <= said)


def dpr(
  targets: Sequence[Record], predictions: Sequence[str]
) -> dict[str, float]:
  """Accuracy on definite pronoun resolution, where answers are free text."""
  _check_lengths(targets, predictions)
  right = [
    text == one['answers'][0]
    for one, text in zip(targets, predictions, strict=True)
  ]
  return {'accuracy': 100 * float(np.mean(right))}


def of_task(name: str) -> Metric | None:
  """The metric of a seqio task of GLUE, SuperGLUE or FEVER; None for others."""
  return _METRICS.get(name)


def _content(text: str) -> set[str]:
  return set(text.lower().split()) - _DETERMINERS


def _number(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    return -1.0
  return value if np.isfinite(value) else -1.0


def _classes(labels, targets, predictions) -> tuple[np.ndarray, np.ndarray]:
  """Label numbers <float64>[examples] of the targets and of the predictions."""
  _check_lengths(targets, predictions)
  numbers = {label: float(number) for number, label in enumerate(labels)}
  answers = [one['answers'][0] for one in targets]
  for answer in answers:
    if answer not in numbers:
      raise ValueError(
        f'The answer of an example must be one of {labels}, but is {answer!r}. '
        'Evaluate a split whose labels are public.'
      )
  return (
    np.array([numbers[answer] for answer in answers]),
    np.array([numbers.get(text, INVALID) for text in predictions], np.float64),
  )


def _check_lengths(targets, predictions) -> None:
  if len(targets) != len(predictions) or not targets:
    raise ValueError(
      'Each example needs a record and one prediction, but there are '
      f'{len(targets)} records and {len(predictions)} predictions. Give an '
      'empty text for an example without prediction.'
    )


def _make_metrics() -> dict[str, Metric]:
  accurate = (('accuracy', accuracy),)
  with_f1 = (('f1', binary_f1), *accurate)
  scores = {
    'cola': (('matthews_corrcoef', matthews_correlation),),
    'mrpc': with_f1,
    'qqp': with_f1,
    'cb': (('mean_3class_f1', mean_f1), *accurate),
  }
  of = lambda name, labels: LabelMetric(
    LABELS[labels], scores.get(name, accurate)
  )
  glue = ('cola', 'sst2', 'mrpc', 'qqp', 'mnli', 'qnli', 'rte', 'wnli')
  metrics = {f'glue_{name}_v002': of(name, name) for name in glue}
  for name in ('mnli_matched', 'mnli_mismatched'):
    metrics[f'glue_{name}_v002'] = of(name, 'mnli')
  for name in ('boolq', 'cb', 'copa', 'rte', 'wic'):
    metrics[f'super_glue_{name}_v102'] = of(name, name)
  return metrics | {
    'fever': of('fever', 'fever'),
    'fever_test': of('fever', 'fever'),
    'glue_stsb_v002': stsb,
    'super_glue_multirc_v102': multirc,
    'super_glue_record_v102': record,
    'super_glue_wsc_v102_simple_eval': wsc,
    'dpr_v001_simple': dpr,
  }


_METRICS = _make_metrics()
