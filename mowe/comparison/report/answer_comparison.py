"""Compares models on the same questions: scores, groups, differences.

All numbers of a report that depend on questions are made here, from the answers
of every run. A score is a mean over the seeds of a model, and then over
questions. A number that is not known is None.
"""

import collections
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mowe.comparison.report import statistics


@dataclasses.dataclass(frozen=True)
class Question:
  """A question, and what is known about it.

  Attributes:
    text: text of the question.
    answers: all accepted answers.
    task: name of the set of questions that it belongs to.
    relation: what the question asks for; None if that is not known.
    entity_count: how often the pretraining text names the entity that the
      question is about; None if that is not known.
    is_answer_seen: whether an accepted answer is also an answer in finetuning;
      None if that is not known.
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
    seed: seed of the run.
    predictions: the text that was answered to each question.
    em: <float64>[questions], the exact match of each answer, 0 or 1.
    f1: <float64>[questions], the F1 of each answer, from 0 to 1.
  """

  seed: int
  predictions: tuple[str, ...]
  em: np.ndarray
  f1: np.ndarray


@dataclasses.dataclass(frozen=True)
class Load:
  """How the tokens of some text fall on the experts of a layer.

  Attributes:
    layer: name of the layer, such as 'encoder, block 2'.
    shares: fraction of the routed tokens that each expert has.
    skipped: fraction of the tokens that have no expert by design; None if it is
      not known.
    dropped: fraction of the choices that found no slot in an evaluation; None
      if it is not known.
    dropped_in_training: fraction of the choices that found no slot in all of
      pretraining; None if it is not known.
    dropped_in_generation: fraction of the choices that found no slot while
      questions were answered; None for layers of an encoder.
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
    """Number of experts that no token had."""
    return sum(share == 0 for share in self.shares)


@dataclasses.dataclass(frozen=True)
class Try:
  """Learning rates that a model was trained with, to choose between them.

  Attributes:
    rates: name and value of each learning rate.
    em: exact match on the questions for choosing, 0 to 100.
    f1: F1 on the questions for choosing, 0 to 100.
    is_chosen: whether the model with these rates is reported.
  """

  rates: tuple[tuple[str, float], ...]
  em: float
  f1: float
  is_chosen: bool = False

  @property
  def label(self) -> str:
    """The rates as text, such as 'LEARNING_RATE 0.003'."""
    return ', '.join(f'{name} {value:g}' for name, value in self.rates)


@dataclasses.dataclass(frozen=True)
class Silenced:
  """What is left of a model without what its memories hold.

  Attributes:
    em: exact match on the reported questions, 0 to 100, a mean over seeds.
    text_loss: see ModelResult.
    recall: see ModelResult.
  """

  em: float
  text_loss: float | None
  recall: Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Reads:
  """What the tables of a model are read for, per token of both stacks.

  Attributes:
    rows: rows that a token names.
    bytes: size of these rows.
    moved: size of the distinct rows of a batch, divided by its tokens; None if
      the rows are not known before a step.
  """

  rows: float
  bytes: float
  moved: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class ModelResult:
  """Everything that is reported about one model. None means 'not known'.

  Attributes:
    name: name of the model, unique within a report.
    total_parameters: number of all parameters.
    active_parameters: number of parameters that take part in the computation of
      one token.
    frozen_parameters: number of parameters that finetuning left as they were.
    flops_formula: FLOPs per token of a forward pass, computed from the shapes
      of the kernels.
    flops_compiled: FLOPs per token of a forward pass, as XLA counts them in the
      compiled program.
    answers: the answers of the run with each seed.
    is_flops_least: whether `flops_compiled` is too low, because XLA counts
      products in loops once.
    tokens_per_second: tokens of pretraining per second, a mean over seeds.
    peak_memory: the most memory that pretraining needed, in bytes.
    memory_of: what `peak_memory` is of, 'device' or 'process'.
    held_out_loss: loss before finetuning on text that was not trained on, a
      mean over seeds.
    text_loss: loss before finetuning on text that was trained on, a mean over
      seeds.
    seconds: seconds of training, a mean over seeds.
    curve: steps and losses of pretraining with the first seed.
    held_out_curve: steps and losses on held-out text in pretraining with the
      first seed.
    recall: for each kind of masked spans how many were recalled, and how many
      there were, as sums over seeds.
    loads: the load of each sparse layer, with the first seed.
    note: how the model was sized; '' if it was not.
    tries: the tries of its learning rates; () if none were tried.
    cell: what names the rows of its memory and what they hold; None if it is in
      no grid of memories.
    silenced: what is left without its memories; None if it was not measured.
    reads: what its tables are read for; None if it has none, or if it was not
      measured.

  Raises:
    ValueError: there are no answers.
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
  cell: tuple[str, str] | None = None
  silenced: Silenced | None = None
  reads: Reads | None = None

  def __post_init__(self):
    if not self.answers:
      raise ValueError(
        f'A model in a report must have answered questions, but {self.name!r} '
        'has no answers. Leave out models that were not evaluated.'
      )

  @property
  def seeds(self) -> tuple[int, ...]:
    """The seeds of its runs."""
    return tuple(one.seed for one in self.answers)

  @property
  def em_scores(self) -> np.ndarray:
    """Exact match of each question, a mean over seeds, <float64>[questions]."""
    return np.mean([one.em for one in self.answers], axis=0)

  @property
  def f1_scores(self) -> np.ndarray:
    """F1 of each question, a mean over seeds, <float64>[questions]."""
    return np.mean([one.f1 for one in self.answers], axis=0)

  @property
  def chosen(self) -> Try | None:
    """The try that is reported; None if no rates were tried."""
    return next((one for one in self.tries if one.is_chosen), None)

  def rates_at_edge(self) -> list[str]:
    """Returns the names of chosen rates that are the least or largest tried.

    A better rate may lie beyond them.
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
    """Returns the scores of all questions."""
    return Score.of(self.em_scores, self.f1_scores)

  def em_by_seed(self) -> list[float]:
    """Returns the exact match of each run, 0 to 100."""
    return [100 * float(one.em.mean()) for one in self.answers]


@dataclasses.dataclass(frozen=True)
class Score:
  """The mean scores of some questions.

  Attributes:
    em: exact match, 0 to 100.
    em_interval: ends of the 95 % interval of the exact match.
    f1: F1, 0 to 100.
    f1_interval: ends of the 95 % interval of the F1.
    num_questions: number of questions.
  """

  em: float
  em_interval: tuple[float, float]
  f1: float
  f1_interval: tuple[float, float]
  num_questions: int

  @classmethod
  def of(cls, em: np.ndarray, f1: np.ndarray) -> 'Score':
    """Makes a Score of scores <float64>[questions], from 0 to 1."""
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
    name: name of the kind.
    members: <bool>[questions], whether each question is in the group.
  """

  name: str
  members: np.ndarray

  def score(self, result: ModelResult) -> Score | None:
    """Returns the scores of a model; None if the group has no questions."""
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
    groups: the groups; empty if the property is known of no question.
    num_without: number of questions of which the property is not known, and
      which are therefore in no group.
  """

  title: str
  groups: Sequence[Group]
  num_without: int = 0


def by_relation(questions: Sequence[Question]) -> Breakdown:
  """Groups questions by what they ask for, in the order of names."""
  return _by_name('relation', [question.relation for question in questions])


def by_task(questions: Sequence[Question]) -> Breakdown:
  """Groups questions by the set that they belong to."""
  return _by_name('set of questions', [q.task for q in questions])


def by_frequency(questions: Sequence[Question], num_bins: int = 4) -> Breakdown:
  """Groups questions by how often the pretraining text names their entity.

  Groups are as nearly equal in size as they can be. Entities with the same
  count stay together, so that there may be fewer groups, of different sizes.

  Args:
    questions: all questions.
    num_bins: the most groups to make.
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
    groups,
    len(counts) - len(known),
  )


