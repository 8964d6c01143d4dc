"""Models on the same questions: scores, groups of questions, differences.

All numbers of a report that depend on questions are made here, from the
answers of every run. A score is a mean over the seeds of a model, then over
questions. What there is no number for is None.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mowe.comparison.report import statistics


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked, and what is known of it.

  Attributes:
    text: the question.
    answers: all accepted answers.
    task: the set of questions that it is of.
    relation: what is asked for, or None.
    entity_count: how often the pretraining text names what is asked about, or
      None if that is not known.
    is_answer_seen: whether an answer of finetuning is accepted here, too, or
      None.
  """

  text: str
  answers: tuple[str, ...]
  task: str
  relation: str | None = None
  entity_count: int | None = None
  is_answer_seen: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
  """What one run answered, in the order of the questions.

  Attributes:
    seed: of the run.
    predictions: one text for each question.
    em: <float64>[questions], exact match, 0 or 1.
    f1: <float64>[questions], from 0 to 1.
  """

  seed: int
  predictions: tuple[str, ...]
  em: np.ndarray
  f1: np.ndarray


@dataclasses.dataclass(frozen=True)
class Load:
  """How the tokens of some text fall on the experts of a layer.

  Attributes:
    layer: its name, such as 'encoder, block 2'.
    shares: of the routed tokens, of each expert.
    skipped: share of the tokens without an expert by design, or None.
    dropped: share of the choices that found no room in an evaluation, or None.
    dropped_in_training: the same in all of pretraining.
    dropped_in_generation: the same while questions are answered; None for
      layers of an encoder.
  """

  layer: str
  shares: tuple[float, ...]
  skipped: float | None = None
  dropped: float | None = None
  dropped_in_training: float | None = None
  dropped_in_generation: float | None = None

  @property
  def max_over_mean(self) -> float:
    """Load of the busiest expert in units of the mean."""
    return max(self.shares) * len(self.shares) / (sum(self.shares) or 1.0)

  @property
  def num_unused(self) -> int:
    """Experts that no token had."""
    return sum(share == 0 for share in self.shares)


@dataclasses.dataclass(frozen=True)
class Try:
  """Learning rates that a model was trained with, to choose between them.

  Attributes:
    rates: name and value of each.
    em: exact match on questions that are not reported, 0 to 100.
    f1: likewise.
    is_chosen: its model is the one that is reported.
  """

  rates: tuple[tuple[str, float], ...]
  em: float
  f1: float
  is_chosen: bool = False

  @property
  def label(self) -> str:
    """Such as 'LEARNING_RATE 0.003'."""
    return ', '.join(f'{name} {value:g}' for name, value in self.rates)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelResult:
  """All that is reported of one model.

  Attributes:
    name: unique within a report.
    total_parameters: all parameters.
    active_parameters: those that take part in the computation of one token.
    frozen_parameters: those that finetuning left as they were.
    flops_formula: FLOPs per token of a forward pass, from the shapes of the
      kernels.
    flops_compiled: the same as XLA counts in the compiled program.
    is_flops_least: the program has products in loops, which XLA counts once.
    answers: of each seed.
    tokens_per_second: in pretraining, a mean over seeds.
    peak_memory: in bytes, of training.
    memory_of: 'device' or 'process'.
    held_out_loss: on text that was not trained on, before finetuning, a mean
      over seeds.
    text_loss: the same on text that was.
    seconds: of training, a mean over seeds.
    curve: (step, loss) of pretraining, of the first seed.
    held_out_curve: (step, loss on held-out text), of the first seed.
    recall: kind of masked spans -> (right, spans), sums over seeds.
    loads: of each sparse layer, of the first seed.
    note: how the model was sized.
    tries: of its learning rates; () if none were tried.

  Raises:
    ValueError: no answers.
  """

  name: str
  total_parameters: int
  active_parameters: int
  frozen_parameters: int | None
  flops_formula: float
  flops_compiled: float | None
  answers: Sequence[Answers]
  is_flops_least: bool = False
  tokens_per_second: float | None = None
  peak_memory: int | None = None
  memory_of: str | None = None
  held_out_loss: float | None = None
  text_loss: float | None = None
  seconds: float | None = None
  curve: Sequence[tuple[int, float | None]] = ()
  held_out_curve: Sequence[tuple[int, float | None]] = ()
  recall: Mapping[str, tuple[int, int]] = dataclasses.field(
    default_factory=dict
  )
  loads: Sequence[Load] = ()
  note: str = ''
  tries: Sequence[Try] = ()

  def __post_init__(self):
    if not self.answers:
      raise ValueError(
        f'A model in a report must have answered questions, but {self.name!r} '
        'has no answers. Leave out models that were not evaluated.'
      )

  @property
  def seeds(self) -> tuple[int, ...]:
    """Of its runs."""
    return tuple(one.seed for one in self.answers)

  @property
  def em_scores(self) -> np.ndarray:
    """Exact match of each question, <float64>[questions]: means over seeds."""
    return np.mean([one.em for one in self.answers], axis=0)

  @property
  def f1_scores(self) -> np.ndarray:
    """F1 of each question, <float64>[questions]: means over seeds."""
    return np.mean([one.f1 for one in self.answers], axis=0)

  @property
  def chosen(self) -> Try | None:
    """The try that is reported; None if there were none."""
    return next((one for one in self.tries if one.is_chosen), None)

  def rates_at_edge(self) -> list[str]:
    """Names of chosen rates that are the least or largest of those tried.

    A better one may lie beyond.
    """
    if self.chosen is None:
      return []
    found = []
    for name, value in self.chosen.rates:
      tried = [dict(one.rates)[name] for one in self.tries]
      if value in (min(tried), max(tried)):
        found.append(name)
    return found

  def score(self) -> 'Score':
    """Of all questions."""
    return Score.of(self.em_scores, self.f1_scores)

  def em_by_seed(self) -> list[float]:
    """Exact match of each run, 0 to 100."""
    return [100 * float(one.em.mean()) for one in self.answers]


