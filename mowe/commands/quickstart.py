"""`mowe quickstart`: T5 and MoWE of equal FLOPs, from text to answers.

Every stage is what its own command does; each command is printed before it
runs. A stage that is done is not done again, so a stopped quick start goes on
where it was when it is started again.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mowe.commands import (
  build_routing_vocabulary,
  cache_task,
  data_config,
  evaluate,
  gin_config,
  model_folder,
  train,
  train_vocabulary,
)
from mowe.data import generated_world
from mowe.evaluation import evaluate as evaluate_lib
from mowe.evaluation import report
from mowe.models import costs, t5
from mowe.training import metrics as metrics_lib
from mowe.words import subwords

# Examples of the pretraining text on which recall is measured.
_RECALL_EXAMPLES = 1024
_DATE = re.compile(r'\d{1,2} [A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}, \d{4}')
_FILES = ('documents', 'qa_train', 'qa_validation')


@dataclasses.dataclass(frozen=True)
class _Contestant:
  """A model of the comparison.

  Attributes:
    name: in the report; of its folder too.
    model: 't5' or 'mowe', as in the gin files' names.
    longer: factor of the pretraining steps.
    same_size: as many parameters in all as the MoWE.
  """

  name: str
  model: str
  longer: int = 1
  same_size: bool = False


def quickstart(
  output: str | os.PathLike[str],
  *,
  data_dir: str | None = None,
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
    data_dir: documents, qa_train and qa_validation as .jsonl or .jsonl.gz; None
      generates a world.
    recipe: first word of the gin files in gin_configs/examples.
    vocabulary: SentencePiece model; None trains one on the text.
    vocabulary_size: pieces of a vocabulary that is trained.
    num_experts: experts of the MoWE.
    names_files: the routing vocabulary keeps the words of these names only.
    num_seeds: runs of each model; the report shows their means.
    with_longer_t5: also a T5 that is pretrained three times as long.
    with_larger_t5: also a T5 with as many parameters in all as the MoWE.
    with_moe: also these mixtures of experts: 'switch', 'top2', ...; the recipe
      has a gin file for each.
    steps: of pretraining, instead of the recipe's.
    finetune_steps: instead of the recipe's.

  Returns:
    The numbers of the last line.
  """
  start = time.monotonic()
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  files = _find_data(folder, data_dir)
  macros = _prepare(
    folder, files, vocabulary, vocabulary_size, num_experts, names_files
  )
  contestants = [_Contestant('T5', 't5'), _Contestant('MoWE', 'mowe')]
  if with_longer_t5:
    contestants.append(_Contestant('T5, 3x longer', 't5', longer=3))
  if with_larger_t5:
    contestants.append(_Contestant('T5, equal size', 't5', same_size=True))
  for kind in with_moe:
    contestants.append(_Contestant(f'MoE {kind}', f'moe_{kind}'))
  runs = _Runs(folder, recipe, macros, steps, finetune_steps)
  results = [
    _mean([runs.run(one, seed) for seed in range(num_seeds)])
    for one in contestants
  ]
  page = report.write_report(
    results, folder / 'report', title=f'T5 and MoWE: {recipe}'
  )
  _show(results, page)
  dense, mowe = results[:2]
  numbers = {
    't5_em': dense.em / 100,
    'mowe_em': mowe.em / 100,
    'flops_ratio': mowe.flops_per_token / dense.flops_per_token,
    'seconds': time.monotonic() - start,
  }
  print(
    'quickstart: t5_em={t5_em:.3f} mowe_em={mowe_em:.3f} '
    'flops_ratio={flops_ratio:.3f} seconds={seconds:.0f}'.format(**numbers)
  )
  return numbers


def _find_data(folder, data_dir) -> dict[str, str]:
  if data_dir is None:
    print('Generating a world of people and facts about them.')
    config = generated_world.WorldConfig()
    paths = generated_world.write_world(config, folder / 'world')
    return {name: str(paths[name]) for name in _FILES}
  files = {}
  for name in _FILES:
    found = [
      path
      for ending in ('.jsonl', '.jsonl.gz')
      if (path := pathlib.Path(data_dir) / (name + ending)).is_file()
    ]
    if not found:
      raise FileNotFoundError(
        f'The data folder must hold {", ".join(_FILES)}, each .jsonl or '
        f'.jsonl.gz, but {data_dir} has no {name}. Documents have the field '
        'text; questions have question and answers.'
      )
    files[name] = str(found[0])
  return files


