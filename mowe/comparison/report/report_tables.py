"""Makes the tables and the examples of a report.

The page, the Markdown file and the terminal show the same tables.
"""

import dataclasses
from collections.abc import Sequence

from mowe.comparison.report import (
  answer_comparison,
  report_contents,
  statistics,
  table_cells,
)

# With more models, a table of all pairs would be too large to read. Its numbers
# are in results.json.
_MOST_IN_PAIRS = 10


@dataclasses.dataclass(frozen=True)
class Example:
  """A question that models answered differently.

  Attributes:
    question: text of the question.
    answers: all accepted answers.
    relation: what the question asks for; None if that is not known.
    predictions: for each model its name, its answer, and whether it is right.
    words: for each model with word experts its name, and the words of the
      question with their experts.
  """

  question: str
  answers: Sequence[str]
  relation: str | None
  predictions: Sequence[tuple[str, str, bool]]
  words: Sequence[tuple[str, Sequence[tuple[str, int | None]]]]


def tables(report: report_contents.Report) -> list[table_cells.Table]:
  """Returns all tables of a report, in their order."""
  results = report.results
  found = [_answers(report), _costs(results)]
  if any(result.tries for result in results):
    found.append(_tries(results))
  if len(results) > 1:
    found.append(_paired(results))
  if 2 < len(results) <= _MOST_IN_PAIRS:
    found += _pairs(results)
  if len(answer_comparison.grid(results).em) > 1:
    found.append(_grid(results))
  if any(result.silenced or result.reads for result in results):
    found.append(_memories(results))
  found += [
    _breakdown(results, breakdown)
    for breakdown in answer_comparison.breakdowns(
      report.questions, report.num_bins
    )
    if breakdown.groups
  ]
  if any(result.loads for result in results):
    found.append(_loads(results))
  if any(result.note for result in results):
    found.append(_sizes(results))
  return found


def examples(report: report_contents.Report) -> list[Example]:
  """Returns questions that the models answered differently."""
  return [
    Example(
      question=report.questions[index].text,
      answers=report.questions[index].answers,
      relation=report.questions[index].relation,
      predictions=[
        (
          result.name,
          result.answers[0].predictions[index],
          bool(result.answers[0].em[index]),
        )
        for result in report.results
      ],
      words=list(report.word_experts.get(index, {}).items()),
    )
    for index in answer_comparison.differing_questions(
      report.results, report.questions
    )
  ]


def _answers(report) -> table_cells.Table:
  results = report.results
  scores = [result.score() for result in results]
  kinds = list(
    dict.fromkeys(kind for result in results for kind in result.recall)
  )
  one, three = table_cells.decimals(1), table_cells.decimals(3)
  columns = [
    _names(results),
    table_cells.values('EM', [score.em for score in scores], one, max),
    (
      'EM, 95 %',
      [table_cells.interval(score.em_interval) for score in scores],
    ),
    table_cells.values('F1', [score.f1 for score in scores], one, max),
    (
      'F1, 95 %',
      [table_cells.interval(score.f1_interval) for score in scores],
    ),
    *_by_seed(results),
  ]
  for kind in kinds:
    columns += _recall([result.recall.get(kind) for result in results], kind)
  columns += [
    table_cells.values(
      'Held-out loss', [one.held_out_loss for one in results], three, min
    ),
    table_cells.values(
      'Text loss', [one.text_loss for one in results], three, min
    ),
  ]
  notes = [
    f'EM and F1 in % of {len(report.questions):,} questions, means over seeds; '
    '95 % intervals by bootstrap over questions.'
  ]
  if kinds:
    notes.append(
      'Recall: masked spans of the pretraining text that are filled in token '
      'for token, in % (of so many, all seeds together).'
    )
  notes.append(
    'Losses, on held-out text and on text that was trained on, are means over '
    'seeds, before finetuning.'
  )
  return table_cells.Table.of_columns('Answers', columns, notes, is_main=True)