@dataclasses.dataclass(frozen=True)
class Score:
  """Scores of some questions, 0 to 100, with their 95 % intervals."""

  em: float
  em_interval: tuple[float, float]
  f1: float
  f1_interval: tuple[float, float]
  num_questions: int

  @classmethod
  def of(cls, em: np.ndarray, f1: np.ndarray) -> 'Score':
    """Of scores from 0 to 1, <float64>[questions]."""
    interval = lambda scores: tuple(
      100 * end for end in statistics.bootstrap_interval(scores)
    )
    return cls(
      em=100 * float(em.mean()),
      em_interval=interval(em),
      f1=100 * float(f1.mean()),
      f1_interval=interval(f1),
      num_questions=len(em),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Questions of one kind.

  Attributes:
    name: of the kind.
    members: <bool>[questions].
  """

  name: str
  members: np.ndarray

  def score(self, result: ModelResult) -> Score | None:
    """Scores of a model; None without questions."""
    if not self.members.any():
      return None
    return Score.of(
      result.em_scores[self.members], result.f1_scores[self.members]
    )


@dataclasses.dataclass(frozen=True)
class Breakdown:
  """Questions in groups by one of their properties.

  Attributes:
    title: the property, as in "EM by ...".
    heading: of the groups' names.
    groups: those that there are; empty if it is not known of any question.
    why_empty: what is missing then.
    num_without: questions in no group, as the property is not known of them.
  """

  title: str
  heading: str
  groups: Sequence[Group]
  why_empty: str
  num_without: int = 0


def by_relation(questions: Sequence[Question]) -> Breakdown:
  """Groups by what is asked for, in the order of names."""
  return _by_name(
    'relation',
    'Relation',
    [question.relation for question in questions],
    "questions have no field 'relation'",
  )


def by_task(questions: Sequence[Question]) -> Breakdown:
  """Groups by the set of questions."""
  return _by_name('set of questions', 'Set', [q.task for q in questions], '')


def by_frequency(questions: Sequence[Question], num_bins: int = 4) -> Breakdown:
  """Groups as near to equal size as can be, by how often the text names them.

  Entities of one count stay together, so that there may be fewer groups, and
  larger and smaller ones.
  """
  counts = [question.entity_count for question in questions]
  known = [count for count in counts if count is not None]
  values = np.array([np.nan if c is None else c for c in counts], float)
  groups = [
    Group(
      f'{low:,}' if low == high else f'{low:,} to {high:,}',
      (values >= low) & (values <= high),
    )
    for low, high in _equal_parts(known, num_bins)
  ]
  return Breakdown(
    'frequency of the entity in the pretraining text',
    'Times named',
    groups,
    "questions have no field 'entity', or the text is not at hand",
    len(counts) - len(known),
  )


def _equal_parts(numbers: Sequence[int], most: int) -> list[tuple[int, int]]:
  """Least and largest number of each part; equal numbers are in one part.

  No part has less than a quarter of an equal share: it would say nothing.
  """
  distinct, sizes = np.unique(numbers, return_counts=True)
  least = sizes.sum() / most / 4
  parts: list[tuple[int, int]] = []
  start = 0
  while start < len(distinct):
    reached = np.cumsum(sizes[start:])
    # As many as come nearest to the share of each part that is left.
    distance = np.abs(reached - reached[-1] / (most - len(parts)))
    distance[reached < least] = np.inf
    size = int(np.argmin(distance)) + 1
    if reached[-1] - reached[size - 1] < least:
      size = len(reached)
    parts.append((int(distinct[start]), int(distinct[start + size - 1])))
    start += size
  return parts


def by_seen_answer(questions: Sequence[Question]) -> Breakdown:
  """Two groups: an answer was one in finetuning, too, or none was."""
  seen = [question.is_answer_seen for question in questions]
  groups = [
    Group(name, np.array([one is value for one in seen]))
    for name, value in (
      ('also an answer in finetuning', True),
      ('no answer in finetuning', False),
    )
  ]
  known = sum(one is not None for one in seen)
  return Breakdown(
    'whether finetuning has the answer, too',
    'Right answer',
    groups if known else (),
    'the answers of finetuning are not known',
    len(seen) - known,
  )


def _by_name(title, heading, names, why_empty) -> Breakdown:
  found = sorted({name for name in names if name is not None})
  array = np.array(names, object)
  return Breakdown(
    title,
    heading,
    [Group(name, array == name) for name in found],
    why_empty,
    sum(name is None for name in names),
  )


def check_same_questions(
  results: Sequence[ModelResult], questions: Sequence[Question]
) -> None:
  """Raises ValueError unless each model has an answer to each question."""
  names = [result.name for result in results]
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f'A report must have results with names that differ, but has {names}. '
      'Evaluate at least one model, and name each once.'
    )
  for result in results:
    found = {len(one.em) for one in result.answers}
    found |= {len(one.predictions) for one in result.answers}
    if found != {len(questions)}:
      raise ValueError(
        f'Every model must have answered all {len(questions)} questions, but '
        f'{result.name!r} has {sorted(found)} answers. Evaluate it on the '
        'same questions.'
      )


def differing_questions(
  results: Sequence[ModelResult], number: int = 8
) -> list[int]:
  """Questions on which the runs of the first seed differ, spread over all.

  Those come first on which fewest models are right: what one alone knows.
  """
  right = np.array([result.answers[0].em for result in results])
  num_right = right.sum(axis=0)
  differ = np.flatnonzero((num_right > 0) & (num_right < len(results)))
  chosen: list[int] = []
  # Every model has its turn to be the one that is right.
  of_model = [
    sorted(differ[right[i, differ] == 1], key=lambda q: (num_right[q], q))
    for i in range(len(results))
  ]
  while len(chosen) < number and any(of_model):
    for rest in of_model:
      while rest and rest[0] in chosen:
        rest.pop(0)
      if rest and len(chosen) < number:
        chosen.append(int(rest.pop(0)))
  return sorted(chosen)


def as_json(
  results: Sequence[ModelResult],
  questions: Sequence[Question],
  num_bins: int = 4,
) -> list[dict[str, Any]]:
  """Every number of the report, for other programs.

  Under 'paired' is each model less those before it, from -1 to 1.
  """
  records = []
  for number, result in enumerate(results):
    record = {
      field.name: getattr(result, field.name)
      for field in dataclasses.fields(result)
      if field.name not in ('answers', 'loads', 'tries')
    }
    record |= {
      'seeds': result.seeds,
      'em_by_seed': result.em_by_seed(),
      'score': dataclasses.asdict(result.score()),
      'loads': [dataclasses.asdict(load) for load in result.loads],
      'tries': [dataclasses.asdict(one) for one in result.tries],
      'breakdowns': {
        breakdown.title: {
          group.name: score and dataclasses.asdict(score)
          for group in breakdown.groups
          for score in [group.score(result)]
        }
        for breakdown in breakdowns(questions, num_bins)
      },
    }
    record['paired'] = {
      other.name: dataclasses.asdict(
        statistics.paired_test(other.em_scores, result.em_scores)
      )
      for other in results[:number]
    }
    record['recall'] = {k: list(v) for k, v in result.recall.items()}
    records.append(record)
  return records


def breakdowns(
  questions: Sequence[Question], num_bins: int = 4
) -> list[Breakdown]:
  """All of them; that by task only where there are several."""
  found = [
    by_relation(questions),
    by_frequency(questions, num_bins),
    by_seen_answer(questions),
  ]
  tasks = by_task(questions)
  return [tasks, *found] if len(tasks.groups) > 1 else found
