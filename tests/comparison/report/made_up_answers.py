"""Made-up results of models, for the tests of the report."""

import numpy as np

from mowe.comparison.report import answer_comparison, report_contents

HOSTILE = '<script>alert("x")</script> | $\\frac$ &amp;'


def questions(number=24):
  """Half of the questions have the first relation, and one has no entity."""
  return [
    answer_comparison.Question(
      text='Who <b>wrote</b> it?' if i == 4 else f'Question {i} of Zorblat?',
      answers=(f'answer {i}', f'<i>{i}</i>'),
      task='qa_validation',
      relation=('birth_date', 'capital of')[i % 2],
      entity_count=None if i == 0 else i // 2,
      is_answer_seen=i % 3 == 0,
    )
    for i in range(number)
  ]


def answers(right, seed=0, number=24):
  """Answers that are right for the questions of the given numbers."""
  em = np.zeros(number)
  em[list(right)] = 1
  return answer_comparison.Answers(
    seed=seed,
    predictions=tuple(
      f'answer {i}' if em[i] else f'wrong <u>{i}</u>' for i in range(number)
    ),
    em=em,
    f1=np.maximum(em, 0.25),
  )


def results():
  """A dense model with two seeds, and one model with all optional results."""
  dense = answer_comparison.ModelResult(
    name='dense',
    total_parameters=77_000_000,
    active_parameters=76_500_000,
    frozen_parameters=0,
    flops_formula=154e6,
    flops_compiled=161e6,
    answers=[answers((1, 2, 3), seed=7), answers((2, 3, 5, 8, 9), seed=8)],
    seconds=3605.0,
    curve=[(0, 9.5), (100, 4.25), (200, None)],
  )
  sparse = answer_comparison.ModelResult(
    name=HOSTILE,
    total_parameters=512_000_000,
    active_parameters=76_600_000,
    frozen_parameters=430_000_000,
    flops_formula=155e6,
    flops_compiled=171e6,
    is_flops_least=True,
    answers=[answers(range(3, 19), seed=7)],
    tokens_per_second=12_345.0,
    peak_memory=3 * 2**29,
    memory_of='device',
    held_out_loss=2.125,
    text_loss=1.875,
    seconds=42.0,
    curve=[(0, 9.1), (100, 3.5), (200, 2.75)],
    held_out_curve=[(100, 3.75), (200, 3.0)],
    recall={'all spans': (30, 40)},
    loads=[
      answer_comparison.Load(
        'encoder, block 2', (0.5, 0.25, 0.25, 0.0), 0.125, 0.0
      )
    ],
    note='EXPERT_DIM = 96 for the FLOPs per token of dense (+0.65%)',
    cell=('word', 'expert'),
    silenced=answer_comparison.Silenced(3.25, 4.125, {'all spans': (5, 40)}),
    reads=answer_comparison.Reads(1.75, 21_500.0, 640.0),
  )
  return [dense, sparse]


def whole_report(**changes):
  fields = {
    'title': '<h1> of models',
    'results': results(),
    'questions': questions(),
    'notes': ('24 questions & <more>.',),
    'word_experts': {3: {HOSTILE: [('who', None), ('zorblat', 417)]}},
  }
  return report_contents.Report(**(fields | changes))
