"""A comparison of models as files: numbers, table, figure and one page.

`write_report(results, folder)` writes `results.json`, `table.md`,
`comparison.png` and `index.html`. The page is one file that can be sent by
mail: the figure is inside it, and all text is escaped.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mowe.evaluation import report_figure, report_page


@dataclasses.dataclass(frozen=True)
class SampleQuestion:
  """A question with what one model answered.

  Attributes:
    question: the text of the question.
    answers: all accepted answers.
    prediction: the answer of the model.
  """

  question: str
  answers: tuple[str, ...]
  prediction: str


@dataclasses.dataclass(frozen=True)
class ModelResult:
  """All that is reported of one model.

  Attributes:
    name: unique within a report.
    total_parameters: all parameters.
    active_parameters: those that take part in the computation of one token.
    frozen_parameters: those that were not trained.
    flops_per_token: of one forward pass.
    em: exact match, 0 to 100.
    f1: 0 to 100.
    num_questions: how many questions `em` and `f1` are means of.
    seconds: time of training.
    learning_curve: (step, loss) points in order.
    em_by_relation: exact match 0 to 100 of each relation; may be empty.
    seeds: seeds of the runs behind the numbers.
    samples: the same questions for every model; may be empty.

  Raises:
    ValueError: a score is not between 0 and 100, or there are no questions.
  """

  name: str
  total_parameters: int
  active_parameters: int
  frozen_parameters: int
  flops_per_token: float
  em: float
  f1: float
  num_questions: int
  seconds: float
  learning_curve: Sequence[tuple[int, float]] = ()
  em_by_relation: Mapping[str, float] = dataclasses.field(default_factory=dict)
  seeds: Sequence[int] = ()
  samples: Sequence[SampleQuestion] = ()

  def __post_init__(self):
    scores = {'em': self.em, 'f1': self.f1, **self.em_by_relation}
    for name, score in scores.items():
      if not 0 <= score <= 100:
        raise ValueError(
          f'Scores must lie between 0 and 100, but {name} of {self.name!r} is '
          f'{score}. Give percentages, as text_metrics.squad does.'
        )
    if self.num_questions < 1:
      raise ValueError(
        f'num_questions must be at least 1, but {self.name!r} has '
        f'{self.num_questions}. Leave out models that were not evaluated.'
      )

  @property
  def em_interval(self) -> tuple[float, float]:
    """The 95 % interval of `em` over the draw of the questions (Wilson)."""
    return wilson_interval(self.em, self.num_questions)


# Heading and cell of each column of the table, in order.
COLUMNS: tuple[tuple[str, Callable[[ModelResult], str]], ...] = (
  ('Model', lambda r: r.name),
  ('Parameters', lambda r: _count(r.total_parameters)),
  ('Active', lambda r: _count(r.active_parameters)),
  ('Frozen', lambda r: _count(r.frozen_parameters)),
  ('FLOPs / token', lambda r: _count(r.flops_per_token)),
  ('EM', lambda r: f'{r.em:.2f}'),
  ('EM 95 %', lambda r: '{:.1f} – {:.1f}'.format(*r.em_interval)),
  ('F1', lambda r: f'{r.f1:.2f}'),
  ('Questions', lambda r: f'{r.num_questions:,}'),
  ('Final loss', lambda r: _final_loss(r)),
  ('Seconds', lambda r: f'{r.seconds:,.0f}'),
  ('Seeds', lambda r: ', '.join(map(str, r.seeds))),
)


def write_report(
  results: Sequence[ModelResult],
  folder: str | os.PathLike[str],
  title: str = 'Comparison of models',
) -> pathlib.Path:
  """Writes the four files and returns the path of `index.html`.

  Args:
    results: one per model, in the order in which they are shown.
    folder: made if it is not there; files of an older report are replaced.
    title: heading of the page.

  Raises:
    ValueError: there are no results, or two of them have the same name.
  """
  names = [result.name for result in results]
  if not names or len(set(names)) < len(names):
    raise ValueError(
      f'A report must have results with names that differ, but has {names}. '
      'Evaluate at least one model, and name each once.'
    )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'results.json').write_text(_to_json(results), encoding='utf-8')
  (folder / 'table.md').write_text(table_markdown(results), encoding='utf-8')
  figure = folder / 'comparison.png'
  report_figure.draw(results, figure)
  page = report_page.render(
    title,
    rows=table_rows(results),
    relations=relation_rows(results),
    samples=sample_rows(results),
    figure_png=figure.read_bytes(),
  )
  path = folder / 'index.html'
  path.write_text(page, encoding='utf-8')
  return path


def table_rows(results: Sequence[ModelResult]) -> list[list[str]]:
  """Returns the table as text, headings first."""
  rows = [[heading for heading, _ in COLUMNS]]
  rows += [[cell(result) for _, cell in COLUMNS] for result in results]
  return rows


def relation_rows(results: Sequence[ModelResult]) -> list[list[str]]:
  """Returns exact match by relation and model, headings first, or nothing."""
  relations = dict.fromkeys(
    relation for result in results for relation in result.em_by_relation
  )
  if not relations:
    return []
  rows = [['Relation', *(result.name for result in results)]]
  for relation in relations:
    scores = [result.em_by_relation.get(relation) for result in results]
    cells = ['' if score is None else f'{score:.2f}' for score in scores]
    rows.append([relation, *cells])
  return rows


def sample_rows(results: Sequence[ModelResult]) -> list[list[str]]:
  """Returns questions with the answer of each model, headings first."""
  questions: dict[str, Sequence[str]] = {}
  predictions: dict[tuple[str, str], str] = {}
  for result in results:
    for sample in result.samples:
      questions.setdefault(sample.question, sample.answers)
      predictions[sample.question, result.name] = sample.prediction
  if not questions:
    return []
  names = [result.name for result in results]
  rows = [['Question', 'Answers', *names]]
  for question, answers in questions.items():
    cells = [predictions.get((question, name), '') for name in names]
    rows.append([question, ' / '.join(answers), *cells])
  return rows


def table_markdown(results: Sequence[ModelResult]) -> str:
  """Returns the table, and that of the relations, in Markdown."""
  tables = [table_rows(results), relation_rows(results)]
  return '\n'.join(_markdown(rows) for rows in tables if rows)


def wilson_interval(percentage: float, count: int) -> tuple[float, float]:
  """Returns the 95 % interval of a percentage of `count` yes-or-no answers.

  Wilson's, as the textbook one has zero width at 0 and at 100.
  """
  z = 1.959964
  share = percentage / 100
  middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
  spread = share * (1 - share) / count + z**2 / (4 * count**2)
  half = z * math.sqrt(spread) / (1 + z**2 / count)
  return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
  heading, *body = (
    '| ' + ' | '.join(_markdown_cell(cell) for cell in row) + ' |'
    for row in rows
  )
  # Numbers to the right, the first column to the left.
  rule = '|---|' + '---:|' * (len(rows[0]) - 1)
  return '\n'.join((heading, rule, *body)) + '\n'


def _markdown_cell(text: str) -> str:
  """Keeps a text within its cell, and HTML out of the page it becomes."""
  text = ' '.join(text.split()).replace('\\', '\\\\').replace('|', '\\|')
  return text.replace('&', '&amp;').replace('<', '&lt;')


def _to_json(results: Sequence[ModelResult]) -> str:
  records: list[dict[str, Any]] = []
  for result in results:
    record = dataclasses.asdict(result)
    record['em_interval'] = result.em_interval
    # JSON has no NaN; a diverged run still gets its report.
    record['learning_curve'] = [
      (step, loss if math.isfinite(loss) else None)
      for step, loss in result.learning_curve
    ]
    records.append(record)
  return json.dumps(records, indent=2, ensure_ascii=False) + '\n'


def _final_loss(result: ModelResult) -> str:
  return f'{result.learning_curve[-1][1]:.4f}' if result.learning_curve else ''


def _count(number: float) -> str:
  """Returns a number with three digits and a unit: 77000000 is 77M."""
  for unit in ('', 'K', 'M', 'G'):
    if number < 999.5:
      return f'{number:.3g}{unit}'
    number /= 1000
  return f'{number:.3g}T'
