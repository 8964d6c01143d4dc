"""A comparison of models as files: numbers, tables, figures and one page.

`write_report` writes `results.json`, `report.md` with `comparison.png`, and
`index.html`. The page is one file that can be sent by mail: the figures are
inside it, and all text is escaped.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from mowe.comparison.report import answer_comparison

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
