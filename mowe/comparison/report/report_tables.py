"""Makes the tables and examples of a report, and renders it as Markdown.

The cells of a table are text, and 'n/a' stands for a missing number. The page
and the Markdown file show the same tables.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

from mowe.comparison.report import (
  answer_comparison,
  report_contents,
  statistics,
)
from mowe.words import terminal_text

NONE = 'n/a'
_BLOCKS = '▁▂▃▄▅▆▇█'
# The most bars in a picture of loads. With more experts, a bar is the mean of
# several.
_MOST_BARS = 48
# With more models, a table of all pairs would be too large to read. Its numbers
# are in results.json.
_MOST_IN_PAIRS = 10


@dataclasses.dataclass(frozen=True)
class Bars:
  """A small picture of bars, with heights from 0 to 1, in a cell of a table."""

  heights: tuple[float, ...]


Cell = str | Bars


@dataclasses.dataclass(frozen=True)
class Table:
  """A table with what has to be known to read it.

  Attributes:
    title: title above the table.
    rows: rows of the table, the headings first; () for a table without data.
    notes: sentences below the table.
  """

  title: str
  rows: Sequence[Sequence[Cell]]
  notes: Sequence[str] = ()


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


def tables(report: report_contents.Report) -> list[Table]:
  """Returns all tables of a report, in their order."""
  found = [_answers(report), _costs(report.results)]
  if any(result.tries for result in report.results):
    found.append(_tries(report.results))
  if len(report.results) > 1:
    found.append(_paired(report.results))
  if 2 < len(report.results) <= _MOST_IN_PAIRS:
    found.append(_pairs(report.results))
  if len(answer_comparison.grid(report.results).em) > 1:
    found.append(_grid(report.results))
  if any(result.silenced or result.reads for result in report.results):
    found.append(_memories(report.results))
  found += [
    _breakdown(report, breakdown)
    for breakdown in answer_comparison.breakdowns(
      report.questions, report.num_bins
    )
  ]
  if any(result.loads for result in report.results):
    found.append(_loads(report.results))
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
    for index in answer_comparison.differing_questions(report.results)
  ]


def _answers(report) -> Table:
  kinds = list(
    dict.fromkeys(kind for result in report.results for kind in result.recall)
  )
  heading = ['Model', 'EM (95 %)', 'F1 (95 %)', 'Questions', 'EM by seed']
  heading += [f'Recall, {kind}' for kind in kinds]
  heading += ['Held-out loss', 'Text loss']
  rows = [heading]
  for result in report.results:
    score = result.score()
    rows.append(
      [
        result.name,
        f'{score.em:.1f} ({_interval(score.em_interval)})',
        f'{score.f1:.1f} ({_interval(score.f1_interval)})',
        f'{score.num_questions:,}',
        ', '.join(
          f'{seed}: {em:.1f}'
          for em, seed in zip(result.em_by_seed(), result.seeds, strict=True)
        ),
        *(_recall(result, kind) for kind in kinds),
        _number(result.held_out_loss, '.3f'),
        _number(result.text_loss, '.3f'),
      ]
    )
  notes = [
    'EM and F1 in %, means over seeds; in brackets 95 % intervals by bootstrap '
    'over questions.'
  ]
  if kinds:
    notes.append(
      'Recall: masked spans of the pretraining text that are filled in token '
      'for token, in % (of so many, all seeds together). Losses, on held-out '
      'text and on text that was trained on, are means over seeds; both before '
      'finetuning.'
    )
  return Table('Answers', rows, notes)


def _recall(result, kind) -> str:
  if kind not in result.recall:
    return NONE
  right, spans = result.recall[kind]
  return f'{100 * right / spans:.1f} ({spans:,})'


def _costs(results) -> Table:
  rows: list[list[Cell]] = [
    [
      'Model',
      'Parameters',
      'Active',
      'Frozen',
      'Learning rate',
      'FLOPs / token',
      'Compiled',
      'Tokens / s',
      'Peak memory',
      'Training',
    ]
  ]
  for result in results:
    least = '≥ ' if result.is_flops_least else ''
    compiled = _count(result.flops_compiled)
    rows.append(
      [
        result.name,
        _count(result.total_parameters),
        _count(result.active_parameters),
        _count(result.frozen_parameters),
        _rates(result),
        _count(result.flops_formula),
        least + compiled if compiled != NONE else NONE,
        _count(result.tokens_per_second),
        _bytes(result.peak_memory),
        _duration(result.seconds),
      ]
    )
  places = {result.memory_of for result in results} - {None}
  notes = []
  sizes = [f'{one.name}: {one.note}' for one in results if one.note]
  if sizes:
    notes.append(f'{"; ".join(sizes)}.')
  notes += [
    'Active: parameters that one token meets. Frozen: in finetuning. Learning '
    'rate: of pretraining, and of how many that were tried it is the best; '
    'with tables of rows, that of the rows after it. FLOPs of a forward pass: '
    'by formula, the products with kernels for real tokens; compiled, all that '
    'XLA counts in the program, attention scores and element-wise operations '
    'too (≥: products in loops of that program are counted once).',
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
  return Table('Costs', rows, notes)


def _rates(result) -> str:
  if result.chosen is None:
    return 'not tried'
  values = ', '.join(f'{value:g}' for _, value in result.chosen.rates)
  return f'{values} (of {len(result.tries)})'


def _tries(results) -> Table:
  number = max(len(result.tries) for result in results)
  rows: list[list[Cell]] = [['Model', *(f'Try {i + 1}' for i in range(number))]]
  for result in results:
    row: list[Cell] = [result.name]
    for one in result.tries:
      rates = ', '.join(f'{value:g}' for _, value in one.rates)
      mark = ', chosen' if one.is_chosen else ''
      row.append(f'{rates}: EM {one.em:.1f}, F1 {one.f1:.1f}{mark}')
    rows.append(row + [NONE] * (number + 1 - len(row)))
  notes = [
    'Learning rate of pretraining, with tables of rows also that of the rows; '
    'EM and F1 in % on questions for choosing, which no other table shows. '
    'The best EM is chosen; of equal ones, the best F1.'
  ]
  at_edge = [
    f'{result.name} ({", ".join(names)})'
    for result in results
    if (names := result.rates_at_edge())
  ]
  if at_edge:
    notes.append(
      'Warning: at the edge of what was tried, so that a better rate may lie '
      f'beyond: {"; ".join(at_edge)}.'
    )
  return Table('Tries of the learning rate', rows, notes)


def _paired(results) -> Table:
  base, *others = results
  rows: list[list[Cell]] = [
    ['Model', f'EM less {base.name}', '95 %', 'Better on', 'Worse on', 'p']
  ]
  for result in others:
    test = statistics.paired_test(base.em_scores, result.em_scores)
    rows.append(
      [
        result.name,
        f'{100 * test.difference:+.1f}',
        f'{100 * test.low:+.1f} to {100 * test.high:+.1f}',
        f'{test.num_better:,}',
        f'{test.num_worse:,}',
        _p_value(test),
      ]
    )
  return Table(
    f'Against {base.name}, on the same questions',
    rows,
    [
      'Interval: paired bootstrap over questions. p: exact two-sided sign test '
      'of the questions on which the models differ. Neither knows of the '
      'differences between seeds.'
    ],
  )


def _pairs(results) -> Table:
  rows: list[list[Cell]] = [['EM of', *(f'less {r.name}' for r in results)]]
  for result in results:
    row: list[Cell] = [result.name]
    for other in results:
      if other is result:
        row.append('')
        continue
      test = statistics.paired_test(other.em_scores, result.em_scores)
      row.append(f'{100 * test.difference:+.1f} (p {_p_value(test)})')
    rows.append(row)
  return Table(
    'Each against each, on the same questions',
    rows,
    ['The same test; the p-values are not corrected for the number of pairs.'],
  )


def _grid(results) -> Table:
  grid = answer_comparison.grid(results)
  rows: list[list[Cell]] = [['Address', *grid.payloads]]
  for address in grid.addresses:
    cells = [grid.em.get((address, payload)) for payload in grid.payloads]
    rows.append([address, *(_number(em, '.1f') for em in cells)])
  return Table(
    'EM by address and payload',
    rows,
    [
      'What names the rows of the memory, and what they hold; EM in %, a mean '
      'over the seeds of each model.'
    ],
  )


def _memories(results) -> Table:
  kinds = list(
    dict.fromkeys(
      kind
      for result in results
      if result.silenced
      for kind in result.silenced.recall
    )
  )
  heading = ['Model', 'EM', 'silenced']
  for kind in kinds:
    heading += [f'Recall, {kind}', 'silenced']
  heading += ['Text loss', 'silenced', 'Rows / token', 'Bytes / token', 'moved']
  rows = [heading]
  for result in results:
    silenced, reads = result.silenced, result.reads
    if not (silenced or reads):
      continue
    row = [
      result.name,
      f'{result.score().em:.1f}',
      _number(silenced and silenced.em, '.1f'),
    ]
    for kind in kinds:
      row += [
        _share(result.recall.get(kind)),
        _share(silenced and silenced.recall.get(kind)),
      ]
    row += [
      _number(result.text_loss, '.3f'),
      _number(silenced and silenced.text_loss, '.3f'),
      _number(reads and reads.rows, '.2f'),
      _count(reads and reads.bytes),
      _count(reads and reads.moved),
    ]
    rows.append(row)
  return Table(
    'Memories',
    rows,
    [
      'Silenced: the same model with no row of its memories, and without its '
      'sparse feed-forwards. Rows: those of tables that a token names, a mean '
      'over the tokens of both stacks; bytes: their size; moved: the size of '
      'the distinct rows of a batch by its tokens, which is what a step reads '
      'from tables on the host (n/a where the rows are learned).'
    ],
  )


def _share(counts: tuple[int, int] | None) -> str:
  if not counts or not counts[1]:
    return NONE
  return f'{100 * counts[0] / counts[1]:.1f}'


def _p_value(test: statistics.PairedTest) -> str:
  return f'{test.p_value:.2g}' if test.p_value >= 1e-4 else '< 0.0001'


def _breakdown(report, breakdown: answer_comparison.Breakdown) -> Table:
  title = f'EM and F1 by {breakdown.title}'
  if not breakdown.groups:
    return Table(title, (), [f'n/a: {breakdown.why_empty}.'])
  rows: list[list[Cell]] = [
    [
      breakdown.heading,
      'Questions',
      *(result.name for result in report.results),
    ]
  ]
  for group in breakdown.groups:
    scores = [group.score(result) for result in report.results]
    rows.append(
      [
        group.name,
        f'{int(group.members.sum()):,}',
        *(
          f'{score.em:.1f} ({_interval(score.em_interval)}) · {score.f1:.1f}'
          if score
          else NONE
          for score in scores
        ),
      ]
    )
  notes = ['EM in %, in brackets its 95 % interval; then F1.']
  if breakdown.num_without:
    notes.append(
      f'Of {breakdown.num_without:,} questions it is not known; they are in '
      'no row.'
    )
  return Table(title, rows, notes)


def _loads(results) -> Table:
  rows: list[list[Cell]] = [
    [
      'Model',
      'Layer',
      'Load',
      'Experts',
      'Busiest / mean',
      'Unused',
      'Skipped',
      'Dropped in training',
      'in evaluation',
      'in generation',
    ]
  ]
  for result in results:
    for load in result.loads:
      rows.append(
        [
          result.name,
          load.layer,
          Bars(_heights(load.shares)),
          f'{len(load.shares):,}',
          f'{load.max_over_mean:.1f}',
          f'{load.num_unused:,}',
          _percent(load.skipped),
          _percent(load.dropped_in_training),
          _percent(load.dropped),
          _percent(load.dropped_in_generation),
        ]
      )
  return Table(
    'Load of the experts',
    rows,
    [
      'Tokens of some batches of the pretraining text. Bars: experts by falling '
      'load, heights in logarithms. Skipped: tokens that have no expert by '
      'design. Dropped: choices without room, in all of pretraining, on this '
      'text, and while questions are answered (layers of decoders).'
    ],
  )


def _heights(shares: Sequence[float]) -> tuple[float, ...]:
  """Returns heights of bars, from 0 to 1, for loads in falling order."""
  ordered = sorted(shares, reverse=True)
  number = min(_MOST_BARS, len(ordered))
  ends = [round(i * len(ordered) / number) for i in range(number + 1)]
  mean = sum(ordered) / len(ordered) or 1.0
  means = [
    sum(ordered[a:b]) / (b - a) / mean
    for a, b in zip(ends, ends[1:], strict=False)
  ]
  top = math.log1p(means[0]) or 1.0
  return tuple(math.log1p(value) / top for value in means)


# Functions that render Markdown.


def markdown(
  report: report_contents.Report,
  tables: Sequence[Table],
  examples: Sequence[Example],
  figure: str,
) -> str:
  """Returns the report as Markdown, which shows the file of its figure."""
  parts = [f'# {_text(report.title)}', *map(_text, report.notes)]
  parts.append(f'![EM, losses and sizes of all models]({figure})')
  for table in tables:
    parts.append(f'## {_text(table.title)}')
    if table.rows:
      parts.append(markdown_table(table.rows))
    parts += [_text(note) for note in table.notes]
  if examples:
    parts.append('## Questions on which models differ')
  for example in examples:
    lines = [
      f'**{_text(example.question)}** (right: '
      f'{_text(" / ".join(example.answers))})',
      '',
    ]
    lines += [
      f'- {_text(name)}: {_text(prediction) or "(nothing)"} '
      f'{"✓" if is_right else "✗"}'
      for name, prediction, is_right in example.predictions
    ]
    lines += [
      f'- experts of {_text(name)}: '
      + ', '.join(
        f'{_text(word)} {"none" if expert is None else expert}'
        for word, expert in words
      )
      for name, words in example.words
    ]
    parts.append('\n'.join(lines))
  return '\n\n'.join(parts) + '\n'


def markdown_table(rows: Sequence[Sequence[Cell]]) -> str:
  """Returns rows, the headings first, as a table in Markdown."""
  heading, *body = (
    '| ' + ' | '.join(_markdown_cell(cell) for cell in row) + ' |'
    for row in rows
  )
  # The first column is aligned to the left, numbers to the right.
  rule = '|---|' + '---:|' * (len(rows[0]) - 1)
  return '\n'.join((heading, rule, *body))


def bars_in_text(bars: Bars) -> str:
  """Returns about eight of the bars, as letters that are blocks."""
  step = max(1, len(bars.heights) // 8)
  return ''.join(
    _BLOCKS[round(height * (len(_BLOCKS) - 1))]
    for height in bars.heights[::step]
  )


def _markdown_cell(cell: Cell) -> str:
  return bars_in_text(cell) if isinstance(cell, Bars) else _text(cell)


def _text(text: str) -> str:
  """Escapes a text, so that it is neither Markdown, HTML nor codes."""
  text = terminal_text.escaped(' '.join(text.split()))
  for mark in '\\|*_`[]#':
    text = text.replace(mark, f'\\{mark}')
  return html.escape(text, quote=False)


# Functions that format numbers.


def _interval(ends: tuple[float, float]) -> str:
  return '{:.1f} – {:.1f}'.format(*ends)


def _number(value: float | None, form: str) -> str:
  return NONE if value is None else f'{value:{form}}'


def _percent(share: float | None) -> str:
  return NONE if share is None else f'{100 * share:.1f} %'


def _count(number: float | None) -> str:
  """Formats a number with three digits and a unit: 77000000 is 77M."""
  if number is None:
    return NONE
  for unit in ('', 'K', 'M', 'G'):
    if number < 999.5:
      return f'{number:.3g}{unit}'
    number /= 1000
  return f'{number:.3g}T'


def _bytes(number: float | None) -> str:
  if number is None:
    return NONE
  return f'{number / 2**30:.2f} GiB'


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return NONE
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return (
    f'{minutes // 60}h {minutes % 60:02}m'
    if minutes >= 60
    else f'{minutes} min'
  )
