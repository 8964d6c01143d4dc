"""`mowe train`: pretraining and finetuning, from scratch, start or resume."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from mowe.commands import data_config, evaluations, periodic_evaluation, summary
from mowe.data import batch_source, prefetch
from mowe.data.caches import cache_verification
from mowe.model_folders import initial_state, model_card, model_folder
from mowe.models import initialization, model_config, parameters, token_memories
from mowe.models.families import costs, families, model_description
from mowe.stores import expert_stores
from mowe.training import (
  checkpointing,
  loop,
  loss_spikes,
  manifests,
  partitioning,
  progress_lines,
  run_history,
  speed,
  train_metrics,
  train_state,
  training_step,
)
from mowe.training.optimization import optimizers, row_optimizers
from mowe.training.performance import step_profile
from mowe.training.processes import agreement
from mowe.words import (
  atomic_files,
  base_vocabulary,
  subword_vocabularies,
  writer_locks,
)
from mowe.words.plans import batch_router

# Under this name a checkpoint keeps the losses with which the next ones are
# compared.
_RECENT_LOSSES = 'recent_losses'
# The same for the evaluations of a run that ends when they no longer improve.
_IMPROVEMENT = 'improvement'


@dataclasses.dataclass(frozen=True)
class SaveConfig:
  """When checkpoints are saved, and which are kept.

  Attributes:
    period: number of steps between two checkpoints. The last step is always
      saved.
    keep_last: number of newest checkpoints that are kept; None keeps all.
    best_metric: name of a metric of an evaluation, such as 'validation/em'; the
      checkpoint that is best by it is kept as well.
    best_mode: 'max' or 'min', which value of the metric is best.
    patience: number of evaluations in a row, none of them better by
      `best_metric` than all before, after which the run ends early; None never
      ends it early.
  """

  period: int = 1000
  keep_last: int | None = 3
  best_metric: str | None = None
  best_mode: str = 'max'
  patience: int | None = None

  def __post_init__(self):
    if self.patience is None:
      return
    if self.patience < 1 or self.best_metric is None:
      raise ValueError(
        'patience must be a number of evaluations, at least 1, and needs a '
        f'best_metric to compare them by, but is {self.patience} with '
        f'best_metric {self.best_metric!r}. Correct it, or leave it out.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """Everything that a training run is made of.

  Attributes:
    model: sizes and parts of the model.
    vocabulary: the subword vocabulary.
    data: the training examples.
    model_dir: folder of the run (see `model_folder`); ~ is the home folder.
    total_steps: number of updates in all, those before a resume included.
    optimizer: the optimizer of the ordinary parameters.
    row_optimizer: the optimizer of the expert tables. It is needed if the model
      has tables and they are trained.
    loss: what is minimized.
    freeze_experts: whether the experts of every mixture stay as they are, both
      those in expert tables and all others; they then have no optimizer state.
      Routers are trained.
    initial_checkpoint_path: a model folder, or a checkpoint in one, whose
      parameters a new run starts from; None starts from fresh parameters.
    num_microbatches: number of parts of a batch whose gradients are summed
      before an update.
    store: where the tables of word experts lie.
    make_mesh: a function that returns the device mesh; it is called without
      arguments, or with `devices` where others than those of the machine are
      asked about.
    eval_configs: evaluations, each with a method
      `prepare(model, vocabulary, loss)` (see `evaluations`).
    eval_period: number of steps between two evaluations.
    save: when checkpoints are saved.
    log_period: number of steps between two lines of metrics.
    spikes: what is done when the loss of a batch rises suddenly.
    seed: the seed of fresh parameters and of dropout.
    boards: where metrics are shown besides the files of the run.
  """

  model: model_config.ModelConfig
  vocabulary: base_vocabulary.Vocabulary
  data: data_config.DataConfig
  model_dir: str
  total_steps: int
  optimizer: optimizers.Optimizer
  row_optimizer: row_optimizers.RowOptimizer | None = None
  loss: training_step.LossConfig = training_step.LossConfig()
  freeze_experts: bool = False
  initial_checkpoint_path: str | None = None
  num_microbatches: int = 1
  store: expert_stores.Store = expert_stores.DeviceStore()
  make_mesh: Callable[..., jax.sharding.Mesh] = partitioning.make_mesh
  eval_configs: Sequence[Any] = ()
  eval_period: int = 1000
  save: SaveConfig = SaveConfig()
  log_period: int = 100
  spikes: loss_spikes.SpikeConfig = loss_spikes.SpikeConfig()
  seed: int = 0
  boards: Sequence[train_metrics.Board] = (train_metrics.TensorBoard(),)

  def __post_init__(self):
    object.__setattr__(self, 'model_dir', os.path.expanduser(self.model_dir))

  @property
  def has_tables(self) -> bool:
    """Whether the model has tables of word experts or of memories."""
    return token_memories.has_tables(self.model)

  @property
  def rows_trained_by(self) -> row_optimizers.RowOptimizer | None:
    """The optimizer of expert tables; None if no table is trained."""
    if not self.has_tables or self.freeze_experts:
      return None
    return self.row_optimizer

  @property
  def rates(self) -> dict[str, row_optimizers.LearningRate]:
    """The learning rates by the names of their metrics."""
    rates = {}
    if self.optimizer.rate is not None:
      rates['learning_rate'] = self.optimizer.rate
    if self.rows_trained_by is not None:
      rates['row_learning_rate'] = self.rows_trained_by.learning_rate
    return rates

  def check(self, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the parts do not fit together on a mesh."""
    atomic_files.check_local(self.model_dir)
    for board in self.boards:
      board.check()
    model, vocabulary = self.model, self.vocabulary
    if model.vocab_size < vocabulary.size:
      raise ValueError(
        'vocab_size must be at least the size of the subword vocabulary with '
        f'its sentinels, {vocabulary.size}, but is {model.vocab_size}. Set it '
        f'to {subword_vocabularies.embedding_rows(vocabulary)}, or leave it to '
        'the gin files, which take it from the vocabulary.'
      )
    if model.routing is not None:
      model.routing.check_subwords(vocabulary)
    for address in token_memories.addresses(model).values():
      address.check_subwords(vocabulary)
    self.data.check_streams(model)
    batch_size = self.data.batch_size
    partitioning.check_batch_size(batch_size, mesh, self.num_microbatches)
    model.check_mesh(
      mesh.shape,
      batch_size // self.num_microbatches,
      self.data.task_feature_lengths,
    )
    if self.has_tables:
      self.store.check_mesh(mesh)
      if not self.freeze_experts and self.row_optimizer is None:
        raise ValueError(
          'A model with word experts or memories needs a row_optimizer for '
          'their tables, but got None. Give one, such as RowAdafactor, or set '
          'freeze_experts.'
        )
    if self.initial_checkpoint_path is not None:
      model_folder.check_same_vocabularies(
        self.initial_checkpoint_path, model, vocabulary
      )
      with checkpointing.Checkpoints(self.model_dir) as own:
        # A run that goes on does not read it any more.
        if own.latest_step() is None:
          model_folder.check_has_checkpoint(self.initial_checkpoint_path)
    if self.save.best_metric and not self.eval_configs:
      raise ValueError(
        'The best checkpoint needs an evaluation that gives its metric, but '
        f'best_metric is {self.save.best_metric!r} and eval_configs is empty. '
        'Add one, such as evaluations.QuestionEvaluation, or leave best_metric '
        'out.'
      )

  def describe(self) -> dict[str, Any]:
    """Returns what a resumed run must have as it was when it began."""
    return {
      'model': model_description.describe(self.model, self.vocabulary),
      'data': self.data.describe(self.vocabulary),
      'seed': self.seed,
      'freeze_experts': self.freeze_experts,
      'num_microbatches': self.num_microbatches,
    }


