"""No token of a decoder may depend on a later one, whatever that is.

Targets are changed from a position on, in all rows. No logit at or before that
position may change, because the input of a position is the target before it.
The test runs all shipped models that are small enough, in training and in
evaluation, with packed and other rows in each batch.

Also tests `model_config`.
"""

import numpy as np
import pytest
import shipped_models

_BATCH, _INPUTS, _LENGTH = 6, 10, 12


@pytest.mark.slow
@pytest.mark.parametrize('name', shipped_models.NAMES)
def test_causal(name, tmp_path):
  model, variables = shipped_models.make(name, tmp_path)
  batch = shipped_models.make_batch(model.config, 0, _BATCH, _INPUTS, _LENGTH)
  targets = batch['decoder_target_tokens']
  others = np.random.default_rng(1).integers(3, 259, targets.shape)
  others = np.where(targets > 0, others, 0).astype(np.int32)
  for training in (True, False):
    logits_of = shipped_models.logits_of(model, training)
    logits = np.asarray(logits_of(variables, batch))
    for first in (2, 6, 9):
      changed = np.where(np.arange(_LENGTH) < first, targets, others)
      moved = np.asarray(
        logits_of(variables, shipped_models.with_targets(batch, changed))
      )
      distance = np.abs(moved - logits).max(axis=(0, 2))
      tolerance = 1e-5 * np.abs(logits).max()
      assert distance[: first + 1].max() <= tolerance, (training, first)
      # The logits behind the position do change.
      assert distance[first + 1] > 100 * tolerance
