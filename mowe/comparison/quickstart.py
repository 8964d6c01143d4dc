"""`mowe quickstart` compares a T5 and a MoWE of equal FLOPs, from text on.

It is an experiment of `mowe compare` that needs no gin file of its own: the
data are generated or read from a folder, and the options choose the models.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence

from mowe.commands.gin_files import gin_config
from mowe.comparison import budgets, compare, experiment_data, experiments
from mowe.comparison.report import aligned_table, answer_comparison

# Each stage of a run, and how the gin file of its recipe ends.
_STAGES = {'pretrained': 'pretrain', 'finetuned': 'finetune'}
_NUM_SAMPLES = 3


def quickstart(
  output: str | os.PathLike[str],
  *,
  data_dir: str | None = None,
  documents: str | None = None,
  recipe: str = 'world',
  vocabulary: str | None = None,
  vocabulary_size: int = 1000,
  num_experts: int = 2048,
  names_files: Sequence[str] = (),
  num_seeds: int = 1,
  with_longer_t5: bool = False,
  with_larger_t5: bool = False,
  with_moe: Sequence[str] = (),
  steps: int | None = None,
  finetune_steps: int | None = None,
) -> dict[str, float]:
  """Pretrains, finetunes, asks and compares a T5 and a MoWE.

  Args:
    output: the folder where everything is written.
    data_dir: a folder with documents, qa_train and qa_validation as .jsonl or
      .jsonl.gz, or with other files that `experiment_data.Files` takes; None
      generates a world.
    documents: a file of text, for a data_dir without documents; None reads the
      documents of data_dir.
    recipe: the first word of the names of gin files in gin_configs/examples.
    vocabulary: path of a SentencePiece model; None trains one on the text.
    vocabulary_size: number of pieces of a vocabulary that is trained.
    num_experts: number of word experts of the MoWE.
    names_files: files of names, whose words alone the routing vocabulary keeps;
      empty keeps all words.
    num_seeds: number of runs of each model; the report shows their means.
    with_longer_t5: adds a T5 that is pretrained three times as long.
    with_larger_t5: adds a T5 with as many parameters in total as the MoWE.
    with_moe: kinds of mixtures of experts to add, such as 'switch' and 'top2'.
    steps: steps of pretraining; None takes those of the recipe.
    finetune_steps: steps of finetuning; None takes those of the recipe.

  Returns:
    The numbers that the last line prints: exact matches of both models as
    fractions, the ratio of their FLOPs, and the seconds of the whole run.
  """
  start = time.monotonic()
  steps = {'pretrained': steps, 'finetuned': finetune_steps}
  stages = _stages(recipe, steps)
  words = experiment_data.Words(num_experts, names_files=tuple(names_files))
  models = [
    _model('T5', 't5', stages=stages),
    _model('MoWE', 'mowe', stages=stages, words=words),
  ]
  if with_longer_t5:
    models.append(_longer_t5(recipe, steps))
  if with_larger_t5:
    models.append(_larger_t5(stages))
  models += _mixtures(with_moe, stages)
  compared = compare.compare(
    experiments.Experiment(
      title=f'T5 and MoWE: {recipe}',
      models=models,
      data=_data(data_dir, documents, vocabulary, vocabulary_size),
      output=os.fspath(output),
      seeds=tuple(range(num_seeds)),
    )
  )
  _show(compared)
  dense, mowe = compared.results[:2]
  numbers = {
    't5_em': dense.score().em / 100,
    'mowe_em': mowe.score().em / 100,
    'flops_ratio': mowe.flops_formula / dense.flops_formula,
    'seconds': time.monotonic() - start,
  }
  print(
    'quickstart: t5_em={t5_em:.3f} mowe_em={mowe_em:.3f} '
    'flops_ratio={flops_ratio:.3f} seconds={seconds:.0f}'.format(**numbers)
  )
  return numbers


def _mixtures(
  kinds: Sequence[str], stages: Sequence[experiments.Stage]
) -> list[experiments.Model]:
  # Mixtures of experts train their experts in finetuning, too, as in their
  # papers; word experts are frozen then.
  trained = tuple(
    dataclasses.replace(
      stage, bindings=(*stage.bindings, 'FREEZE_EXPERTS = False')
    )
    if stage.name == 'finetuned'
    else stage
    for stage in stages
  )
  return [
    _model(f'MoE {kind}', f'moe_{kind}', stages=trained) for kind in kinds
  ]


def _longer_t5(
  recipe: str, steps: Mapping[str, int | None]
) -> experiments.Model:
  pretrained = 3 * (steps['pretrained'] or _steps_of(recipe))
  longer = {**steps, 'pretrained': pretrained}
  return _model('T5, 3x longer', 't5', stages=_stages(recipe, longer))


def _larger_t5(stages: tuple[experiments.Stage, ...]) -> experiments.Model:
  return _model(
    'T5, equal size',
    't5',
    stages=stages,
    width='mowe.models.t5.t5_config.T5Config.mlp_dim',
    granule=1,
    budget=budgets.EqualParameters('MoWE'),
  )


def _model(name: str, kind: str, **fields) -> experiments.Model:
  """Returns a model of `gin_configs/models/<kind>_tiny.gin`."""
  return experiments.Model(
    name, gin_files=(f'gin_configs/models/{kind}_tiny.gin',), **fields
  )


def _data(data_dir, documents, vocabulary, size) -> experiment_data.Data:
  if data_dir is None:
    return experiment_data.GeneratedWorld(
      vocabulary=vocabulary, vocabulary_size=size
    )
  return experiment_data.Files(
    data_dir,
    documents=documents,
    vocabulary=vocabulary,
    vocabulary_size=size,
  )


def _stages(recipe, steps) -> tuple[experiments.Stage, ...]:
  return tuple(
    experiments.Stage(
      name,
      (_file(recipe, verb),),
      () if steps[name] is None else (f'TRAIN_STEPS = {steps[name]}',),
    )
    for name, verb in _STAGES.items()
  )


def _file(recipe: str, verb: str) -> str:
  return f'gin_configs/examples/{recipe}_{verb}.gin'


def _steps_of(recipe: str) -> int:
  gin_config.parse([_file(recipe, 'pretrain')])
  return gin_config.made('TRAIN_STEPS')


def _show(compared: compare.Compared) -> None:
  """Prints the first tables, and some questions with the models' answers."""
  for table in compared.tables[:2]:
    print(f'\n{aligned_table.aligned(table.rows)}')
  print()
  for index in _samples(compared.questions):
    question = compared.questions[index]
    print(f'{question.text}  (right: {" or ".join(question.answers)})')
    for result in compared.results:
      print(f'  {result.name:16} {result.answers[0].predictions[index]}')
  print(f'\nTables, figures and page: {compared.page}')


def _samples(questions: Sequence[answer_comparison.Question]) -> list[int]:
  """Returns indices of a few questions, spread over all of them."""
  # Questions go round the relations in turn: one further each time, and the
  # samples ask about different relations.
  return [
    (i * len(questions) // _NUM_SAMPLES + i) % len(questions)
    for i in range(_NUM_SAMPLES)
  ]