class Prepared(NamedTuple):
  """What a run needs before anything is written or allocated.

  Attributes:
    batches: the batches.
    router: plans batches on the host.
    setup: how the state is made, and where it lies.
  """

  batches: batch_source.BatchSource
  router: batch_router.RoutesBatches
  setup: initial_state.Setup

  @classmethod
  def make(cls, training: Training, mesh: jax.sharding.Mesh) -> 'Prepared':
    """Prepares a run on a mesh, on which the training has been checked."""
    model = training.model
    batches = training.data.open(training.vocabulary, model)
    router = evaluations.make_router(
      model,
      _trial_batches(batches, training.data.trial_steps),
      mesh.shape,
      training.num_microbatches,
    )
    module = families.build(model)
    setup = initial_state.Setup.make(
      module,
      _optimizer(training, module),
      training.rows_trained_by,
      mesh,
      training.seed,
      training.data.batch_size,
    )
    return cls(batches, router, setup)

  def cost(self, training: Training) -> costs.ModelCosts:
    """Returns the parameters and FLOPs of the model."""
    state = self.setup.abstract
    return costs.model_costs(
      training.model, parameters.merge_tables(state.params, state.tables)
    )

  def show(self, training: Training) -> None:
    """Prints what the run will be."""
    model, setup = training.model, self.setup
    summary.show(
      setup.abstract,
      training.data,
      self.batches,
      setup.mesh,
      model,
      training.freeze_experts,
      _optimizer(training, setup.model),
    )
    if model_config.word_streams(model) and model.expert_names is None:
      summary.show_experts(model.routing, self.router.seen_loads, setup.mesh)


