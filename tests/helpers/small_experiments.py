"""A tiny experiment on the text and the questions of small_runs.World."""

import small_runs

from mowe.comparison import budgets, experiment_data, experiments

_OPTIMIZER = 'gin_configs/optimizers/adamw.gin'
SIZES = tuple(
  f'mowe.models.t5.t5_config.T5Config.{name} = {value!r}'
  for name, value in {
    'emb_dim': 12,
    'num_heads': 2,
    'head_dim': 5,
    'mlp_dim': 14,
    'num_encoder_layers': 1,
    'num_decoder_layers': 1,
  }.items()
)
_SPARSE = (
  'mowe.models.t5.t5_config.T5Config.sparse_encoder_layers = (0,)',
  'mowe.models.t5.t5_config.T5Config.sparse_decoder_layers = (0,)',
)
WORDS = experiment_data.Words(16, num_words=30, num_skipped=2)


def stages(steps=4, finetune_steps=2, **changes):
  """Stages that pretrain on the text, and finetune on the same questions."""
  lengths = f'TASK_FEATURE_LENGTHS = {small_runs.LENGTHS}'
  common = {'BATCH_SIZE': 8, 'WARMUP_STEPS': 1, 'LOG_PERIOD': 1, **changes}
  common = (lengths, *(f'{k} = {v!r}' for k, v in common.items()))
  make = lambda name, run, task, steps: experiments.Stage(
    name,
    (_OPTIMIZER, f'gin_configs/runs/{run}.gin'),
    (
      *common,
      f'MIXTURE_OR_TASK_NAME = {task!r}',
      f'TRAIN_STEPS = {steps}',
    ),
  )
  return (
    make('pretrained', 'pretrain', 'text', steps),
    make('finetuned', 'finetune', 'questions', finetune_steps),
  )


def dense(name='T5', **changes):
  """A dense model; `changes` replaces its fields."""
  fields = {
    'gin_files': ('gin_configs/models/t5_tiny.gin',),
    'bindings': SIZES,
    'stages': stages(),
  }
  return experiments.Model(name, **(fields | changes))


def words(name='MoWE', **changes):
  """A model of word experts with the FLOPs of the dense model."""
  fields = {
    'gin_files': ('gin_configs/models/mowe_tiny.gin',),
    'bindings': (*SIZES, *_SPARSE),
    'words': WORDS,
    'width': 'EXPERT_DIM',
    'granule': 1,
    'budget': budgets.EqualFlops('T5'),
  }
  return dense(name, **(fields | changes))


def experiment(world, folder, models=None, **changes):
  """An experiment in a folder; without `models` it has the two above."""
  fields = {
    'title': 'Tiny',
    'models': (dense(), words()) if models is None else models,
    'data': experiment_data.Caches(
      world.cache_dir,
      world.vocabulary_path,
      documents=(str(world.folder / 'text.jsonl'),),
    ),
    'output': str(folder),
    'questions': ('questions',),
    'num_recalled': 8,
    'num_points': 2,
  }
  return experiments.Experiment(**(fields | changes))