def _names(results) -> table_cells.Column:
  return 'Model', [result.name for result in results]


def _by_seed(results) -> list[table_cells.Column]:
  """The exact match with each seed, if a model has several."""
  if all(len(result.seeds) == 1 for result in results):
    return []
  found = [
    dict(zip(result.seeds, result.em_by_seed(), strict=True))
    for result in results
  ]
  seeds = dict.fromkeys(seed for result in results for seed in result.seeds)
  return [
    table_cells.values(
      f'EM, seed {seed}',
      [one.get(seed) for one in found],
      table_cells.decimals(1),
    )
    for seed in seeds
  ]


def _recall(counts, kind: str) -> list[table_cells.Column]:
  """The share of recalled spans, and of how many if models differ in it."""
  spans = [one[1] if one else None for one in counts]
  heading, columns = f'Recall, {kind}', []
  if len(set(spans) - {None}) == 1:
    heading += f' (of {max(filter(None, spans), default=0):,})'
  else:
    columns.append(
      table_cells.values(f'{kind.capitalize()}', spans, table_cells.whole)
    )
  shares = table_cells.values(
    heading, [_share(one) for one in counts], table_cells.decimals(1), max
  )
  return [shares, *columns]


def _share(counts: tuple[int, int] | None) -> float | None:
  if not counts or not counts[1]:
    return None
  return 100 * counts[0] / counts[1]


def _costs(results) -> table_cells.Table:
  count = table_cells.count
  heading, compiled = table_cells.values(
    'Compiled', [one.flops_compiled for one in results], count
  )
  compiled = [
    f'≥ {text}' if result.is_flops_least and text != table_cells.NONE else text
    for result, text in zip(results, compiled, strict=True)
  ]
  columns = [
    _names(results),
    table_cells.values(
      'Parameters', [one.total_parameters for one in results], count
    ),
    table_cells.values(
      'Active', [one.active_parameters for one in results], count
    ),
    table_cells.values(
      'Frozen', [one.frozen_parameters for one in results], count
    ),
    table_cells.values(
      'FLOPs / token', [one.flops_formula for one in results], count
    ),
    (heading, compiled),
    table_cells.values(
      'Tokens / s', [one.tokens_per_second for one in results], count, max
    ),
    table_cells.values(
      'Peak memory',
      [one.peak_memory for one in results],
      table_cells.gibibytes,
      min,
    ),
    table_cells.values(
      'Training', [one.seconds for one in results], table_cells.duration, min
    ),
  ]
  places = {result.memory_of for result in results} - {None}
  notes = [
    'Active: parameters that one token meets. Frozen: in finetuning. FLOPs of '
    'a forward pass: by formula, the products with kernels for real tokens; '
    'compiled, all that XLA counts in the program, attention scores and '
    'element-wise operations too (≥: products in loops of that program are '
    'counted once).',
    'Tokens / s: of pretraining, compilation and evaluations left out; with '
    'the time of training a mean over seeds, on the machine that ran them.',
  ]
  if places:
    of = ' and '.join(sorted(places))
    notes.append(
      f'Peak memory: of the {of} in pretraining'
      + (
        ' (with Python, data and compilation).' if 'process' in places else '.'
      )
    )
  return table_cells.Table.of_columns('Costs', columns, notes, is_main=True)


