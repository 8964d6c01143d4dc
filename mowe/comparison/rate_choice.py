"""Chooses the try of a model that is reported, by questions for choosing."""

import dataclasses
import pathlib
from collections.abc import Sequence

from mowe.comparison import measurements, planned_runs
from mowe.comparison.report import answer_comparison


@dataclasses.dataclass(frozen=True)
class Choice:
  """What was chosen for one model.

  Attributes:
    number: number of the chosen try.
    tries: all tries for the report, in their order; () if nothing was tried.
  """

  number: int
  tries: tuple[answer_comparison.Try, ...] = ()


def choose(
  runs: Sequence[planned_runs.Run], questions: Sequence[str]
) -> Choice:
  """Chooses the try with the best exact match; of equal ones, the best F1.

  Args:
    runs: finished runs, one for each try.
    questions: names of the token caches of the questions for choosing.
  """
  if not runs[0].rates:
    return Choice(0)
  scores = [_scores(run, questions) for run in runs]
  # Of tries with equal scores, the first one is chosen.
  best = max(range(len(runs)), key=lambda i: (scores[i], -i))
  return Choice(
    best,
    tuple(
      answer_comparison.Try(run.rates, em, f1, is_chosen=number == best)
      for number, (run, (em, f1)) in enumerate(zip(runs, scores, strict=True))
    ),
  )


def _scores(run, questions) -> tuple[float, float]:
  """Returns the mean EM and F1 of the answers to some questions, 0 to 100."""
  lines = [
    line
    for line in measurements.read_answers(pathlib.Path(run.folder))
    if line['task'] in questions
  ]
  mean = lambda name: sum(line[name] for line in lines) / len(lines)
  return mean('em'), mean('f1')