@dataclasses.dataclass(frozen=True)
class BackTo:
  """Says from which checkpoint a run goes on.

  Later ones are set aside: renamed, so that they are not seen, and kept.

  Attributes:
    step: its step; None for the newest whose files are as they were written.
  """

  step: int | None = None


class CannotResumeError(manifests.DamagedCheckpointError):
  """The checkpoint from which a run was to go on is damaged."""


def train(
  training: Training,
  *,
  back_to: BackTo | None = None,
  config_text: Callable[[], str] | None = None,
  num_profiled: int = 0,
) -> train_state.TrainState:
  """Trains a model in `training.model_dir`, continuing what is there.

  The run starts from the latest checkpoint in `model_dir`; else from the
  parameters at `initial_checkpoint_path` (with a fresh optimizer and step 0);
  else from fresh parameters. Everything after is a function of the seeds and
  the step: an interrupted and resumed run ends with the same bits.

  Args:
    training: all parts and settings of the run.
    back_to: an older checkpoint to go on from, in place of the latest.
    config_text: a function that returns the text that is kept as `config.gin`
      in the folder; None keeps none.
    num_profiled: number of steps that JAX's profiler traces, for the folder
      `profile` in `model_dir`.

  Returns:
    The last state, without tables if they are not on the device.

  Raises:
    ValueError: parts do not fit together. It is raised before anything is
      written or compiled.
    CannotResumeError: the latest checkpoint is damaged; see `back_to`.
    LossSpikeError: the loss of a batch rose suddenly; see `Training.spikes`.
    KeyboardInterrupt: the run was stopped. It has saved what it did.
  """
  mesh = training.make_mesh()
  training.check(mesh)
  _check_processes(training, config_text)
  prepared = Prepared.make(training, mesh)
  prepared.show(training)
  # Of several processes of one run the first one holds the lock.
  is_first = jax.process_index() == 0
  lock = writer_locks.of_folder(training.model_dir)
  with (
    atomic_files.naming(training.model_dir),
    lock if is_first else contextlib.nullcontext(),
  ):
    return _run(training, prepared, back_to, config_text, num_profiled)


def _check_processes(
  training: Training, config_text: Callable[[], str] | None
) -> None:
  """Raises ProcessesDifferError unless all processes do the same run."""
  if jax.process_count() == 1:
    return
  made_by = run_history.origin()
  agreement.check_same(
    {
      'settings': '' if config_text is None else config_text(),
      'code': f'{made_by["version"]} {made_by["commit"]}',
      'data': json.dumps(training.describe(), sort_keys=True, default=str),
    }
  )