def _tries(results) -> table_cells.Table:
  """A row for each try of each model."""
  tries = [(result, one) for result in results for one in result.tries]
  one_decimal = table_cells.decimals(1)
  columns: list[table_cells.Column] = [
    ('Model', [result.name for result, _ in tries])
  ]
  for name in dict.fromkeys(name for _, one in tries for name, _ in one.rates):
    rates = [dict(one.rates).get(name) for _, one in tries]
    heading = name.replace('_', ' ').capitalize()
    columns.append(table_cells.values(heading, rates, '{:g}'.format))
  columns += [
    table_cells.values('EM', [one.em for _, one in tries], one_decimal),
    table_cells.values('F1', [one.f1 for _, one in tries], one_decimal),
    ('Chosen', ['chosen' if one.is_chosen else '' for _, one in tries]),
  ]
  notes = [
    'Rates of pretraining; EM and F1 in % on questions for choosing, which no '
    'other table shows. The best EM is chosen; of equal ones, the best F1.'
  ]
  at_edge = [
    f'{result.name} ({", ".join(names)})'
    for result in results
    if (names := result.rates_at_edge())
  ]
  if len(at_edge) == len(results) > 1:
    notes.append(
      'Warning: the chosen rates of all models are at the edge of what was '
      'tried, so that better ones may lie beyond.'
    )
  elif at_edge:
    notes.append(
      'Warning: at the edge of what was tried, so that a better rate may lie '
      f'beyond: {"; ".join(at_edge)}.'
    )
  return table_cells.Table.of_columns(
    'Tries of the learning rate', columns, notes
  )


def _paired(results) -> table_cells.Table:
  base, *others = results
  tests = [
    statistics.paired_test(base.em_scores, result.em_scores)
    for result in others
  ]
  columns = [
    _names(others),
    table_cells.values(
      f'EM less {base.name}',
      [100 * test.difference for test in tests],
      '{:+.1f}'.format,
      max,
    ),
    (
      '95 %',
      [f'{100 * test.low:+.1f} to {100 * test.high:+.1f}' for test in tests],
    ),
    table_cells.values(
      'Better on', [test.num_better for test in tests], table_cells.whole
    ),
    table_cells.values(
      'Worse on', [test.num_worse for test in tests], table_cells.whole
    ),
    ('p', [test.p_in_words() for test in tests]),
  ]
  return table_cells.Table.of_columns(
    f'Against {base.name}, on the same questions',
    columns,
    [
      'Interval: paired bootstrap over questions. p: exact two-sided sign test '
      'of the questions on which the models differ. Neither knows of the '
      'differences between seeds.'
    ],
    is_main=True,
  )


def _pairs(results) -> list[table_cells.Table]:
  """The differences of all pairs, and what the paired test says of them."""
  heading = ['EM of', *(f'less {result.name}' for result in results)]
  differences: list[list[table_cells.Cell]] = [heading]
  p_values: list[list[table_cells.Cell]] = [['p of', *heading[1:]]]
  for result in results:
    tests = [
      None
      if other is result
      else statistics.paired_test(other.em_scores, result.em_scores)
      for other in results
    ]
    differences.append(
      [
        result.name,
        *(f'{100 * test.difference:+.1f}' if test else '' for test in tests),
      ]
    )
    p_values.append(
      [result.name, *(test.p_in_words() if test else '' for test in tests)]
    )
  return [
    table_cells.Table('Each against each, on the same questions', differences),
    table_cells.Table(
      'p of each against each',
      p_values,
      ['The same test; the values are not corrected for the number of pairs.'],
    ),
  ]


def _grid(results) -> table_cells.Table:
  grid = answer_comparison.grid(results)
  best = max(grid.em.values())

  def cell(address, payload):
    em = grid.em.get((address, payload))
    if em is None:
      return table_cells.NONE
    return table_cells.Best(f'{em:.1f}') if em == best else f'{em:.1f}'

  rows: list[list[table_cells.Cell]] = [['Address', *grid.payloads]]
  for address in grid.addresses:
    rows.append([address, *(cell(address, one) for one in grid.payloads)])
  return table_cells.Table(
    'EM by address and payload',
    rows,
    [
      'What names the rows of the memory, and what they hold; EM in %, a mean '
      'over the seeds of each model.'
    ],
  )


