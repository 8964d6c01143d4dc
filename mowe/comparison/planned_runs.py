"""Plans the runs of an experiment: their sizes, gin bindings and folders.

A run is one model with one seed and one try of its learning rates. All that its
process needs to know is in a `Run`, which is written to a file; the process
parses the gin files itself.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from mowe.commands import data_config
from mowe.commands.gin_files import gin_config
from mowe.comparison import experiment_data, experiments, model_sizes
from mowe.data.caches import token_cache
from mowe.evaluation import task_evaluation
from mowe.model_folders import model_folder
from mowe.models import token_memories
from mowe.models.surgery import silenced
from mowe.training import checkpointing, manifests
from mowe.words import base_vocabulary

Model = experiments.Model
Experiment = experiments.Experiment


@dataclasses.dataclass(frozen=True)
class PlannedStage:
  """One run of `mowe train`.

  Attributes:
    name: name of the stage.
    folder: the model folder that it writes, MODEL_DIR.
    gin_files: paths of its gin files, in order.
    bindings: gin bindings that are read after them, in order, with all macros.
    settings: what identifies the run, as JSON values: all values that gin gives
      it but for paths, and the fingerprints of its data.
  """

  name: str
  folder: str
  gin_files: tuple[str, ...]
  bindings: tuple[str, ...]
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """One model with one seed and one try.

  Attributes:
    name: name of the model.
    seed: seed of parameters, data and dropout.
    rates: name and value of each learning rate of this try; () if none are
      tried.
    folder: folder where measurements are written.
    stages: stages of training; () if the model is from elsewhere.
    reading: stages whose gin files and bindings say how text and questions are
      read, also for a model from elsewhere.
    pretrained: model folder on which losses and recall are measured; None
      measures neither.
    finetuned: model folder of the model that is asked.
    questions: names of the token caches of all questions that are asked, both
      those by which rates are chosen and those that are reported.
    metric: name of the metric in `text_metrics.METRICS`; None takes the metric
      of each cache.
    has_held_out: whether there is held-out text.
    num_points: how often the loss on held-out text is measured in a stage of
      pretraining.
    num_recalled: number of examples whose masked spans are to be recalled.
    knock_out: whether the model is measured without its memories, too.
    fingerprints: fingerprints of the questions and of held-out text, and
      digests of the checkpoints of a model from elsewhere.
  """

  name: str
  seed: int
  rates: tuple[tuple[str, float], ...]
  folder: str
  stages: tuple[PlannedStage, ...]
  reading: tuple[PlannedStage, ...]
  pretrained: str | None
  finetuned: str
  questions: tuple[str, ...]
  metric: str | None
  has_held_out: bool
  num_points: int
  num_recalled: int
  knock_out: bool
  fingerprints: tuple[str, ...]

  def to_json(self) -> str:
    """Returns the whole run as text."""
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'

  @classmethod
  def from_json(cls, text: str) -> 'Run':
    """Returns the run that `to_json` wrote."""
    fields = json.loads(text)
    for name in ('stages', 'reading'):
      fields[name] = tuple(
        PlannedStage(**_with_tuples(stage)) for stage in fields[name]
      )
    fields['rates'] = tuple((name, value) for name, value in fields['rates'])
    return cls(**_with_tuples(fields))

  def digest(self) -> str:
    """Returns a digest of all that its measurements depend on, paths aside."""
    fields = dataclasses.asdict(self)
    settings = [stage.settings for stage in self.stages or self.reading]
    names = ['seed', 'questions', 'metric', 'num_recalled', 'fingerprints']
    # What a knock-out adds changes nothing else that was measured.
    names += ['knock_out'] * self.knock_out
    text = json.dumps([settings, {name: fields[name] for name in names}])
    return hashlib.sha256(text.encode()).hexdigest()


class Plan:
  """The sizes and the runs of an experiment.

  Args:
    experiment: the experiment that is planned.
    prepared: its data.

  Attributes:
    sized: a model_sizes.SizedModel for each model, in their order.
    tries: for each model, by its name, one run with the first seed for each
      try; a single run if no learning rates are tried.

  Raises:
    ValueError: a budget cannot be met, or a model from elsewhere has another
      vocabulary or no checkpoint. Nothing has been trained then.
  """

  def __init__(
    self, experiment: Experiment, prepared: experiment_data.Prepared
  ):
    self._experiment = experiment
    self._prepared = prepared
    self._folders: dict[str, str] = {}
    self._sizes = model_sizes.Sizes(experiment, prepared)
    self._vocabulary = self._sizes.vocabulary
    self._asked: list[str] | None = None
    self.sized = self._sizes.all
    self.tries = {
      one.model.name: [
        self._run(one, experiment.seeds[0], number)
        for number in range(self._sizes.num_tries(one.model))
      ]
      for one in self.sized
    }
    for of_model in self.tries.values():
      for stage in of_model[0].reading:
        self._check_stage(stage)

  def runs(self, name: str, number: int = 0) -> list[Run]:
    """Returns the runs of a model with all seeds.

    Args:
      name: name of the model.
      number: number of the try whose learning rates the runs have.
    """
    sized = next(one for one in self.sized if one.model.name == name)
    others = self._sizes.seeds_of(sized.model)[1:]
    return [
      self.tries[name][number],
      *(self._run(sized, seed, number) for seed in others),
    ]

  def num_runs(self, name: str) -> int:
    """Returns how many runs a model has: its tries, and one per other seed."""
    sized = next(one for one in self.sized if one.model.name == name)
    return self._sizes.num_runs(sized.model)

  def _rates(
    self, sized: model_sizes.SizedModel, number: int
  ) -> tuple[tuple[str, float], ...]:
    tuning = self._experiment.tuning
    if tuning is None or sized.model.folder is not None:
      return ()
    rates = (('LEARNING_RATE', tuning.rates[number]),)
    if token_memories.has_tables(sized.config):
      rates += (('ROW_LEARNING_RATE', tuning.row_rates[number]),)
    return rates

  def _run(self, sized: model_sizes.SizedModel, seed: int, number: int) -> Run:
    model, experiment = sized.model, self._experiment
    rates = self._rates(sized, number)
    name = '_'.join(
      (
        experiments.folder_name(model.name),
        *(f'{_SHORT[macro]}{rate:g}' for macro, rate in rates),
        f'seed{seed}',
      )
    )
    folder = pathlib.Path(experiment.output) / 'runs' / name
    stages = self._stages(sized, seed, folder, rates)
    if model.folder is None:
      pretrained, finetuned = (stage.folder for stage in stages[-2:])
    else:
      finetuned = model.folder.format(seed=seed)
      pretrained = model.pretrained_folder
      pretrained = pretrained and pretrained.format(seed=seed)
    return Run(
      name=model.name,
      seed=seed,
      rates=rates,
      folder=str(folder),
      stages=stages if model.folder is None else (),
      reading=stages,
      pretrained=pretrained,
      finetuned=finetuned,
      questions=self._questions(),
      metric=experiment.metric and experiment.metric.__name__,
      has_held_out=self._prepared.has_held_out,
      num_points=experiment.num_points,
      num_recalled=experiment.num_recalled,
      knock_out=experiment.knock_out and silenced.can_be_silenced(sized.config),
      fingerprints=(
        *self._fingerprints(stages[-1]),
        *(() if model.folder is None else _manifests(pretrained, finetuned)),
      ),
    )

  def _questions(self) -> tuple[str, ...]:
    tuning = self._experiment.tuning
    choosing = tuning.questions if tuning else ()
    return (*choosing, *self._experiment.questions)

  def _stages(self, sized, seed, folder, rates) -> tuple[PlannedStage, ...]:
    model, planned, before = sized.model, [], None
    is_elsewhere = model.folder is not None
    reader = self._reader(model)
    bindings = self._sizes.bindings(reader) if is_elsewhere else sized.bindings
    tuning = self._experiment.tuning
    for stage in model.stages:
      tried = ()
      if tuning and stage.name == tuning.stage:
        tried = tuple(f'{macro} = {rate!r}' for macro, rate in rates)
      own = (*bindings, *stage.bindings, *tried, f'RANDOM_SEED = {seed}')
      files = (*reader.gin_files, *stage.gin_files)
      settings = self._settings(files, own, bool(planned)) | {
        'words': model.words and dataclasses.asdict(model.words),
        'num_points': self._experiment.num_points,
        'before': before and before.settings,
      }
      settings = json.loads(json.dumps(settings))
      place = str(folder / stage.name)
      if not is_elsewhere:
        # Models whose stages begin alike share the runs of the first of them.
        place = self._folders.setdefault(json.dumps(settings), place)
      paths = [f'MODEL_DIR = {place!r}']
      if before is not None:
        paths.append(f'INITIAL_CHECKPOINT_PATH = {before.folder!r}')
      before = PlannedStage(stage.name, place, files, (*own, *paths), settings)
      planned.append(before)
    return tuple(planned)

  def _settings(self, files, bindings, is_later) -> dict[str, Any]:
    """Returns all values that gin gives a stage but for paths, and its data."""
    paths = ["MODEL_DIR = ''"]
    if is_later:
      paths.append("INITIAL_CHECKPOINT_PATH = ''")
    gin_config.parse(files, (*bindings, *paths))
    data = gin_config.call(data_config.DataConfig)
    names = data.mixture_or_task_name
    names = [names] if isinstance(names, str) else list(names)
    if data.use_cached_tasks:
      names = [
        data.open_cache(name, self._vocabulary).fingerprint for name in names
      ]
    return {
      'values': [
        line for line in gin_config.given_values() if not _is_path(line)
      ],
      'data': names,
    }

  def _fingerprints(self, stage: PlannedStage) -> list[str]:
    """Checks questions; returns fingerprints of them and of held-out text."""
    if self._asked is None:
      gin_config.parse(stage.gin_files, stage.bindings)
      data = gin_config.call(data_config.DataConfig)
      names = list(self._questions())
      num_asked = len(names)
      if self._prepared.has_held_out:
        names.append(experiment_data.HELD_OUT)
      caches = [data.open_cache(name, self._vocabulary) for name in names]
      for cache in caches[:num_asked]:
        _check_questions(cache, self._vocabulary)
      self._asked = [cache.fingerprint for cache in caches]
    return self._asked

  def _reader(self, model: Model) -> Model:
    """Returns the model whose gin files say how data are read for a model."""
    if model.folder is None or model.gin_files:
      return model
    return next(one for one in self._experiment.models if one.gin_files)

  def _check_stage(self, stage: PlannedStage) -> None:
    """Makes all parts of a stage, to fail before anything is trained."""
    gin_config.parse(stage.gin_files, stage.bindings)
    if gin_config.has_macro('EVAL_TASK_NAME'):
      task = gin_config.made('EVAL_TASK_NAME')
      if task in self._experiment.questions:
        raise ValueError(
          'No stage of training may choose its checkpoint by questions that '
          f'are reported, but EVAL_TASK_NAME of {stage.name} is {task!r}. Name '
          f'others, such as {experiment_data.CHOOSING!r}.'
        )
    for name in ('MODEL', 'OPTIMIZER', 'ROW_OPTIMIZER'):
      gin_config.made(name)


# How the macros of learning rates are written in the names of folders.
_SHORT = {'LEARNING_RATE': 'rate', 'ROW_LEARNING_RATE': 'rows'}


def _is_path(line: str) -> bool:
  name = line.partition(' = ')[0]
  return name in (
    'VOCABULARY_PATH',
    'CACHE_DIR',
    'ROUTING_VOCABULARY',
    'MODEL_DIR',
    'INITIAL_CHECKPOINT_PATH',
  )


def _check_questions(
  cache: token_cache.TokenCache, vocabulary: base_vocabulary.Vocabulary
) -> None:
  """Raises ValueError for questions that cannot be asked or reported."""
  if 'inputs' not in cache.features:
    raise ValueError(
      'The questions of an experiment must be a token cache of questions, '
      f'but {cache.path} is of kind {cache.kind!r}. Build it with '
      '`mowe cache-task --kind questions`.'
    )
  records = task_evaluation.read_records(cache, vocabulary)
  if not task_evaluation.are_public(records):
    raise ValueError(
      'The answers to the questions of an experiment must be public, but '
      f"{cache.path} has '<unk>' in their place. Take the validation split."
    )
  for number, record in enumerate(records):
    for name in ('relation', 'entity'):
      if not isinstance(record.get(name), str | None):
        raise ValueError(
          f"The field '{name}' of a question must be a text, but that of "
          f'number {number} in {cache.path} is {record[name]!r}. Correct the '
          'file, and build the cache again.'
        )


def _manifests(*paths: str | None) -> list[str]:
  """Returns a digest of all files of each checkpoint, by its manifest."""
  found = []
  for path in filter(None, paths):
    folder, step = model_folder.split_checkpoint_path(path)
    with checkpointing.Checkpoints(folder) as checkpoints:
      manifest = checkpoints.finished(step) / manifests.FILE_NAME
    found.append(hashlib.sha256(manifest.read_bytes()).hexdigest())
  return found


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
  """Makes tuples of lists, because JSON has no tuples."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.items()
  }
