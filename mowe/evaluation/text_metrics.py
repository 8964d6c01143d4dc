"""Exact match and F1 of short text answers, as for SQuAD and TriviaQA.

Three references are reproduced: the official SQuAD script and T5's `squad` and
`trivia_qa` metrics. They differ in the normalization (`normalize_squad`,
`normalize_trivia_qa`) and in one corner case of F1: if normalization leaves
both the prediction and the answer empty, the SQuAD script gives 1 and T5 gives
0.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

Normalize = Callable[[str], str]

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_SQUAD_PUNCTUATION = str.maketrans('', '', string.punctuation)
# TriviaQA replaces punctuation by blanks, so "New-York" equals "New York".
# SQuAD deletes it, so "1,000" equals "1000". Neither list has the typographic
# double quotes.
_TRIVIA_QA_PUNCTUATION = str.maketrans(
  dict.fromkeys(string.punctuation + '‘’´`_', ' ')
)


def normalize_squad(text: str) -> str:
  """Lowercases a text; deletes punctuation, articles and extra blanks."""
  return _without_articles(text.lower().translate(_SQUAD_PUNCTUATION))


def normalize_trivia_qa(text: str) -> str:
  """Does the same as `normalize_squad`, but turns punctuation into blanks."""
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
  """Returns the F1 of the prediction's words with the best answer, 0 to 1.

  Args:
    prediction: the text of the model.
    answers: all accepted answers of the question.
    normalize: `normalize_squad` or `normalize_trivia_qa`.
    both_empty: the value when prediction and answer are both empty after
      normalization: 0.0 as in T5, 1.0 as in the official SQuAD script.

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
  """Returns 'em' and 'f1' over all questions, 0 to 100, like T5's `squad`.

  Args:
    targets: the accepted answers of each question.
    predictions: one text for each question; an empty text for a missing one.

  Raises:
    ValueError: there are no questions, or not as many predictions as questions.
  """
  return _percentages(targets, predictions, normalize_squad)


def trivia_qa(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns 'em' and 'f1' like `squad`, but with T5's `trivia_qa` metric."""
  return _percentages(targets, predictions, normalize_trivia_qa)


def squad_script(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns 'em' and 'f1' like `squad`, but as the official SQuAD script."""
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

# A token cache of questions names its metric by one of these keys.
METRICS: dict[str, Metric] = {'squad': squad, 'trivia_qa': trivia_qa}


def of_name(name: str) -> Metric:
  """Returns the metric of a name in `METRICS`.

  Raises:
    ValueError: `METRICS` has no such name.
  """
  if name not in METRICS:
    raise ValueError(
      f'The metric of questions must be one of {sorted(METRICS)}, but is '
      f'{name!r}. Name one of these.'
    )
  return METRICS[name]