def _run(
  training: Training,
  prepared: Prepared,
  back_to: BackTo | None,
  config_text: Callable[[], str] | None,
  num_profiled: int,
) -> train_state.TrainState:
  """Starts or resumes the run, trains it to its end and saves it."""
  router, setup = prepared.router, prepared.setup
  folder = model_folder.create(
    training.model_dir, training.model, training.vocabulary
  )
  described = training.describe()
  save, total_steps = training.save, training.total_steps
  with (
    checkpointing.Checkpoints(
      folder, save.keep_last, save.best_metric, save.best_mode
    ) as checkpoints,
    contextlib.ExitStack() as closing,
  ):
    if back_to is not None:
      checkpoints.go_back(back_to.step)
    state, experts = _start(training, setup, router, checkpoints, described)
    # A checkpoint that is still being written reads the file of experts, so
    # another run must not get that file before the checkpoint is finished.
    closing.callback(experts.close)
    closing.callback(checkpoints.wait)
    first_step = int(state.step)
    writers = _open_writers(folder, first_step, training.boards, closing)
    # The text is written only now, because a resume that is refused must leave
    # the folder as it was.
    if jax.process_index() == 0:
      run_history.begin(folder, first_step, config_text and config_text())
    improvement = _improvement(save, checkpoints)
    evaluations_of_run = _prepared_evaluations(training, setup, experts)
    evaluate = periodic_evaluation.PeriodicEvaluation(
      evaluations_of_run, writers['eval'], experts, improvement
    )
    prefetched = closing.enter_context(
      prefetcher(prepared, first_step, total_steps)
    )
    verification = closing.enter_context(
      cache_verification.Verification(training.data.caches(training.vocabulary))
    )
    stop = loop.StopSignal()
    spikes = _spike_watch(training, checkpoints)
    train_step = TrainStep(training, setup, experts, spikes, first_step)
    train_step = _profiled(train_step, folder, num_profiled, closing)
    state = loop.run(
      state,
      train_step=train_step,
      batches=experts.feed(prefetched),
      total_steps=total_steps,
      actions=_actions(
        training,
        _SaveCheckpoint(
          checkpoints,
          experts,
          evaluate,
          verification,
          spikes,
          [*writers['train'], *writers['eval']],
          described,
          improvement,
        ),
      ),
      writers=writers['train'],
      progress=_progress(training, first_step),
      meter=speed.SpeedMeter(writers['speed'], _work(training, prepared)),
      log_period=training.log_period,
      stop=stop,
      spikes=spikes,
      is_enough=lambda: improvement is not None and improvement.is_over,
    )
    checkpoints.wait()
    _write_card(training, prepared, folder, int(state.step) > first_step)
    if improvement is not None and improvement.is_over:
      print(f'{improvement} The best step is {checkpoints.best_step()}.')
    _check_finished(int(state.step), total_steps, folder, stop)
    return state.replace(tables=experts.tables(state))


def _progress(training: Training, first_step: int) -> progress_lines.Progress:
  return progress_lines.Progress(
    training.total_steps, first_step, training.log_period
  )


def _actions(
  training: Training, save_checkpoint: '_SaveCheckpoint'
) -> list[loop.Every]:
  """What is done between steps: evaluating, and then saving."""
  evaluate, save = save_checkpoint.evaluate, training.save
  # The best checkpoint must be one that was evaluated.
  period = training.eval_period if save.best_metric else save.period
  return [
    loop.Every(training.eval_period, evaluate, at_stop=False),
    loop.Every(period, save_checkpoint),
  ]


def _write_card(training, prepared, folder, is_trained) -> None:
  """Writes the model card, if the run has made a step."""
  if is_trained and jax.process_index() == 0:
    model_card.write(folder, training.model, prepared.cost(training))


def prefetcher(
  prepared: Prepared, first_step: int, total_steps: int
) -> prefetch.Prefetcher:
  """Makes and plans the batches of coming steps ahead."""
  batches, mesh = prepared.batches, prepared.setup.mesh
  if isinstance(prepared.router, batch_router.NoRouter):
    # A plan has the words of all rows, so without one a process makes its own.
    batch_size = len(batches.first_batch['decoder_target_tokens'])
    batches = batches.of_rows(partitioning.own_rows(mesh, batch_size))
  return prefetch.Prefetcher(
    batches.batch_maker(first_step),
    first_step,
    total_steps,
    transform=prepared.router,
  )


