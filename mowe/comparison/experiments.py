"""An experiment: models, the data that they share, and what they are asked.

An experiment is a gin file that configures `Experiment`. It names other gin
files, those of models and of stages of training, which are read later, one run
at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mowe.commands.gin_files import gin_config
from mowe.comparison import budgets, experiment_data
from mowe.evaluation import text_metrics


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of `mowe train`; each stage starts from the one before it.

  Attributes:
    name: name of the stage and of its folder, such as 'pretrained'.
    gin_files: gin files that are read after those of the model. The first stage
      reads a file such as world_pretrain.gin, later stages a file that takes
      INITIAL_CHECKPOINT_PATH.
    bindings: gin bindings that are read last, such as 'TRAIN_STEPS = 100'.
  """

  name: str
  gin_files: tuple[str, ...]
  bindings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
  """A model of an experiment, and how it is trained.

  The last stage is finetuning on questions, and the stages before it are
  pretraining. Models that begin with the same stages share their runs.

  Attributes:
    name: name of the model in the report and, in lower case, of its folder.
    gin_files: gin files of the model alone, such as
      gin_configs/models/mowe_tiny.gin.
    stages: stages of training, in order.
    bindings: gin bindings that are read after all gin files, such as
      'NUM_EXPERTS = 64'.
    words: the routing vocabulary of its word experts; None for other models.
    width: the gin name that sizes the model, such as 'EXPERT_DIM' or
      'mowe.models.t5.t5_config.T5Config.mlp_dim'; None leaves the model as its
      files make it.
    granule: the width is a multiple of this number.
    budget: what the model is made equal to by its width; None leaves the width
      as it is.
    folder: a finetuned model from elsewhere, which is not trained here;
      '{seed}' in it is replaced. None for a model that is trained here.
    pretrained_folder: the model of `folder` before it was finetuned; None if it
      is not at hand, and the report then has neither losses nor recall of it.
    cell: where the model stands in a grid of memories: what names its rows and
      what they hold, such as ('word', 'expert'); None for other models.
  """

  name: str
  gin_files: tuple[str, ...] = ()
  stages: tuple[Stage, ...] = ()
  bindings: tuple[str, ...] = ()
  words: experiment_data.Words | None = None
  width: str | None = None
  granule: int = 8
  budget: budgets.Budget | None = None
  folder: str | None = None
  pretrained_folder: str | None = None
  cell: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Tuning:
  """Learning rates that are tried, equally many for every model.

  Try number i trains a model with the first seed, with `rates[i]` and, if it
  has word experts or memories, with `row_rates[i]`. Each model therefore has the same
  number of tries, however many rates it has. The try with the best exact match
  on `questions` is trained with the other seeds, too, and is reported.

  Attributes:
    rates: for each try the learning rate of ordinary parameters, the macro
      LEARNING_RATE.
    row_rates: for each try the learning rate of the rows of tables, the macro
      ROW_LEARNING_RATE.
    stage: name of the stage of training that has these rates.
    questions: names of token caches with the questions that choose between the
      tries. The report does not show these questions.

  Raises:
    ValueError: there are no rates, or not equally many of both kinds, or no
      questions.
  """

  rates: tuple[float, ...]
  row_rates: tuple[float, ...]
  stage: str
  questions: tuple[str, ...] = ('qa_choosing',)

  def __post_init__(self):
    if not self.rates or len(self.rates) != len(self.row_rates):
      raise ValueError(
        'Tuning needs one rate and one row rate for each try, but has rates '
        f'{self.rates} and row_rates {self.row_rates}. Give both as many '
        'numbers.'
      )
    if min(*self.rates, *self.row_rates) <= 0:
      raise ValueError(
        'Learning rates must be positive, but Tuning has rates '
        f'{self.rates} and row_rates {self.row_rates}. Change them.'
      )
    if not self.questions:
      raise ValueError(
        'Tuning needs questions by which it can choose, but questions is (). '
        "Name a token cache, such as ('qa_choosing',)."
      )


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Models that are compared, all on the same data and questions.

  Attributes:
    title: title of the report.
    models: the models, in the order in which they are shown. The first one is
      the baseline of the paired tests.
    data: the source of text, questions and vocabulary.
    output: folder where everything is written. Experiments on the same data may
      share an output; a model that is in both is trained once.
    seeds: seeds with each of which every model is run once.
    questions: names of token caches with the questions that the report is
      about. No stage of training may choose its best checkpoint by them.
    tuning: how the learning rates of each model are chosen; None leaves the
      rates of the gin files.
    metric: `text_metrics.squad` or `text_metrics.trivia_qa`; None takes the
      metric of each cache of questions.
    num_points: how often the loss on held-out text is measured in a stage of
      pretraining.
    num_recalled: number of pretraining examples whose masked spans are to be
      recalled.
    num_bins: number of groups of questions by the frequency of their entities.
    knock_out: whether every model with memories or sparse layers is measured
      without them, too.
    report: name of the report's folder within the output.

  Raises:
    ValueError: a setting cannot work. Nothing has been made then.
  """

  title: str
  models: Sequence[Model]
  data: experiment_data.Data
  output: str
  seeds: tuple[int, ...] = (0,)
  questions: tuple[str, ...] = ('qa_reported',)
  tuning: Tuning | None = None
  metric: Callable[..., dict[str, float]] | None = None
  num_points: int = 10
  num_recalled: int = 1024
  num_bins: int = 4
  knock_out: bool = False
  report: str = 'report'

  def __post_init__(self):
    names = [model.name for model in self.models]
    if not names or len({folder_name(name) for name in names}) < len(names):
      raise ValueError(
        'An experiment needs models whose names differ in letters or digits, '
        f'but they are {names}. Name each model once.'
      )
    if not self.seeds or len(set(self.seeds)) < len(self.seeds):
      raise ValueError(
        f'seeds must be different numbers, but are {self.seeds}. Give one or '
        'more, such as (0, 1).'
      )
    if not self.questions:
      raise ValueError(
        'An experiment needs questions to ask, but questions is (). Name a '
        "token cache, such as ('qa_reported',)."
      )
    both = set(self.questions) & set(
      self.tuning.questions if self.tuning else ()
    )
    if both:
      raise ValueError(
        'Questions by which learning rates are chosen must not be reported, '
        f'but {sorted(both)} are in Experiment.questions and in '
        'Tuning.questions. Leave them out of one of the two.'
      )
    metric = getattr(self.metric, '__name__', '')
    if self.metric is not None and metric not in text_metrics.METRICS:
      raise ValueError(
        'metric must be a function of mowe.evaluation.text_metrics, which each '
        f'run finds by its name, but is {self.metric!r}. Take text_metrics.'
        'squad or text_metrics.trivia_qa.'
      )
    if min(self.num_points, self.num_recalled, self.num_bins) < 1:
      raise ValueError(
        'num_points, num_recalled and num_bins must be at least 1, but are '
        f'{self.num_points}, {self.num_recalled} and {self.num_bins}. Change '
        'them.'
      )
    if self.report in ('', '.', '..', 'data', 'runs') or '/' in self.report:
      raise ValueError(
        'report must be the name of a folder beside data and runs, but is '
        f"{self.report!r}. Name it, for example 'report'."
      )
    if not any(model.gin_files for model in self.models):
      raise ValueError(
        'At least one model of an experiment must have gin files, which say '
        'how text and questions are read, but none has. Set gin_files of a '
        'model, also if it is in a folder already.'
      )
    for model in self.models:
      _check(model, names)
      stages = [stage.name for stage in model.stages]
      if self.tuning is not None and self.tuning.stage not in stages:
        raise ValueError(
          'Tuning.stage must be a stage of every model, but is '
          f'{self.tuning.stage!r}, and {model.name} has {stages}. Name one of '
          'these.'
        )


def load(
  files: Sequence[str], bindings: Sequence[str] = (), paths: Sequence[str] = ()
) -> Experiment:
  """Reads an experiment from gin files.

  Args:
    files: paths of the gin files, in order.
    bindings: gin bindings that are read after them, such as
      "OUTPUT = 'elsewhere'".
    paths: further folders in which gin files are looked up.

  Raises:
    GinError: a file is no gin file, or none of them configures an experiment.
  """
  gin_config.parse(files, bindings, paths)
  if not gin_config.configures(Experiment):
    raise gin_config.GinError(
      'The file of an experiment must configure experiments.Experiment, '
      f'but {list(files)} does not. Take one of gin_configs/experiments/ as a '
      'model.'
    )
  return gin_config.call(Experiment)


def with_folder(experiment: Experiment, added: str) -> Experiment:
  """Returns the experiment with a finetuned model from elsewhere added.

  Args:
    experiment: the experiment that the model is added to.
    added: the name and the folder of the model, as NAME=FOLDER.

  Raises:
    ValueError: `added` does not have this form.
  """
  name, equals, folder = added.partition('=')
  if not (name and equals and folder):
    raise ValueError(
      f'A model from elsewhere must be NAME=FOLDER, but is {added!r}. Write '
      'for example --add mine=runs/mine_finetuned.'
    )
  model = Model(name, stages=experiment.models[0].stages, folder=folder)
  return dataclasses.replace(experiment, models=(*experiment.models, model))


def folder_name(name: str) -> str:
  """Returns the name of a model as the name of a folder."""
  return ''.join(c if c.isalnum() else '_' for c in name.lower())


def _check(model: Model, names: Sequence[str]) -> None:
  if len(model.stages) < 2:
    raise ValueError(
      'A model needs stages, at least one of pretraining and finetuning in '
      f'the end, but {model.name} has {len(model.stages)}. Set '
      'experiments.Model.stages for all models.'
    )
  stages = [stage.name for stage in model.stages]
  if len(set(stages)) < len(stages):
    raise ValueError(
      f'The stages of a model must have different names, but {model.name} has '
      f'{stages}. Name each once.'
    )
  if model.folder is None and not model.gin_files:
    raise ValueError(
      f'A model needs gin files, or a folder in which it is, but {model.name} '
      'has neither. Set gin_files, such as '
      "('gin_configs/models/t5_tiny.gin',)."
    )
  if model.budget is None:
    return
  if model.budget.base not in names:
    raise ValueError(
      f'The base of a budget must be a model of the experiment, but that of '
      f'{model.name} is {model.budget.base!r} and the models are {names}. Name '
      'one of these.'
    )
  # The base itself is left as it is, so that all models may have one budget.
  if model.budget.base != model.name and model.width is None:
    raise ValueError(
      f'A model with a budget needs a width that can be changed, but that of '
      f"{model.name} is None. Set width, such as 'EXPERT_DIM'."
    )
