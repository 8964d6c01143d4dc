"""A comparison of models as files: numbers, tables, figures and one page.

`write_report` writes `results.json`, `report.md` with `comparison.png`, and
`index.html`. The page is one file that can be sent by mail: the figures are
inside it, and all text is escaped.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mowe.comparison.report import (
  answer_comparison,
  report_figure,
  report_page,
  report_tables,
)

# The words of a question, each with its expert, or None.
WordExperts = Sequence[tuple[str, int | None]]


@dataclasses.dataclass(frozen=True)
class Report:
  """What a report is made of.

  Attributes:
    title: heading of the page.
    results: of each model, in the order in which they are shown; the first one
      is the baseline of the paired tests.
    questions: that all of them answered.
    notes: sentences about data and seeds, shown below the title.
    word_experts: question -> model with word experts -> its words.
    num_bins: quantiles of the entities' frequency.

  Raises:
    ValueError: no models, equal names, or answers to other questions.
  """

  title: str
  results: Sequence[answer_comparison.ModelResult]
  questions: Sequence[answer_comparison.Question]
  notes: Sequence[str] = ()
  word_experts: Mapping[int, Mapping[str, WordExperts]] = dataclasses.field(
    default_factory=dict
  )
  num_bins: int = 4

  def __post_init__(self):
    answer_comparison.check_same_questions(self.results, self.questions)


def write_report(
  report: Report, folder: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes the four files and returns the path of `index.html`.

  Args:
    report: what is written.
    folder: made if it is not there; files of an older report are replaced.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tables = report_tables.tables(report)
  examples = report_tables.examples(report)
  numbers = answer_comparison.as_json(
    report.results, report.questions, report.num_bins
  )
  text = json.dumps(_finite(numbers), indent=2, ensure_ascii=False)
  _write(folder / 'results.json', text + '\n')
  report_figure.write_png(report, folder / 'comparison.png')
  _write(
    folder / 'report.md',
    report_tables.markdown(report, tables, examples, 'comparison.png'),
  )
  page = report_page.render(
    report.title,
    report.notes,
    tables,
    examples,
    report_figure.page_figures(report),
  )
  path = folder / 'index.html'
  _write(path, page)
  return path


def _write(path: pathlib.Path, text: str) -> None:
  # A prediction may hold a lone surrogate, which is no UTF-8.
  path.write_bytes(text.encode('utf-8', 'replace'))


def _finite(tree: Any) -> Any:
  """JSON has no NaN; a diverged run still gets its report."""
  if isinstance(tree, dict):
    return {key: _finite(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_finite(value) for value in tree]
  if isinstance(tree, float) and not math.isfinite(tree):
    return None
  return tree
