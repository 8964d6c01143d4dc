"""What a report on a comparison of models is made of.

`report_files.write_report` writes a report as `results.json`, `report.md` with
`comparison.png`, and `index.html`. The page is one file that can be sent by
mail: it contains the figures, and all text in it is escaped.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from mowe.comparison.report import answer_comparison

# The words of a question, each with its expert; None for a word without one.
WordExperts = Sequence[tuple[str, int | None]]


@dataclasses.dataclass(frozen=True)
class Report:
  """What a report is made of.

  Attributes:
    title: heading of the page.
    results: the results of each model, in the order in which they are shown.
      The first model is the baseline of the paired tests.
    questions: the questions that all models answered.
    notes: sentences about data and seeds, shown below the title.
    word_experts: the words of a question with their experts, by the index of
      the question and the name of a model with word experts.
    num_bins: number of groups of questions by the frequency of their entities.
    provenance: what made the results, as names and values, such as a version.

  Raises:
    ValueError: there are no models, two have the same name, or one answered
      other questions.
  """

  title: str
  results: Sequence[answer_comparison.ModelResult]
  questions: Sequence[answer_comparison.Question]
  notes: Sequence[str] = ()
  word_experts: Mapping[int, Mapping[str, WordExperts]] = dataclasses.field(
    default_factory=dict
  )
  num_bins: int = 4
  provenance: Sequence[tuple[str, str]] = ()

  def __post_init__(self):
    answer_comparison.check_same_questions(self.results, self.questions)