def _profiled(train_step, folder, num_profiled, closing):
  """The step, of which some calls, or none, are traced for the run's folder."""
  if not num_profiled:
    return train_step
  traced = step_profile.ProfiledStep(
    train_step, folder / 'profile', num_profiled
  )
  closing.callback(traced.close)
  return traced


def _work(training: Training, prepared: Prepared) -> speed.Work | None:
  """What a step asks of the devices, as far as their speed is known."""
  setup, batch = prepared.setup, prepared.batches.first_batch
  return speed.Work.of_model(training.model, setup.abstract, batch, setup.mesh)


def _spike_watch(
  training: Training, checkpoints: checkpointing.Checkpoints
) -> loss_spikes.SpikeWatch:
  """Watches for spikes, with the losses that a resumed checkpoint has kept."""
  losses = ()
  if checkpoints.latest_step() is not None:
    losses = checkpoints.metadata().get(_RECENT_LOSSES, ())
  return loss_spikes.SpikeWatch(training.spikes, losses)


def _improvement(
  save: SaveConfig, checkpoints: checkpointing.Checkpoints
) -> periodic_evaluation.Improvement | None:
  """Watches whether evaluations get better, from what a checkpoint has kept."""
  if save.patience is None:
    return None
  improvement = periodic_evaluation.Improvement(
    save.best_metric, save.best_mode, save.patience
  )
  if checkpoints.latest_step() is not None:
    best = checkpoints.best_step()
    improvement.go_on(
      checkpoints.metadata().get(_IMPROVEMENT, {}),
      None if best is None else checkpoints.metrics(best)[save.best_metric],
    )
  return improvement


def _start(
  training: Training,
  setup: initial_state.Setup,
  router: batch_router.RoutesBatches,
  checkpoints: checkpointing.Checkpoints,
  described: dict[str, Any],
) -> tuple[train_state.TrainState, expert_stores.Experts]:
  """Makes or restores the state, and opens its tables."""
  is_resumed = checkpoints.latest_step() is not None
  try:
    return setup.start(
      checkpoints,
      described,
      training.initial_checkpoint_path,
      training.store,
      router.at_once,
    )
  except manifests.DamagedCheckpointError as error:
    # A damaged checkpoint of another model, from which a run starts, is none
    # that going back in this one could help.
    if not is_resumed:
      raise
    raise CannotResumeError(str(error)) from error


def jitted_step(
  training: Training, setup: initial_state.Setup, num_slots: int | None
) -> Callable[..., Any]:
  """Returns the jitted step of a run.

  Args:
    training: all parts and settings of the run.
    setup: how its state is made.
    num_slots: rows of the tables of word experts in the step; None if they have
      all experts, or there are none.

  Returns:
    A function (state, frozen tables, batch, plan, limit of the loss or None) ->
    (state, metrics); see `training_step.make_train_step`.
  """
  return setup.jit(
    training_step.make_train_step(
      _with_layers(setup.model, num_slots=num_slots),
      optimizer=setup.optimizer,
      row_optimizer=setup.row_optimizer,
      loss=training.loss,
      seed=training.seed,
      num_microbatches=training.num_microbatches,
      rates=training.rates,
    )
  )


class TrainStep:
  """One step of the whole run: experts are read, and the batch is put.

  Args:
    training: all parts and settings of the run.
    setup: how its state is made, and where it lies.
    experts: the opened tables of the run.
    spikes: knows from which loss on an update is left out.
    first_step: number of updates that were made before.

  Call: takes a state, a batch of the host, and what `experts.feed` made of its
  plan; returns the next state and the metrics.
  """

  def __init__(self, training, setup, experts, spikes, first_step):
    self._mesh = setup.mesh
    self._experts = experts
    self._spikes = spikes
    self._num_done = first_step
    self._batch_sharding = partitioning.batch_sharding(setup.mesh)
    self._step = jitted_step(training, setup, experts.num_slots)

  def __call__(self, state, batch, fed):
    state, frozen, plan = self._experts.ready(state, fed)
    self._num_done += 1
    limit = None
    if self._spikes.config.skips:
      limit = np.float32(self._spikes.limit(self._num_done))
    state, values = self._step(
      state,
      frozen,
      partitioning.put_batch(batch, self._batch_sharding),
      partitioning.put_plan(plan, self._mesh),
      limit,
    )
    return state, values | self._experts.metrics()


