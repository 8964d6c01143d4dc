"""Says the result of a comparison, and how certain it is, in a few sentences."""

from collections.abc import Sequence

from mowe.comparison.report import answer_comparison, statistics


def headline(results: Sequence[answer_comparison.ModelResult]) -> str:
  """Returns which model answers most, by how much, and how certain that is.

  Args:
    results: the results of each model, the baseline first.
  """
  best = max(results, key=lambda result: result.score().em)
  score = best.score()
  low, high = score.em_interval
  answers = (
    f'{best.name} answers {score.em:.1f} % of {score.num_questions:,} questions '
    f'(95 % interval {low:.1f} to {high:.1f})'
  )
  if len(results) == 1:
    return f'{answers}.'
  others = [result for result in results if result is not best]
  # The baseline is what a better model is compared with.
  other = max(others, key=lambda result: result.score().em)
  other = results[0] if best is not results[0] else other
  test = statistics.paired_test(other.em_scores, best.em_scores)
  difference = (
    f'{100 * test.difference:.1f} points more than {other.name} '
    f'({100 * test.low:.1f} to {100 * test.high:.1f}, p {_equals(test)})'
  )
  if test.p_value >= 0.05:
    difference += ', which may be chance'
  return f'{answers}, {difference}. {_seeds(best, other)}'


def _equals(test: statistics.PairedTest) -> str:
  words = test.p_in_words()
  return words if words.startswith('<') else f'= {words}'


def _seeds(*results: answer_comparison.ModelResult) -> str:
  least = min(len(result.seeds) for result in results)
  if least == 1:
    return (
      'Other seeds may differ by more: there is one of each.'
      if all(len(result.seeds) == 1 for result in results)
      else 'One of the two has one seed alone, and other seeds may differ.'
    )
  return f'These are means over {least} seeds.'