def _prepare(folder, files, vocabulary, size, num_experts, names_files):
  """Vocabulary, routing vocabulary and caches; macros that name them."""
  if vocabulary is None:
    vocabulary = folder / 'vocabulary.model'
    if not vocabulary.exists():
      _say(
        'train-vocabulary',
        vocabulary,
        files['documents'],
        size=size,
        questions=files['qa_train'],
      )
      train_vocabulary.train_vocabulary(
        vocabulary,
        [files['documents']],
        size=size,
        questions=[files['qa_train']],
      )
  loaded = subwords.load_subwords(vocabulary)
  words = folder / 'routing_vocabulary.npz'
  _say(
    'build-routing-vocabulary',
    words,
    files['documents'],
    vocabulary=vocabulary,
    num_experts=num_experts,
  )
  build_routing_vocabulary.build_routing_vocabulary(
    str(words),
    [files['documents']],
    str(vocabulary),
    num_experts=num_experts,
    names_files=names_files,
  )
  for name, kind in zip(
    _FILES, ('text', 'questions', 'questions'), strict=True
  ):
    cache = folder / 'cache' / name
    _say('cache-task', cache, files[name], kind=kind, vocabulary=vocabulary)
    cache_task.cache_task(
      cache, str(vocabulary), files=[files[name]], kind=kind
    )
  return {
    'VOCABULARY_PATH': str(vocabulary),
    'VOCAB_SIZE': -(-loaded.size // 128) * 128,
    'ROUTING_VOCABULARY': str(words),
    'NUM_EXPERTS': num_experts,
    'CACHE_DIR': str(folder / 'cache'),
  }


class _Stopwatch:
  """Seconds of a block, added to those of earlier runs of the command."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.seconds = float(path.read_text()) if path.exists() else 0.0

  def __enter__(self) -> '_Stopwatch':
    self._start = time.monotonic()
    return self

  def __exit__(self, *exception: object) -> None:
    self.seconds += time.monotonic() - self._start
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._path.write_text(f'{self.seconds:.1f}')


@dataclasses.dataclass(frozen=True)
class _Runs:
  """Trains and evaluates contestants, all from the same gin files."""

  folder: pathlib.Path
  recipe: str
  macros: Mapping[str, Any]
  steps: int | None
  finetune_steps: int | None

  def run(self, one: _Contestant, seed: int) -> report.ModelResult:
    """One model with one seed, from fresh parameters to answers."""
    base = self._folder_of(one.name, seed)
    with _Stopwatch(base / 'seconds.txt') as stopwatch:
      self._train(one, seed, 'pretrain', self.steps, base / 'pretrained')
      _show_recall(base, gin_config.call(data_config.DataConfig))
      self._train(
        one,
        seed,
        'finetune',
        self.finetune_steps,
        base / 'finetuned',
        INITIAL_CHECKPOINT_PATH=str(base / 'pretrained'),
      )
    data = gin_config.call(
      data_config.DataConfig, mixture_or_task_name='qa_validation'
    )
    result = evaluate.evaluate(
      checkpoint_path=str(base / 'finetuned'),
      output_dir=str(base / 'evaluation'),
      data=data,
    )
    lengths = data.task_feature_lengths
    cost = costs.model_costs(self._config(base))
    return report.ModelResult(
      name=one.name,
      total_parameters=cost.total_parameters,
      active_parameters=cost.active_parameters,
      # The recipes freeze word experts, and no others.
      frozen_parameters=cost.expert_parameters if one.model == 'mowe' else 0,
      flops_per_token=cost.flops_per_example(
        lengths['inputs'], lengths['targets']
      )
      / (lengths['inputs'] + lengths['targets']),
      em=result.em,
      f1=result.f1,
      num_questions=result.num_questions,
      seconds=stopwatch.seconds,
      learning_curve=[
        (line['step'], line['loss'])
        for line in metrics_lib.read_json_lines(
          base / 'pretrained' / 'train_metrics.jsonl'
        )
      ],
      em_by_relation={n: r.em for n, r in result.per_relation.items()},
      seeds=(seed,),
      samples=_samples(base / 'evaluation' / 'predictions.jsonl'),
    )

  def _train(self, one, seed, stage, steps, model_dir, **macros):
    """What `mowe train` does with the recipe's gin file of this stage."""
    files = [f'gin_configs/examples/{self.recipe}_{stage}_{one.model}.gin']
    used = {**self.macros, 'RANDOM_SEED': seed, 'MODEL_DIR': str(model_dir)}
    used |= macros
    if one.model != 'mowe':
      del used['ROUTING_VOCABULARY'], used['NUM_EXPERTS']
    bindings = [f'{name} = {value!r}' for name, value in used.items()]
    if one.same_size:
      width = self._width_of_same_size(seed)
      bindings.append(f'mowe.models.t5.T5Config.mlp_dim = {width}')
    gin_config.parse(files, bindings)
    if steps is None:
      steps = gin_config.macro('TRAIN_STEPS')
    if stage == 'pretrain':
      steps *= one.longer
    bindings.append(f'TRAIN_STEPS = {steps}')
    gin_config.parse(files, bindings)
    print(f'\n{one.name}, seed {seed}, {stage}:')
    _say_gin(files, bindings)
    gin_config.call(train.train, config_text=gin_config.operative_config)

  def _width_of_same_size(self, seed: int) -> int:
    """Hidden units of a T5 with as many parameters as the MoWE."""
    dense, sparse = (
      self._config(self._folder_of(name, seed)) for name in ('T5', 'MoWE')
    )
    wanted, have, more = (
      costs.model_costs(config).total_parameters
      for config in (
        sparse,
        dense,
        dataclasses.replace(dense, mlp_dim=dense.mlp_dim + 1),
      )
    )
    return dense.mlp_dim + round((wanted - have) / (more - have))

  def _folder_of(self, name: str, seed: int) -> pathlib.Path:
    plain = ''.join(c if c.isalnum() else '_' for c in name.lower())
    return self.folder / f'{plain}_seed{seed}'

  def _config(self, base: pathlib.Path) -> t5.T5Config:
    return model_folder.load_config(base / 'pretrained')[0]


def _show_recall(base: pathlib.Path, data: data_config.DataConfig) -> None:
  """What the model can fill in of the text it was pretrained on.

  A model may have stored what it cannot yet be asked for.
  """
  loaded = model_folder.load(str(base / 'pretrained'))
  generator = data.make_generator(loaded.model, loaded.params)
  batches = list(
    itertools.islice(
      data.open(loaded.vocabulary, loaded.model.config).eval_batches(),
      _RECALL_EXAMPLES // data.batch_size,
    )
  )
  recalls = {}
  for name, counts in (('all spans', None), ('whole dates', _is_date)):
    found = evaluate_lib.span_recall(
      generator, batches, loaded.vocabulary, counts=counts
    )
    recalls[name] = dataclasses.asdict(found)
    print(
      f'Recall of masked text, {name}: {found.recall:.3f} '
      f'({found.num_right:,} of {found.num_spans:,})'
    )
  (base / 'recall.json').write_text(json.dumps(recalls, indent=2) + '\n')


def _is_date(text: str) -> bool:
  return bool(_DATE.fullmatch(text.strip()))


def _mean(results: Sequence[report.ModelResult]) -> report.ModelResult:
  """Means over seeds; the curve and the samples are the first seed's."""
  average = lambda values: sum(values) / len(results)
  return dataclasses.replace(
    results[0],
    em=average([r.em for r in results]),
    f1=average([r.f1 for r in results]),
    seconds=average([r.seconds for r in results]),
    em_by_relation={
      name: average([r.em_by_relation[name] for r in results])
      for name in results[0].em_by_relation
    },
    seeds=tuple(seed for r in results for seed in r.seeds),
  )


def _samples(
  path: pathlib.Path, number: int = 3
) -> list[report.SampleQuestion]:
  """Questions spread over the file, the same for every model."""
  # Not splitlines: texts may hold other line ends than this one.
  lines = path.read_text(encoding='utf-8').rstrip('\n').split('\n')
  # One further each time, as questions go round the relations.
  places = [(i * len(lines) // number + i) % len(lines) for i in range(number)]
  chosen = [json.loads(lines[place]) for place in places]
  return [
    report.SampleQuestion(
      line['question'], tuple(line['answers']), line['prediction']
    )
    for line in chosen
  ]


def _show(results: Sequence[report.ModelResult], page: pathlib.Path) -> None:
  print()
  print((page.parent / 'table.md').read_text(encoding='utf-8'))
  for number, sample in enumerate(results[0].samples):
    print(f'{sample.question}  (right: {" or ".join(sample.answers)})')
    for result in results:
      print(f'  {result.name:16} {result.samples[number].prediction}')
  print(f'\nTable, picture and page: {page}')


def _say(verb: str, *arguments: Any, **options: Any) -> None:
  words = ['mowe', verb, *map(str, arguments)]
  for name, value in options.items():
    words += [f'--{name}', str(value)]
  print(f'$ {shlex.join(words)}')


def _say_gin(files: Sequence[str], bindings: Sequence[str]) -> None:
  words = [f'--gin_file={file}' for file in files]
  words += [f'"--gin.{one.replace(" = ", "=", 1)}"' for one in bindings]
  print(f'$ mowe train {" ".join(words)}')
