"""The memory of a compiled train step must not grow with the expert table."""

import re

import jax
import numpy as np
import pytest

from mowe.layers.memory import word_experts
from mowe.models.t5 import t5, t5_config
from mowe.training import train_state, training_step
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words.plans import batch_plans, step_plans

_FEW, _MANY = 4096, 262_144
_BATCH, _INPUTS, _TARGETS = 2, 6, 4
# Two size classes hold any batch, and compile within a few seconds.
_TOKENS = _BATCH * _INPUTS
_STREAM = batch_plans.ClassSizes(((2, _TOKENS), (_TOKENS, _TOKENS)))
_PROFILE = batch_plans.CapacityProfile(
  (('encoder', _STREAM), ('decoder', _STREAM)),
  updates=batch_plans.ClassSizes(((2, _TOKENS), (2 * _TOKENS, 2 * _TOKENS))),
)


@pytest.fixture(scope='module', params=['float32', 'bfloat16'])
def compiled(request):
  """For each number of experts: bytes of tables and state, and a program."""
  return {number: _compile(number, request.param) for number in (_FEW, _MANY)}


def _compile(num_experts, table_dtype):
  model = t5.T5(
    t5_config.T5Config(
      vocab_size=32,
      emb_dim=8,
      num_heads=2,
      head_dim=4,
      mlp_dim=16,
      num_encoder_layers=1,
      num_decoder_layers=1,
      sparse_feed_forward=lambda **given: word_experts.MoweLayer(
        num_experts, 16, table_dtype=table_dtype, **given
      ),
      sparse_encoder_layers=(0,),
      sparse_decoder_layers=(0,),
    )
  )
  optimizer = optimizers.Adafactor(1e-3).build(None)
  row_optimizer = row_optimizers.RowAdafactor(1e-3)
  state = jax.eval_shape(
    lambda key: train_state.create(
      model, key, optimizer=optimizer, row_optimizer=row_optimizer
    ),
    jax.random.key(0),
  )
  function = training_step.make_train_step(
    model,
    optimizer=optimizer,
    row_optimizer=row_optimizer,
    loss=training_step.LossConfig(),
    seed=0,
  )
  rng = np.random.default_rng(0)
  # The ids are below both numbers of experts, so that both plans have the same
  # sizes.
  ids = {
    'encoder': rng.integers(0, _FEW, (_BATCH, _INPUTS), np.int32),
    'decoder': rng.integers(0, _FEW, (_BATCH, _TARGETS), np.int32),
  }
  plan = step_plans.StepPlan(
    batch_plans.make_plan(ids, _PROFILE, num_experts), {}
  )
  targets = np.ones((_BATCH, _TARGETS), np.int32)
  batch = {
    'encoder_input_tokens': np.ones((_BATCH, _INPUTS), np.int32),
    'decoder_input_tokens': targets,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': targets.astype(np.float32),
  }
  lowered = jax.jit(function, donate_argnums=(0,)).lower(state, {}, batch, plan)
  leaves = jax.tree.leaves((state.tables, state.table_state))
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  return size, lowered.compile()


@pytest.mark.slow
def test_temporaries_do_not_grow_with_the_table(compiled):
  few, many = (
    compiled[n][1].memory_analysis().temp_size_in_bytes for n in (_FEW, _MANY)
  )
  # Alignment may differ a little. One copied kernel would be 64 MiB.
  assert abs(many - few) < 4096


def test_no_instruction_copies_a_table(compiled):
  text = compiled[_MANY][1].as_text()
  copies = [
    line.strip()
    for line in text.splitlines()
    if re.search(rf'= \w+\[{_MANY},\d+,\d+\]\S* (copy|convert)\(', line)
  ]
  assert f'[{_MANY},' in text and not copies


def test_tables_are_updated_in_place(compiled):
  grown = compiled[_MANY][0] - compiled[_FEW][0]
  few, many = (compiled[n][1].memory_analysis() for n in (_FEW, _MANY))
  assert many.alias_size_in_bytes - few.alias_size_in_bytes == grown
  # All outputs besides the donated state are metrics.
  assert many.output_size_in_bytes - many.alias_size_in_bytes < 4096
