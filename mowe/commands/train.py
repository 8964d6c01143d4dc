"""`mowe train`: pretraining and finetuning, from scratch, start or resume."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import numpy as np

from mowe.commands import data_config, evaluations, summary
from mowe.data import prefetch
from mowe.model_folders import initial_state, model_folder
from mowe.models import initialization, model_config
from mowe.models.families import costs, families, model_description
from mowe.stores import expert_stores
from mowe.training import (
  checkpointing,
  loop,
  partitioning,
  progress_lines,
  train_metrics,
  train_state,
  training_step,
)
from mowe.training.optimization import optimizers, row_optimizers
from mowe.words import base_vocabulary


@dataclasses.dataclass(frozen=True)
class SaveConfig:
  """When checkpoints are saved, and which are kept.

  Attributes:
    period: steps between two of them; the last step is saved always.
    keep_last: the newest ones that are kept; None: all.
    best_metric: the best one by this metric of an evaluation is kept besides,
      such as 'validation/em'.
    best_mode: 'max' or 'min'.
  """

  period: int = 1000
  keep_last: int | None = 3
  best_metric: str | None = None
  best_mode: str = 'max'


def train(
  *,
  model: model_config.ModelConfig,
  vocabulary: base_vocabulary.Vocabulary,
  data: data_config.DataConfig,
  model_dir: str,
  total_steps: int,
  optimizer: optimizers.Optimizer,
  row_optimizer: row_optimizers.RowOptimizer | None = None,
  loss: training_step.LossConfig = training_step.LossConfig(),
  freeze_experts: bool = False,
  initial_checkpoint_path: str | None = None,
  num_microbatches: int = 1,
  store: expert_stores.Store = expert_stores.DeviceStore(),
  make_mesh: Callable[[], jax.sharding.Mesh] = partitioning.make_mesh,
  eval_configs: Sequence[Any] = (),
  eval_period: int = 1000,
  save: SaveConfig = SaveConfig(),
  log_period: int = 100,
  seed: int = 0,
  tensorboard: bool = True,
  dry_run: bool = False,
  config_text: Callable[[], str] | None = None,
) -> train_state.TrainState | None:
  """Trains a model in `model_dir`, continuing what is there.

  The run starts from the latest checkpoint in `model_dir`; else from the
  parameters at `initial_checkpoint_path` (with a fresh optimizer and step 0);
  else from fresh parameters. Everything after is a function of the seeds and
  the step: an interrupted and resumed run ends with the same bits.

  Args:
    model: sizes and parts.
    vocabulary: the subword vocabulary.
    data: training examples.
    model_dir: where the run lives (see `model_folder`).
    total_steps: updates in all, those before a resume included.
    optimizer: the optimizer of the ordinary parameters.
    row_optimizer: the optimizer of the expert tables; it is needed if the model
      has tables and they are trained.
    loss: what is minimised.
    freeze_experts: the experts of every mixture stay as they are, those in
      expert tables and all others, and have no optimizer state. Routers are
      trained.
    initial_checkpoint_path: a model folder or a checkpoint in one.
    num_microbatches: gradient accumulation over parts of a batch.
    store: where word experts lie.
    make_mesh: gives the device mesh.
    eval_configs: evaluations, each with `prepare(model, vocabulary, loss)`.
    eval_period: steps between evaluations.
    save: when checkpoints are saved.
    log_period: steps between two lines of metrics.
    seed: the seed of fresh parameters and of dropout.
    tensorboard: also write TensorBoard events.
    dry_run: print what would be done, and stop.
    config_text: gives the text that is kept as `config.gin`.

  Returns:
    The last state, without tables if they are not on the device; None after a
    dry run.

  Raises:
    ValueError: parts that do not fit together, before anything is written or
      compiled.
    KeyboardInterrupt: it was stopped, and has saved what it did.
  """
  module = families.build(model)
  mesh = make_mesh()
  has_tables = bool(model_config.word_streams(model))
  row_optimizer = _check(
      model, vocabulary, data, mesh, num_microbatches,
      has_tables, row_optimizer, freeze_experts,
  )  # fmt: skip
  if initial_checkpoint_path is not None:
    model_folder.check_same_vocabularies(
      initial_checkpoint_path, model, vocabulary
    )
  if has_tables:
    store.check_mesh(mesh)
  if save.best_metric and not eval_configs:
    raise ValueError(
      'The best checkpoint needs an evaluation that gives its metric, but '
      f'best_metric is {save.best_metric!r} and eval_configs is empty. Add '
      'one, such as evaluations.QuestionEvaluation, or leave best_metric out.'
    )
  batches = data.open(vocabulary, model)
  router = evaluations.make_router(
    model,
    _trial_batches(batches, data.trial_steps),
    mesh.shape,
    num_microbatches,
  )
  if freeze_experts and _has_experts_beside_tables(module):
    optimizer = optimizers.Freeze(optimizer, costs.EXPERTS)
  setup = initial_state.Setup.make(
    module, optimizer, row_optimizer, mesh, seed, data.batch_size
  )
  summary.show(
    setup.abstract, data, batches, mesh, model, freeze_experts, optimizer
  )
  if has_tables:
    summary.show_experts(model.routing, router.seen_loads, mesh)
  if dry_run:
    return None

  folder = model_folder.create(model_dir, model, vocabulary)
  described = {
    'model': model_description.describe(model, vocabulary),
    'data': data.describe(vocabulary),
    'seed': seed,
    'freeze_experts': freeze_experts,
    'num_microbatches': num_microbatches,
  }
  with (
    checkpointing.Checkpoints(
      folder, save.keep_last, save.best_metric, save.best_mode
    ) as checkpoints,
    contextlib.ExitStack() as closing,
  ):
    state, experts = setup.start(
      checkpoints,
      described,
      initial_checkpoint_path,
      store,
      getattr(router, 'experts_at_once', 0),
    )
    # A checkpoint that is still being written needs the file of experts: it
    # must not be another run's before it is finished.
    closing.callback(experts.close)
    closing.callback(checkpoints.wait)
    first_step = int(state.step)
    # Not before: a refused resume leaves the folder as it was.
    if config_text is not None and jax.process_index() == 0:
      (folder / 'config.gin').write_text(config_text())
    writers = _open_writers(folder, first_step, tensorboard, closing)
    evaluate = _Evaluations(
      # On the mesh, experts stay on their devices, as in training.
      [
        partitioning.on_mesh(
          partitioning.on_mesh(one.prepare, mesh)(
            _with_layers(module, rows_from=experts.rows_from), vocabulary, loss
          ),
          mesh,
        )
        for one in eval_configs
      ],
      writers['eval'],
      experts,
    )

    def save_checkpoint(step, state):
      checkpoints.save(
        step,
        state.replace(tables={}, table_state={}),
        metrics=evaluate.of_step(step),
        metadata=described,
        attach=lambda path: experts.save(path, state),
      )

    # The best checkpoint must be one that was evaluated.
    save_period = eval_period if save.best_metric else save.period
    batch_sharding = partitioning.batch_sharding(mesh)
    stop = loop.StopSignal()
    prefetched = closing.enter_context(
      prefetch.Prefetcher(
        data_config.batch_maker(batches, first_step),
        first_step,
        total_steps,
        transform=router,
      )
    )
    train_step = training_step.make_train_step(
      _with_layers(module, num_slots=experts.num_slots),
      optimizer=setup.optimizer,
      row_optimizer=row_optimizer,
      loss=loss,
      seed=seed,
      num_microbatches=num_microbatches,
    )
    train_step = setup.jit(train_step)

    def whole_step(state, batch, fed):
      state, frozen, plan = experts.ready(state, fed)
      state, values = train_step(
        state,
        frozen,
        partitioning.put_batch(batch, batch_sharding),
        partitioning.put_plan(plan, mesh),
      )
      return state, values | experts.metrics()

    state = loop.run(
      state,
      train_step=whole_step,
      batches=experts.feed(prefetched),
      total_steps=total_steps,
      actions=[
        loop.Every(eval_period, evaluate, at_stop=False),
        loop.Every(save_period, save_checkpoint),
      ],
      writers=writers['train'],
      progress=progress_lines.Progress(total_steps, first_step, log_period),
      log_period=log_period,
      stop=stop,
    )
    checkpoints.wait()
    _check_finished(int(state.step), total_steps, folder, stop)
    return state.replace(tables=experts.tables(state))


def _has_experts_beside_tables(module) -> bool:
  params = initialization.abstract_variables(module)['params']
  return any(map(costs.is_expert, flax.traverse_util.flatten_dict(params)))


def _with_layers(module, **changes):
  """The model with what a run gives to its sparse layers."""
  if not any(changes.values()):
    return module
  return families.build(module.config.with_layer_changes(**changes))


def _open_writers(folder, first_step, tensorboard, closing):
  """Files of metrics of training and evaluation; process 0 writes them."""
  writers = {'train': [], 'eval': []}
  if jax.process_index() != 0:
    return writers
  for name, opened in writers.items():
    path = folder / f'{name}_metrics.jsonl'
    opened.append(train_metrics.JsonLinesWriter(path, first_step))
  if tensorboard:
    board = train_metrics.TensorBoardWriter(folder / 'tensorboard', first_step)
    for opened in writers.values():
      opened.append(board)
  for writer in {id(w): w for ws in writers.values() for w in ws}.values():
    closing.callback(writer.close)
  return writers


class _Evaluations:
  """Runs all evaluations, shows and writes their numbers."""

  def __init__(self, prepared, writers, experts):
    self._prepared = prepared
    self._writers = writers
    self._experts = experts
    self._latest: tuple[int, dict[str, float]] | None = None

  def __call__(self, step: int, state: train_state.TrainState) -> None:
    if not self._prepared:
      return
    values: dict[str, train_metrics.Value] = {}
    tables = self._experts.tables(state)
    for evaluation in self._prepared:
      values |= evaluation(state.params, tables)
    # What experts have each is for the writers alone.
    numbers = {k: v for k, v in values.items() if np.ndim(v) == 0}
    self._latest = step, numbers
    for writer in self._writers:
      writer.write(step, values)
    shown = '  '.join(
      f'{name} {value:.4g}'
      for name, value in numbers.items()
      if '/layers_' not in name
    )
    print(f'step {step}  {shown}', flush=True)

  def of_step(self, step: int) -> dict[str, float] | None:
    """The numbers of this very step, if it was evaluated."""
    if self._latest is None or self._latest[0] != step:
      return None
    return self._latest[1]


def _trial_batches(batches, number):
  make = data_config.batch_maker(batches, 0)
  return (make(step) for step in range(number))


def _check(
    model, vocabulary, data, mesh, num_microbatches,
    has_tables, row_optimizer, freeze_experts,
):  # fmt: skip
  """Refuses what cannot work; returns the row optimizer that is used."""
  if model.vocab_size < vocabulary.size:
    raise ValueError(
      'vocab_size must be at least the size of the subword vocabulary with '
      f'its sentinels, {vocabulary.size}, but is {model.vocab_size}. Set it '
      f'to {-(-vocabulary.size // 128) * 128}, the next multiple of 128.'
    )
  if model.routing is not None:
    model.routing.check_subwords(vocabulary)
  partitioning.check_batch_size(data.batch_size, mesh, num_microbatches)
  model.check_mesh(
    mesh.shape, data.batch_size // num_microbatches, data.task_feature_lengths
  )
  if not has_tables or freeze_experts:
    return None
  if row_optimizer is None:
    raise ValueError(
      'A model with word experts needs a row_optimizer for their table, but '
      'got None. Give one, such as RowAdafactor, or set freeze_experts.'
    )
  return row_optimizer


def _check_finished(step, total_steps, folder: pathlib.Path, stop) -> None:
  # Not a return: what comes after training in a script or a longer command
  # must not go on with a model that is half trained.
  if step < total_steps and stop.requested:
    raise KeyboardInterrupt(
      f'Stopped after step {step} of {total_steps}; saved in {folder}. '
      'Run the same command to continue.'
    )
  print(f'Finished step {step}; saved in {folder}.')
