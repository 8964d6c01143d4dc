"""Saves and restores checkpoints with the real t5x; see README.md."""

import pathlib
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import seqio
from t5x import (
  adafactor,
  checkpoints,
  models,
  partitioning,
  train_state,
  trainer,
)
from t5x.examples.t5 import network

BATCH, INPUTS, TARGETS = 4, 6, 9


def make_model() -> models.EncoderDecoderModel:
  """A T5 1.1 whose axes all have different sizes."""
  vocabulary = seqio.PassThroughVocabulary(11)
  config = network.T5Config(
    vocab_size=11,
    emb_dim=8,
    num_heads=3,
    head_dim=5,
    mlp_dim=7,
    num_encoder_layers=1,
    num_decoder_layers=2,
    mlp_activations=('gelu', 'linear'),
    dropout_rate=0.0,
  )
  optimizer = adafactor.Adafactor(
    learning_rate=0.1,
    # The threshold is low, so that even these small kernels are factored.
    min_dim_size_to_factor=6,
    logical_factor_rules=adafactor.standard_logical_factor_rules(),
  )
  return models.EncoderDecoderModel(
    network.Transformer(config), vocabulary, vocabulary, optimizer
  )


def make_batch() -> dict[str, np.ndarray]:
  """Random ids; the last inputs are padded."""
  rng = np.random.default_rng(0)
  inputs = rng.integers(1, 11, (BATCH, INPUTS)).astype(np.int32)
  inputs[1:, 4:] = 0
  targets = rng.integers(1, 11, (BATCH, TARGETS)).astype(np.int32)
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets, np.float32),
  }


def initial_state(model) -> train_state.FlaxOptimTrainState:
  """The train state at step 0."""
  batch = make_batch()
  variables = model.get_initial_variables(
    jax.random.PRNGKey(0),
    {name: array.shape for name, array in batch.items()},
    {name: jnp.int32 for name in batch},
  )
  return train_state.FlaxOptimTrainState.create(model.optimizer_def, variables)


def logits_of(model, params, batch) -> np.ndarray:
  """The logits of t5x's network."""
  return np.asarray(
    model.module.apply(
      {'params': params},
      batch['encoder_input_tokens'],
      batch['decoder_input_tokens'],
      batch['decoder_target_tokens'],
      enable_dropout=False,
    )
  )


def save(folder: pathlib.Path) -> None:
  """Trains for three steps and saves the state in both layouts."""
  model, batch = make_model(), make_batch()
  state = initial_state(model)
  for _ in range(3):
    grads, _, _ = trainer.accumulate_grads_microbatched(
      model, state, batch, jax.random.PRNGKey(1), None
    )
    state = state.apply_gradient(grads, learning_rate=0.1)
  for name in ('legacy', 'orbax'):
    (folder / name).mkdir(parents=True)
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  legacy = checkpoints.Checkpointer(state, partitioner, str(folder / 'legacy'))
  legacy.save(state)
  orbax = checkpoints.OrbaxCheckpointManagerInterface(
    str(folder / 'orbax'), state, partitioner
  )
  orbax.save(state)
  orbax.close()
  np.savez(
    folder / 'io.npz', logits=logits_of(model, state.params, batch), **batch
  )


def restore(checkpoint: pathlib.Path, out: pathlib.Path) -> None:
  """Restores a checkpoint of either layout; writes its arrays and logits."""
  model = make_model()
  manager = checkpoints.OrbaxCheckpointManagerInterface(
    str(checkpoint.parent),
    initial_state(model),
    partitioning.PjitPartitioner(num_partitions=1),
  )
  state = manager.restore(path=str(checkpoint))
  manager.close()
  flat = flax.traverse_util.flatten_dict(
    flax.core.unfreeze(state.state_dict()), sep='/'
  )
  arrays = {name: np.asarray(array) for name, array in flat.items()}
  logits = logits_of(model, state.params, make_batch())
  np.savez(out, logits=logits, **arrays)


if __name__ == '__main__':
  paths = [pathlib.Path(path).absolute() for path in sys.argv[2:]]
  {'save': save, 'restore': restore}[sys.argv[1]](*paths)