def _memories(results) -> table_cells.Table:
  results = [one for one in results if one.silenced or one.reads]
  silenced = [result.silenced for result in results]
  reads = [result.reads for result in results]
  kinds = list(
    dict.fromkeys(kind for one in silenced if one for kind in one.recall)
  )
  one, three = table_cells.decimals(1), table_cells.decimals(3)
  count = table_cells.count
  columns = [
    _names(results),
    table_cells.values('EM', [result.score().em for result in results], one),
    table_cells.values('silenced', [s and s.em for s in silenced], one),
  ]
  for kind in kinds:
    whole = [_share(result.recall.get(kind)) for result in results]
    left = [s and _share(s.recall.get(kind)) for s in silenced]
    columns += [
      table_cells.values(f'Recall, {kind}', whole, one),
      table_cells.values('silenced', left, one),
    ]
  columns += [
    table_cells.values('Text loss', [one.text_loss for one in results], three),
    table_cells.values(
      'silenced', [s and s.text_loss for s in silenced], three
    ),
    table_cells.values(
      'Rows / token', [r and r.rows for r in reads], table_cells.decimals(2)
    ),
    table_cells.values('Bytes / token', [r and r.bytes for r in reads], count),
    table_cells.values('moved', [r and r.moved for r in reads], count),
  ]
  return table_cells.Table.of_columns(
    'Memories',
    columns,
    [
      'Silenced: the same model with no row of its memories, and without its '
      'sparse feed-forwards. Rows: those of tables that a token names, a mean '
      'over the tokens of both stacks; bytes: their size; moved: the size of '
      'the distinct rows of a batch by its tokens, which is what a step reads '
      'from tables on the host (n/a where the rows are learned).'
    ],
  )


def _breakdown(
  results, breakdown: answer_comparison.Breakdown
) -> table_cells.Table:
  columns = [_names(results)]
  widest = 0.0
  for group in breakdown.groups:
    scores = [score for one in results if (score := group.score(one))]
    # A group without questions has no column.
    if not scores:
      continue
    widest = max(
      widest,
      *(score.em_interval[1] - score.em_interval[0] for score in scores),
    )
    columns.append(
      table_cells.values(
        f'{group.name} ({int(group.members.sum()):,})',
        [score.em for score in scores],
        table_cells.decimals(1),
        max,
      )
    )
  notes = [
    f'EM in %, with the number of questions in brackets. '
    f'The widest of the 95 % intervals spans {widest:.1f} points; results.json '
    'has all intervals, and F1.'
  ]
  if breakdown.num_without:
    notes.append(
      f'Of {breakdown.num_without:,} questions it is not known; they are in '
      'no column.'
    )
  return table_cells.Table.of_columns(
    f'EM by {breakdown.title}', columns, notes
  )


def _loads(results) -> table_cells.Table:
  loads = [(result, load) for result in results for load in result.loads]

  def shares(heading, found):
    return table_cells.values(heading, found, table_cells.percent)

  columns: list[table_cells.Column] = [
    ('Model', [result.name for result, _ in loads]),
    ('Layer', [load.layer for _, load in loads]),
    ('Load', [table_cells.Bars.of_shares(load.shares) for _, load in loads]),
    ('Experts', [f'{len(load.shares):,}' for _, load in loads]),
    ('Busiest / mean', [f'{load.max_over_mean:.1f}' for _, load in loads]),
    ('Unused', [f'{load.num_unused:,}' for _, load in loads]),
    shares('Skipped', [load.skipped for _, load in loads]),
    shares(
      'Dropped in training', [load.dropped_in_training for _, load in loads]
    ),
    shares('in evaluation', [load.dropped for _, load in loads]),
    shares('in generation', [load.dropped_in_generation for _, load in loads]),
  ]
  return table_cells.Table.of_columns(
    'Load of the experts',
    columns,
    [
      'Tokens of some batches of the pretraining text. Bars: experts by falling '
      'load, heights in logarithms. Skipped: tokens that have no expert by '
      'design. Dropped: choices without room, in all of pretraining, on this '
      'text, and while questions are answered (layers of decoders).'
    ],
  )


def _sizes(results) -> table_cells.Table:
  sized = [result for result in results if result.note]
  return table_cells.Table.of_columns(
    'How models were sized',
    [_names(sized), ('Setting', [result.note for result in sized])],
  )
