"""A small world for the commands: vocabularies, caches, settings of a run."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import pytest

from mowe.commands import cache_task, data_config
from mowe.commands import train as train_command
from mowe.layers.memory import word_experts
from mowe.models.t5 import t5_config
from mowe.training import partitioning
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words import (
  base_vocabulary,
  routing_vocabulary,
  sentencepiece_vocabulary,
  vocabulary_builder,
)

NUM_EXPERTS = 16
LENGTHS = {'inputs': 18, 'targets': 11}
# Two epochs of these texts are about five batches of eight.
TEXTS = [
  f'{name} of {town} met {other} in the old town and ate a {fruit}.'
  for name, other in (('Zorblat', 'Quimby'), ('Anna', 'Karl'))
  for town in ('Karlsburg', 'Norden', 'Delft')
  for fruit in ('quince', 'plum')
]
QUESTIONS = [
  {'question': f'Who met {b}?', 'answers': [a], 'relation': 'met'}
  for a, b in (('Zorblat', 'Quimby'), ('Anna', 'Karl'), ('Karl', 'Anna'))
] * 7


@dataclasses.dataclass(frozen=True)
class World:
  """The files of a world, and models that fit them."""

  folder: pathlib.Path
  vocabulary: base_vocabulary.Vocabulary
  routing: routing_vocabulary.RoutingVocabulary

  @property
  def vocabulary_path(self) -> str:
    return str(self.folder / 'vocabulary.model')

  @property
  def routing_path(self) -> str:
    return str(self.folder / 'routing.npz')

  @property
  def cache_dir(self) -> str:
    return str(self.folder / 'cache')

  @functools.cached_property
  def sparse_model(self) -> t5_config.T5Config:
    """The one config of most runs, whose parameters are traced once."""
    return self.config()

  def config(self, sparse=True, **changes) -> t5_config.T5Config:
    sizes = {
      'vocab_size': self.vocabulary.size + 3,
      'emb_dim': 12,
      'num_heads': 2,
      'head_dim': 5,
      'mlp_dim': 14,
      'num_encoder_layers': 1,
      'num_decoder_layers': 1,
      'dropout_rate': 0.1,
    }
    if sparse:
      sizes |= {
        'sparse_feed_forward': functools.partial(
          word_experts.MoweLayer, NUM_EXPERTS, 4
        ),
        'sparse_encoder_layers': (0,),
        'sparse_decoder_layers': (0,),
        'routing': self.routing,
      }
    return t5_config.T5Config(**(sizes | changes))

  def data(self, name='text', **changes) -> data_config.DataConfig:
    settings = {
      'mixture_or_task_name': name,
      'task_feature_lengths': LENGTHS,
      'batch_size': 8,
      'cache_dir': self.cache_dir,
      'trial_steps': 4,
    }
    return data_config.DataConfig(**(settings | changes))

  def training(self, model_dir, total_steps, **changes) -> Any:
    """A run on one device, as programs for eight take longer to compile."""
    settings = {
      'model': self.sparse_model,
      'vocabulary': self.vocabulary,
      'data': self.data(),
      'optimizer': optimizers.AdamW(1e-2),
      'row_optimizer': row_optimizers.RowAdafactor(1e-2),
      'make_mesh': functools.partial(
        partitioning.make_mesh, devices=one_device()
      ),
      'save': train_command.SaveConfig(period=3),
      'log_period': 2,
      'boards': (),
    }
    return train_command.Training(
      model_dir=str(model_dir), total_steps=total_steps, **(settings | changes)
    )

  def train(
    self, model_dir, total_steps, config_text=None, back_to=None, **changes
  ) -> Any:
    """Trains with `training(...)`."""
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(train_command, 'jitted_step', _jitted_once)
      return train_command.train(
        self.training(model_dir, total_steps, **changes),
        back_to=back_to,
        config_text=config_text,
      )


def one_device() -> list[jax.Device]:
  """The devices of runs whose programs are to be compiled quickly."""
  return jax.devices()[:1]


_jitted_step = train_command.jitted_step
_JITTED = []


def _jitted_once(training, setup, num_slots):
  """Jits a step once for all runs in which it is the same, as they trace it.

  Two steps are the same if all is equal that `train.jitted_step` reads, and
  that its optimizers are made from. Equal configs of models may stand for what
  gin files bind at different times, so the config must be the very same.
  """
  read = (
    training.optimizer,
    training.freeze_experts,
    setup.row_optimizer,
    training.loss,
    training.seed,
    training.num_microbatches,
    setup.mesh,
    num_slots,
    # Programs with other optimizations are other programs.
    jax.config.read('jax_disable_most_optimizations'),
  )
  for model, other, jitted in _JITTED:
    if model is training.model and other == read:
      return jitted
  jitted = _jitted_step(training, setup, num_slots)
  _JITTED.append((training.model, read, jitted))
  return jitted


@pytest.fixture(scope='session')
def world(tmp_path_factory) -> World:
  folder = tmp_path_factory.mktemp('world')
  write_lines(folder / 'text.jsonl', [{'text': text} for text in TEXTS])
  write_lines(folder / 'questions.jsonl', QUESTIONS)
  path = folder / 'vocabulary.model'
  vocabulary = sentencepiece_vocabulary.train_sentencepiece(TEXTS, path, 40)
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    TEXTS, vocabulary, num_words=30, num_experts=NUM_EXPERTS, num_skipped=2
  )
  routing.save(folder / 'routing.npz')
  for name, source in (
    ('text', cache_task.TextFiles),
    ('questions', cache_task.QuestionFiles),
  ):
    cache_task.cache_task(
      folder / 'cache' / name,
      str(path),
      source(files=[str(folder / f'{name}.jsonl')]),
      num_workers=1,
    )
  return World(folder, vocabulary, routing)


def write_lines(path: pathlib.Path, records) -> None:
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
