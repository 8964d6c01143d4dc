"""`mowe quickstart`: T5 and MoWE of equal FLOPs, from text to answers.

An experiment of `mowe compare` that needs no gin file of its own: data are
generated or taken from a folder, and models are those of the options.
"""

import dataclasses
import os
import time
from collections.abc import Sequence

from mowe.commands import gin_config
from mowe.comparison import budgets, compare, experiment_data, experiments
from mowe.comparison.report import answer_comparison, report_tables

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
    output: the folder of everything that is made.
    data_dir: documents, qa_train and qa_validation as .jsonl or .jsonl.gz, or
      what else `experiment_data.Files` takes; None generates a world.
    documents: a file of text for a data_dir that has none.
    recipe: first word of the gin files in gin_configs/examples.
    vocabulary: SentencePiece model; None trains one on the text.
    vocabulary_size: pieces of a vocabulary that is trained.
    num_experts: experts of the MoWE.
    names_files: the routing vocabulary keeps the words of these names only.
    num_seeds: runs of each model; the report shows their means.
    with_longer_t5: also a T5 that is pretrained three times as long.
    with_larger_t5: also a T5 with as many parameters in all as the MoWE.
    with_moe: also these mixtures of experts: 'switch', 'top2', ...
    steps: of pretraining, instead of the recipe's.
    finetune_steps: instead of the recipe's.

  Returns:
    The numbers of the last line.
  """
  start = time.monotonic()
  steps = {'pretrained': steps, 'finetuned': finetune_steps}
  stages = _stages(recipe, steps)
  model = lambda name, kind, **fields: experiments.Model(
    name,
    gin_files=(f'gin_configs/models/{kind}_tiny.gin',),
    **({'stages': stages} | fields),
  )
  words = experiment_data.Words(num_experts, names_files=tuple(names_files))
  models = [model('T5', 't5'), model('MoWE', 'mowe', words=words)]
  if with_longer_t5:
    longer = {
      **steps,
      'pretrained': 3 * (steps['pretrained'] or _steps_of(recipe)),
    }
    models.append(model('T5, 3x longer', 't5', stages=_stages(recipe, longer)))
  if with_larger_t5:
    larger = model(
      'T5, equal size',
      't5',
      width='mowe.models.t5.t5_config.T5Config.mlp_dim',
      granule=1,
      budget=budgets.EqualParameters('MoWE'),
    )
    models.append(larger)
  # Their experts are trained in finetuning, too, as in their papers.
  trained = [
    dataclasses.replace(
      stage, bindings=(*stage.bindings, 'FREEZE_EXPERTS = False')
    )
    if stage.name == 'finetuned'
    else stage
    for stage in stages
  ]
  models += [
    model(f'MoE {kind}', f'moe_{kind}', stages=tuple(trained))
    for kind in with_moe
  ]
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
  """The first tables, and some questions with all answers."""
  for table in compared.tables[:2]:
    print(f'\n{report_tables.markdown_table(table.rows)}')
  print()
  for index in _samples(compared.questions):
    question = compared.questions[index]
    print(f'{question.text}  (right: {" or ".join(question.answers)})')
    for result in compared.results:
      print(f'  {result.name:16} {result.answers[0].predictions[index]}')
  print(f'\nTables, figures and page: {compared.page}')


def _samples(questions: Sequence[answer_comparison.Question]) -> list[int]:
  """Questions spread over all of them."""
  # One further each time, as questions go round the relations.
  return [
    (i * len(questions) // _NUM_SAMPLES + i) % len(questions)
    for i in range(_NUM_SAMPLES)
  ]
