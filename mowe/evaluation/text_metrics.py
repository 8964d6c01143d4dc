"""Exact match and F1 of short text answers: SQuAD and TriviaQA conventions.

Three references are reproduced: the official SQuAD script and T5's `squad` and
`trivia_qa` metrics. They differ in the normalisation (`normalize_squad`,
`normalize_trivia_qa`) and in one corner of F1: when nothing is left of both
the prediction and the answer, the SQuAD script gives 1 and T5 gives 0.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

Normalize = Callable[[str], str]

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_SQUAD_PUNCTUATION = str.maketrans('', '', string.punctuation)
# Blanks, not deletions: TriviaQA takes "New-York" for "New York", while SQuAD
# takes "1,000" for "1000". Double typographic quotes are in neither list.
_TRIVIA_QA_PUNCTUATION = str.maketrans(
  dict.fromkeys(string.punctuation + '‘’´`_', ' ')
)


def normalize_squad(text: str) -> str:
  """Lower case, punctuation deleted, articles and extra blanks removed."""
  return _without_articles(text.lower().translate(_SQUAD_PUNCTUATION))


def normalize_trivia_qa(text: str) -> str:
  """As `normalize_squad`, but punctuation becomes a blank."""
  return _without_articles(text.lower().translate(_TRIVIA_QA_PUNCTUATION))


def _without_articles(text: str) -> str:
  return ' '.join(_ARTICLES.sub(' ', text).split())


def exact_match(
  prediction: str,
  answers: Sequence[str],
  normalize: Normalize = normalize_squad,
) -> float:
  """Returns 1.0 if the prediction equals one of the answers, else 0.0.

  Args:
    prediction: the text of the model.
    answers: all accepted answers of the question.
    normalize: `normalize_squad` or `normalize_trivia_qa`.

  Raises:
    ValueError: `answers` is empty or one single string.
  """
  _check_answers(answers)
  normalized = normalize(prediction)
  return float(any(normalized == normalize(answer) for answer in answers))


def f1(
  prediction: str,
  answers: Sequence[str],
  normalize: Normalize = normalize_squad,
  both_empty: float = 0.0,
) -> float:
  """Returns the F1 of words with the best answer, from 0 to 1.

  Args:
    prediction: the text of the model.
    answers: all accepted answers of the question.
    normalize: `normalize_squad` or `normalize_trivia_qa`.
    both_empty: the value when prediction and answer are both empty after
      normalisation: 0.0 as in T5, 1.0 as in the official SQuAD script.

  Raises:
    ValueError: `answers` is empty or one single string.
  """
  _check_answers(answers)
  words = normalize(prediction).split()
  return max(
    _word_f1(words, normalize(answer).split(), both_empty) for answer in answers
  )


def _word_f1(
  prediction: list[str], answer: list[str], both_empty: float
) -> float:
  if not prediction and not answer:
    return both_empty
  common = collections.Counter(prediction) & collections.Counter(answer)
  num_common = common.total()
  if num_common == 0:
    return 0.0
  precision = num_common / len(prediction)
  recall = num_common / len(answer)
  return 2 * precision * recall / (precision + recall)


def squad(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns {'em', 'f1'} over all questions, 0 to 100, as T5's `squad`.

  Args:
    targets: the accepted answers of each question.
    predictions: one text per question; the empty text for a missing one.

  Raises:
    ValueError: not as many predictions as targets, or no questions at all.
  """
  return _percentages(targets, predictions, normalize_squad)


def trivia_qa(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns {'em', 'f1'}, 0 to 100, as T5's `trivia_qa`; see `squad`."""
  return _percentages(targets, predictions, normalize_trivia_qa)


def squad_script(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns {'em', 'f1'}, 0 to 100, as the official script; see `squad`."""
  return _percentages(targets, predictions, normalize_squad, both_empty=1.0)


def _percentages(
  targets: Sequence[Sequence[str]],
  predictions: Sequence[str],
  normalize: Normalize,
  both_empty: float = 0.0,
) -> dict[str, float]:
  if len(targets) != len(predictions) or not targets:
    raise ValueError(
      'Each question needs one list of answers and one prediction, but there '
      f'are {len(targets)} targets and {len(predictions)} predictions. '
      'Give an empty text for a question without prediction.'
    )
  pairs = list(zip(predictions, targets, strict=True))
  em = sum(exact_match(text, answers, normalize) for text, answers in pairs)
  total_f1 = sum(
    f1(text, answers, normalize, both_empty) for text, answers in pairs
  )
  return {'em': 100 * em / len(pairs), 'f1': 100 * total_f1 / len(pairs)}


def _check_answers(answers: Sequence[str]) -> None:
  if isinstance(answers, str) or not answers:
    raise ValueError(
      'answers must be a non-empty list of texts, but is '
      f'{answers!r}. Put a single answer in a list, and leave out questions '
      'without answers.'
    )


Metric = Callable[[Sequence[Sequence[str]], Sequence[str]], dict[str, float]]

# What a cache of questions may name as its metric.
METRICS: dict[str, Metric] = {'squad': squad, 'trivia_qa': trivia_qa}


def of_name(name: str) -> Metric:
  """The metric of a name.

  Raises:
    ValueError: there is none.
  """
  if name not in METRICS:
    raise ValueError(
      f'The metric of questions must be one of {sorted(METRICS)}, but is '
      f'{name!r}. Name one of these.'
    )
  return METRICS[name]
