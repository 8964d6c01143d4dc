"""Turns claims to be checked, as FEVER has them, into questions.

The question is the claim after a prompt, and the answer is its label in words.
"""

from collections.abc import Mapping
from typing import Any

FIELDS = ('claim', 'label')
PROMPT = 'fever claim: {claim}'
TARGETS = {
  'SUPPORTS': 'supports',
  'REFUTES': 'refutes',
  'NOT ENOUGH INFO': 'not enough info',
}


def as_question(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a record that has `FIELDS` with 'question' and 'answers' added.

  Raises:
    ValueError: the label is not one of TARGETS.
  """
  claim, label = record['claim'], record['label']
  if label not in TARGETS:
    raise ValueError(
      f'The label of a claim must be one of {list(TARGETS)}, but is '
      f'{label!r} in {claim!r}. Correct the file.'
    )
  return {**record, 'question': claim, 'answers': [TARGETS[label]]}
