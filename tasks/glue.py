"""seqio tasks of GLUE: sentences to the words of a label, in T5's format.

`register_tfds_tasks` registers the tasks of T5, `glue_NAME_v002`, and their
mixture `glue_v002_proportional`. Importing this module registers nothing.

| name | inputs | targets |
|---|---|---|
| cola | cola sentence: | unacceptable, acceptable |
| sst2 | sst2 sentence: | negative, positive |
| mrpc | mrpc sentence1: sentence2: | not_equivalent, equivalent |
| stsb | stsb sentence1: sentence2: | 0.0, 0.2, ... 5.0 |
| qqp | qqp question1: question2: | not_duplicate, duplicate |
| mnli, ax | mnli hypothesis: premise: | entailment, neutral, contradiction |
| qnli | qnli question: sentence: | entailment, not_entailment |
| rte | rte sentence1: sentence2: | entailment, not_entailment |
| wnli | wnli sentence1: sentence2: | not_entailment, entailment |

mnli_matched and mnli_mismatched are the two parts of mnli's evaluation. The
labels of test splits are not public, and are '<unk>' here. The metrics are
those of `classification_metrics.of_task`; 'ax' has a test split alone.
"""

from typing import Any

from mowe.data import seqio_stream
from mowe.evaluation import classification_metrics

from . import text_to_text

tf, seqio = seqio_stream.import_seqio()

MIXTURE = 'glue_v002_proportional'

_SENTENCES = ('sentence1', 'sentence2')
_PREMISES = ('hypothesis', 'premise')
_SPLITS = ('train', 'validation', 'test')
_MNLI_SPLITS = (
  'train',
  'validation_matched',
  'validation_mismatched',
  'test_matched',
  'test_mismatched',
)
# Each row has the name of a task, its first word and labels, its fields, and
# its splits, which TFDS does not know before it has prepared the data.
_TASKS = (
  ('cola', 'cola', ('sentence',), _SPLITS),
  ('sst2', 'sst2', ('sentence',), _SPLITS),
  ('mrpc', 'mrpc', _SENTENCES, _SPLITS),
  ('stsb', 'stsb', _SENTENCES, _SPLITS),
  ('qqp', 'qqp', ('question1', 'question2'), _SPLITS),
  ('mnli', 'mnli', _PREMISES, _MNLI_SPLITS),
  ('mnli_matched', 'mnli', _PREMISES, _SPLITS[1:]),
  ('mnli_mismatched', 'mnli', _PREMISES, _SPLITS[1:]),
  ('qnli', 'qnli', ('question', 'sentence'), _SPLITS),
  ('rte', 'rte', _SENTENCES, _SPLITS),
  ('wnli', 'wnli', _SENTENCES, _SPLITS),
  ('ax', 'mnli', _PREMISES, _SPLITS[2:]),
)
# The rates of T5's mixture are numbers of training examples. The mixture leaves
# out wnli; a task with the rate 0 is for evaluation alone.
_RATES = {
  'cola': 8_551,
  'sst2': 67_349,
  'mrpc': 3_668,
  'qqp': 363_849,
  'stsb': 5_749,
  'mnli': 392_702,
  'qnli': 104_743,
  'rte': 2_490,
  'mnli_mismatched': 0,
  'mnli_matched': 0,
  'ax': 0,
}


def register_tfds_tasks(vocabulary: text_to_text.Vocabulary) -> list[str]:
  """Registers the tasks and the mixture, unless they are registered already.

  Args:
    vocabulary: a SentencePiece file, 'bytes', or a loaded vocabulary.

  Returns:
    The names of the tasks.
  """
  names = []
  for kind, start, fields, splits in _TASKS:
    name = f'glue_{kind}_v002'
    names.append(name)
    if name in seqio.TaskRegistry.names():
      continue
    convert = _similarity
    if kind != 'stsb':
      labels = classification_metrics.LABELS[start]
      convert = text_to_text.labelled(
        start, {name: name for name in fields}, labels
      )
    metric = classification_metrics.of_task(name)
    text_to_text.register(
      name,
      # This is T5's version; version 2.0.0 has other examples of qqp.
      seqio.TfdsDataSource(tfds_name=f'glue/{kind}:1.0.0', splits=splits),
      [convert],
      vocabulary,
      metrics=[metric] if metric else [],
    )
  if MIXTURE not in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.add(
      MIXTURE,
      [(f'glue_{kind}_v002', float(rate)) for kind, rate in _RATES.items()],
    )
  return names


@seqio.map_over_dataset
def _similarity(example: Any) -> dict[str, Any]:
  """Turns two sentences into their similarity, rounded to a fifth."""
  parts = ['stsb']
  for name in _SENTENCES:
    parts += [f'{name}:', example[name]]
  inputs = tf.strings.join(parts, separator=' ')
  target = tf.strings.as_string(tf.round(5 * example['label']) / 5, precision=1)
  return text_to_text.asked(inputs, target, [target]) | text_to_text.index_of(
    example
  )