def _equal_parts(numbers: Sequence[int], most: int) -> list[tuple[int, int]]:
  """Cuts numbers into parts of about equal size; equal numbers stay together.

  No part has less than a quarter of an equal share, because the score of so few
  questions would say nothing.

  Args:
    numbers: the numbers, in any order.
    most: the most parts to make.

  Returns:
    The least and the largest number of each part, in rising order.
  """
  # [distinct numbers]
  distinct, sizes = np.unique(numbers, return_counts=True)
  least = sizes.sum() / most / 4
  parts: list[tuple[int, int]] = []
  start = 0
  while start < len(distinct):
    # How many numbers a part would have that ends at each distinct number.
    reached = np.cumsum(sizes[start:])
    # The part ends where it is nearest to an equal share of what is left.
    distance = np.abs(reached - reached[-1] / (most - len(parts)))
    distance[reached < least] = np.inf
    size = int(np.argmin(distance)) + 1
    # A rest that is too small for a part of its own joins this one.
    if reached[-1] - reached[size - 1] < least:
      size = len(reached)
    parts.append((int(distinct[start]), int(distinct[start + size - 1])))
    start += size
  return parts


def by_seen_answer(questions: Sequence[Question]) -> Breakdown:
  """Groups questions by whether an accepted answer is in finetuning, too."""
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
    groups if known else (),
    len(seen) - known,
  )


