"""A row is answered as if it were alone, whatever else is in its batch.

The test runs all shipped models that are small enough. Their routers crowd
tokens, so that a capacity in generation would drop most choices.
"""

import numpy as np
import pytest
import shipped_models

_BATCH, _INPUTS, _STEPS = 64, 7, 4


@pytest.mark.slow
@pytest.mark.parametrize('name', shipped_models.NAMES)
def test_generation_alone(name, tmp_path):
  model, variables = shipped_models.make(name, tmp_path)
  generate = shipped_models.generated(model, _STEPS)
  rng = np.random.default_rng(0)
  inputs = rng.integers(3, 259, (_BATCH, _INPUTS)).astype(np.int32)
  # The inputs have different lengths.
  inputs[1::3, 4:] = 0
  goes_on = np.full(_BATCH, _STEPS)
  tokens, logits = map(np.asarray, generate(variables, inputs, goes_on))
  looked_at = (0, 4, 62)
  some_ended = np.where(np.isin(np.arange(_BATCH), looked_at), _STEPS, 1)
  beside = list(map(np.asarray, generate(variables, inputs, some_ended)))
  tolerance = 1e-5 * np.abs(logits).max()
  for row in looked_at:
    one = slice(row, row + 1)
    alone = list(
      map(np.asarray, generate(variables, inputs[one], goes_on[one]))
    )
    for found_tokens, found_logits in (alone, [part[one] for part in beside]):
      np.testing.assert_array_equal(found_tokens, tokens[one])
      np.testing.assert_allclose(
        found_logits, logits[one], rtol=0, atol=tolerance
      )