@dataclasses.dataclass(frozen=True)
class _SaveCheckpoint:
  """Saves the state of a step with its experts and its evaluation."""

  checkpoints: checkpointing.Checkpoints
  experts: expert_stores.Experts
  evaluate: periodic_evaluation.PeriodicEvaluation
  verification: cache_verification.Verification
  spikes: loss_spikes.SpikeWatch
  writers: Sequence[train_metrics.Writer]
  described: dict[str, Any]
  improvement: periodic_evaluation.Improvement | None

  def __call__(self, step, state):
    # Nothing is kept of a run on damaged data.
    self.verification.wait()
    # A checkpoint on the disk must not be newer than the metrics there.
    for writer in self.writers:
      writer.flush()
    self.checkpoints.save(
      step,
      state.replace(tables={}, table_state={}),
      metrics=self.evaluate.of_step(step),
      metadata=self.described
      | {
        'origin': {'time': run_history.now(), **run_history.origin()},
        _RECENT_LOSSES: self.spikes.recent(),
      }
      | ({_IMPROVEMENT: self.improvement.kept()} if self.improvement else {}),
      attach=lambda path: self.experts.save(path, state),
    )


def _prepared_evaluations(training, setup, experts):
  """Prepares all evaluations; they and their calls run on the mesh.

  Experts stay on their devices in an evaluation, as they do in training.
  """
  module = _with_layers(setup.model, rows_from=experts.rows_from)
  return [
    partitioning.on_mesh(
      partitioning.on_mesh(one.prepare, setup.mesh)(
        module, training.vocabulary, training.loss
      ),
      setup.mesh,
    )
    for one in training.eval_configs
  ]


def _optimizer(training, module) -> optimizers.Optimizer:
  """The optimizer of ordinary parameters, without experts that are frozen."""
  if training.freeze_experts and _has_experts_beside_tables(module):
    return optimizers.Freeze(training.optimizer, costs.EXPERTS)
  return training.optimizer


def _has_experts_beside_tables(module) -> bool:
  params = initialization.abstract_variables(module)['params']
  return any(map(costs.is_expert, flax.traverse_util.flatten_dict(params)))


def _with_layers(module, **changes):
  """Returns the model with what a run gives to its sparse layers."""
  if not any(changes.values()):
    return module
  return families.build(module.config.with_layer_changes(**changes))


def _open_writers(folder, first_step, boards, closing):
  """Opens the files of metrics of training, evaluation and speed on process 0."""
  writers = {'train': [], 'eval': [], 'speed': []}
  if jax.process_index() != 0:
    return writers
  for name, opened in writers.items():
    path = folder / f'{name}_metrics.jsonl'
    opened.append(train_metrics.JsonLinesWriter(path, first_step))
  for board in boards:
    one = board.open(folder, first_step)
    for opened in writers.values():
      opened.append(one)
  for writer in {id(w): w for ws in writers.values() for w in ws}.values():
    closing.callback(writer.close)
  return writers


def _trial_batches(batches, number):
  make = batches.batch_maker(0)
  return (make(step) for step in range(number))


def _check_finished(step, total_steps, folder: pathlib.Path, stop) -> None:
  # A stopped run raises and does not return, because what comes after training
  # in a script or in a longer command must not go on with a model that is half
  # trained.
  if step < total_steps and stop.requested:
    raise KeyboardInterrupt(
      f'Stopped after step {step} of {total_steps}; saved in {folder}. '
      'Run the same command to continue.'
    )
  print(f'Finished step {step}; saved in {folder}.')
