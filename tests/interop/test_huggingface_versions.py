"""Tests tied and untied versions of T5 against transformers 5."""

import functools

import flax
import jax
import numpy as np
import pytest

from mowe.interop import huggingface, safetensors_format
from mowe.models.t5 import t5

_SCALED = ('t5_10', 'switch_tied')
_TIED = (*_SCALED, 't5_11_tied', 'mt5_tied')


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({*_TIED, 'mt5'}))
def test_logits_and_tensors(name, golden_dir, tmp_path):
  folder = golden_dir / 'hf_versions' / name
  config, params = huggingface.load(folder)
  assert config.logits_via_embedding == (name in _SCALED)
  with np.load(folder / 'io.npz') as io:
    inputs = io['input_ids'].astype(np.int32)
    targets = io['decoder_input_ids'].astype(np.int32)
    expected = io['logits']
  apply = functools.partial(t5.T5(config).apply, enable_dropout=False)
  actual = jax.jit(apply)(
    {'params': params}, inputs, targets, np.ones_like(targets)
  )
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )

  huggingface.save(tmp_path / 'again', config, params)
  before = safetensors_format.read(folder / 'model.safetensors')
  after = safetensors_format.read(tmp_path / 'again' / 'model.safetensors')
  for tensor, value in before.items():
    np.testing.assert_array_equal(after[tensor], value)
  # If logits are not scaled, our model has a kernel of its own for them.
  is_split = name in _TIED and name not in _SCALED
  assert set(after) - set(before) == ({'lm_head.weight'} if is_split else set())
  again, read = huggingface.load(tmp_path / 'again')
  assert again.logits_via_embedding == config.logits_via_embedding
  flat = flax.traverse_util.flatten_dict(params)
  for path, value in flax.traverse_util.flatten_dict(read).items():
    np.testing.assert_array_equal(value, flat[path])
