"""Sizes the models of an experiment by their budgets.

Only shapes count here: data that are a stand-in of the same sizes will do.
"""

import dataclasses
from typing import Any

from mowe.commands.gin_files import gin_config
from mowe.comparison import budgets, experiment_data, experiments
from mowe.model_folders import model_folder
from mowe.models import model_config
from mowe.models.families import costs
from mowe.training import checkpointing
from mowe.words import subword_vocabularies

Model = experiments.Model
Experiment = experiments.Experiment


@dataclasses.dataclass(frozen=True)
class SizedModel:
  """A model with the width that was found for it.

  Attributes:
    model: the model as the experiment has it.
    bindings: gin bindings of the model, with its width.
    config: the config of the model with this width.
    cost: costs of the model.
    note: which width was chosen, and how far the cost is from the target; '' if
      nothing was chosen.
  """

  model: Model
  bindings: tuple[str, ...]
  config: model_config.ModelConfig
  cost: costs.ModelCosts
  note: str


class Sizes:
  """The models of an experiment with the widths of their budgets.

  Args:
    experiment: the experiment.
    prepared: its data, or a stand-in of them.

  Attributes:
    all: a SizedModel for each model, in their order.
    vocabulary: the subword vocabulary.

  Raises:
    ValueError: a budget cannot be met, or a model from elsewhere has another
      vocabulary or no checkpoint.
  """

  def __init__(
    self, experiment: Experiment, prepared: experiment_data.Prepared
  ):
    self._experiment = experiment
    self._prepared = prepared
    self._sized: dict[str, SizedModel] = {}
    self.vocabulary = subword_vocabularies.load_subwords(prepared.vocabulary)
    self.all = [self._size(model, ()) for model in experiment.models]

  def bindings(self, model: Model) -> tuple[str, ...]:
    """Returns the gin bindings of a model, without its width."""
    prepared = self._prepared
    macros: dict[str, Any] = {
      'VOCABULARY_PATH': prepared.vocabulary,
      'VOCAB_SIZE': prepared.vocab_size(),
      'CACHE_DIR': prepared.cache_dir,
    }
    if model.words is not None:
      macros['ROUTING_VOCABULARY'] = prepared.routing_vocabulary(model.words)
      # A memory of words has rows in place of experts.
      gin_config.parse(model.gin_files)
      if gin_config.has_macro('NUM_EXPERTS'):
        macros['NUM_EXPERTS'] = model.words.num_experts
    written = (f'{name} = {value!r}' for name, value in macros.items())
    return (*written, *model.bindings)

  def seeds_of(self, model: Model) -> tuple[int, ...]:
    """Returns the seeds of a model: one for a single folder from elsewhere."""
    seeds = self._experiment.seeds
    if model.folder is None or '{seed}' in model.folder:
      return seeds
    return seeds[:1]

  def num_tries(self, model: Model) -> int:
    """Returns how many learning rates a model tries; 1 if none are tried."""
    tuning = self._experiment.tuning
    return len(tuning.rates) if tuning and model.folder is None else 1

  def num_runs(self, model: Model) -> int:
    """Returns how many runs a model has: its tries, and one per other seed."""
    return self.num_tries(model) + len(self.seeds_of(model)) - 1

  def _size(self, model: Model, asked: tuple[str, ...]) -> SizedModel:
    if model.name in asked:
      raise ValueError(
        'Budgets must lead to a model with a size of its own, but go round: '
        f'{" -> ".join((*asked, model.name))}. Give one of them no budget.'
      )
    if model.name not in self._sized:
      self._sized[model.name] = self._sized_anew(model, (*asked, model.name))
    return self._sized[model.name]

  def _sized_anew(self, model, asked) -> SizedModel:
    if model.folder is not None:
      config = self._config_of_folder(model)
      return SizedModel(
        model, (), config, costs.model_costs(config), 'not made here'
      )
    bindings = self.bindings(model)
    budget = model.budget
    if budget is None or budget.base == model.name:
      return self._sized_as(model, bindings, '')
    others = {other.name: other for other in self._experiment.models}
    base = self._size(others[budget.base], asked)
    lengths = self._lengths(model, bindings)
    with_width = lambda width: (*bindings, f'{model.width} = {width}')
    found = budgets.solve(
      lambda width: budget.cost(self._cost(model, with_width(width)), lengths),
      budget.cost(base.cost, lengths),
      granule=model.granule,
      tolerance=budget.tolerance,
      name=model.name,
      unit=budget.unit,
    )
    return self._sized_as(
      model,
      with_width(found.width),
      f'{model.width.rpartition(".")[2]} = {found.width} for the '
      f'{budget.unit} of {budget.base} ({found.error:+.2%})',
    )

  def _sized_as(self, model, bindings, note) -> SizedModel:
    config = self._config(model, bindings)
    cost = costs.model_costs(config)
    return SizedModel(model, bindings, config, cost, note)

  def _parse(self, model, bindings, stage=0) -> None:
    """Parses the gin files of a stage as its run will."""
    stage = model.stages[stage]
    gin_config.parse(
      (*model.gin_files, *stage.gin_files),
      (*bindings, *stage.bindings, "MODEL_DIR = ''"),
    )

  def _config(self, model, bindings) -> model_config.ModelConfig:
    self._parse(model, bindings)
    return gin_config.made('MODEL')

  def _cost(self, model, bindings) -> costs.ModelCosts:
    return costs.model_costs(self._config(model, bindings))

  def _lengths(self, model, bindings) -> dict[str, int]:
    self._parse(model, bindings)
    return gin_config.made('TASK_FEATURE_LENGTHS')

  def _config_of_folder(self, model: Model) -> model_config.ModelConfig:
    wanted, found = self.vocabulary, None
    for seed in self.seeds_of(model):
      for place in (model.folder, model.pretrained_folder):
        if place is None:
          continue
        path = place.format(seed=seed)
        folder, step = model_folder.split_checkpoint_path(path)
        config, vocabulary = model_folder.load_config(folder)
        if vocabulary.sha256 != wanted.sha256:
          raise ValueError(
            'Models that are compared must have the same subword vocabulary, '
            f'but that of {model.name} in {path} has sha256 '
            f'{vocabulary.sha256} and that of the experiment '
            f'{wanted.sha256}. Leave the model out, or give the data of the '
            'experiment its vocabulary.'
          )
        with checkpointing.Checkpoints(folder) as checkpoints:
          checkpoints.finished(step)
        found = found or config
    return found