def _by_name(title, names) -> Breakdown:
  found = sorted({name for name in names if name is not None})
  array = np.array(names, object)
  return Breakdown(
    title,
    [Group(name, array == name) for name in found],
    sum(name is None for name in names),
  )


@dataclasses.dataclass(frozen=True)
class Grid:
  """The exact match of models by what names their rows and what they hold.

  Attributes:
    addresses: the rows of the grid.
    payloads: the columns of the grid.
    em: exact match, 0 to 100, by address and payload; combinations that no
      model has are left out.
  """

  addresses: tuple[str, ...]
  payloads: tuple[str, ...]
  em: Mapping[tuple[str, str], float]


def grid(results: Sequence[ModelResult]) -> Grid:
  """Returns the grid of the models that have a cell, in their order."""
  em = {result.cell: result.score().em for result in results if result.cell}
  addresses, payloads = (
    tuple(dict.fromkeys(cell[axis] for cell in em)) for axis in (0, 1)
  )
  return Grid(addresses, payloads, em)


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
  results: Sequence[ModelResult],
  questions: Sequence[Question],
  number: int = 8,
) -> list[int]:
  """Chooses questions on which the runs with the first seed differ.

  Each model in turn adds a question that it answers rightly: of a relation that
  has fewest so far, and then one that fewest models answer rightly, which shows
  what one model alone knows. Which one of several follows from its text, so
  that the first of a file are no likelier than others.

  Args:
    results: the results of each model.
    questions: the questions that they answered.
    number: the most questions to choose.

  Returns:
    The indices of the chosen questions, in rising order.
  """
  # [models, questions]
  right = np.array([result.answers[0].em for result in results])
  num_right = right.sum(axis=0)
  differ = np.flatnonzero((num_right > 0) & (num_right < len(results)))
  order = {
    int(q): zlib.crc32(questions[q].text.encode('utf-8', 'replace'))
    for q in differ
  }
  of_relation: collections.Counter[str | None] = collections.Counter()
  chosen: list[int] = []
  left = [{int(q) for q in differ[of_model[differ] == 1]} for of_model in right]
  while len(chosen) < number and any(left):
    for candidates in left:
      candidates.difference_update(chosen)
      if candidates and len(chosen) < number:
        best = min(
          candidates,
          key=lambda q: (
            of_relation[questions[q].relation],
            num_right[q],
            order[q],
          ),
        )
        of_relation[questions[best].relation] += 1
        chosen.append(best)
  return sorted(chosen)


def as_json(
  results: Sequence[ModelResult],
  questions: Sequence[Question],
  num_bins: int = 4,
) -> list[dict[str, Any]]:
  """Returns every number of the report, for other programs.

  Under 'paired' are the differences of each model to those before it, from -1
  to 1.
  """
  records = []
  for number, result in enumerate(results):
    record = {
      name: value
      for name, value in vars(result).items()
      if name not in ('answers', 'loads', 'tries', 'silenced', 'reads')
    }
    record |= {
      'seeds': result.seeds,
      'em_by_seed': result.em_by_seed(),
      'score': dataclasses.asdict(result.score()),
      'loads': [dataclasses.asdict(load) for load in result.loads],
      'tries': [dataclasses.asdict(one) for one in result.tries],
      'silenced': result.silenced and dataclasses.asdict(result.silenced),
      'reads': result.reads and dataclasses.asdict(result.reads),
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
  """Returns all breakdowns; that by task only if there are several tasks."""
  found = [
    by_relation(questions),
    by_frequency(questions, num_bins),
    by_seen_answer(questions),
  ]
  tasks = by_task(questions)
  return [tasks, *found] if len(tasks.groups) > 1 else found
