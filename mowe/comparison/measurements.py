"""Measures one trained model, and returns a tree of JSON values.

A number that cannot be measured is None, never zero.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import flax
import jax
import numpy as np

from mowe.commands import data_config, evaluations
from mowe.commands.gin_files import gin_config
from mowe.comparison import budgets, experiment_data, memory_reads, planned_runs
from mowe.data import lm_batches
from mowe.evaluation import task_evaluation, text_metrics
from mowe.layers.routers import router_losses
from mowe.model_folders import model_folder
from mowe.models import decoding, initialization, model_config, parameters
from mowe.models.families import costs, families
from mowe.models.surgery import silenced as silenced_models
from mowe.training import (
  checkpointing,
  router_training,
  train_metrics,
  training_step,
)
from mowe.words import atomic_files, base_vocabulary, json_files

RESULTS = 'results.json'
QUESTIONS = 'questions.jsonl'

# The name of the seconds that training took between two evaluations, in the
# lines of eval_metrics.jsonl.
SECONDS = 'training_seconds'

# Number of batches in which tokens and the loads of experts are counted.
_COUNTED_BATCHES = 8

_DATE = re.compile(r'\d{1,2} [A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}, \d{4}')

# What a matrix product in a loop looks like in the compiled program.
_LOOPED_PRODUCT = re.compile(r' dot\(.*op_name="[^"]*/while/')


def measure(planned: planned_runs.Run) -> dict[str, Any]:
  """Measures a model, and writes its answers to QUESTIONS.

  Args:
    planned: the run, whose stages are finished.

  Returns:
    The fields of results.json that `compare` reads, but for those of the
    stages.
  """
  text_data = _data_of(planned.reading[-2])
  measured: dict[str, Any] = {
    'held_out_loss': None,
    'text_loss': None,
    'recall': {},
    'loads': [],
    'silenced': None,
    'reads': None,
  }
  silenced: dict[str, Any] = {'recall': {}, 'text_loss': None}
  measured |= _curves(planned)
  if planned.pretrained is not None:
    loaded = model_folder.load(planned.pretrained)
    measured |= _on_text(planned, text_data, loaded)
    if planned.knock_out:
      silenced = _on_text_silenced(planned, text_data, _silent(loaded))
    del loaded
  config, vocabulary = _config(planned.finetuned)
  batches = _counted(_text_batches(text_data, config, vocabulary))
  measured |= _costs(planned, config, _real_lengths(text_data, batches))
  reads = memory_reads.of_model(config, batches)
  measured['reads'] = reads and dataclasses.asdict(reads)
  measured |= _compiled_flops(config, text_data, vocabulary)
  print(
    'FLOPs per token: {flops_formula:,.0f} by formula, '
    '{flops_compiled:,.0f} in the compiled program'.format(**measured)
  )
  dropped = _dropped_in_training(planned)
  loaded = model_folder.load(planned.finetuned)
  measured['num_questions'], in_generation = _ask(planned, loaded)
  if planned.knock_out:
    measured['silenced'] = silenced | {
      'em': _ask_silenced(planned, _silent(loaded))
    }
  for load in measured['loads']:
    load['dropped_in_training'] = dropped.get(load['layer'])
    load['dropped_in_generation'] = in_generation.get(load['layer'])
  return measured


def _data_of(stage: planned_runs.PlannedStage) -> data_config.DataConfig:
  gin_config.parse(stage.gin_files, stage.bindings)
  return gin_config.call(data_config.DataConfig)


def _config(
  path: str,
) -> tuple[model_config.ModelConfig, base_vocabulary.Vocabulary]:
  folder, _ = model_folder.split_checkpoint_path(path)
  return model_folder.load_config(folder)


# Costs.


def _costs(planned, config, lengths) -> dict[str, Any]:
  cost = costs.model_costs(config)
  folder, step = model_folder.split_checkpoint_path(planned.finetuned)
  with checkpointing.Checkpoints(folder) as checkpoints:
    is_frozen = checkpoints.metadata(step).get('freeze_experts')
  return {
    'total_parameters': cost.total_parameters,
    'active_parameters': cost.active_parameters,
    'frozen_parameters': None
    if is_frozen is None
    else _num_in_experts(config) * is_frozen,
    'flops_formula': budgets.flops_per_token(cost, lengths),
  }


def _num_in_experts(config) -> int:
  """Returns the number of parameters that `freeze_experts` freezes."""
  ordinary, tables = parameters.split_tables(
    initialization.abstract_variables(families.build(config))['params']
  )
  flat = flax.traverse_util.flatten_dict(ordinary)
  leaves = [leaf for path, leaf in flat.items() if costs.is_expert(path)]
  leaves += jax.tree.leaves(tables)
  return sum(math.prod(leaf.shape) for leaf in leaves)


def _compiled_flops(config, data, vocabulary) -> dict[str, Any]:
  """Returns the FLOPs of a forward pass as XLA counts them, per place."""
  model = families.build(config)
  params, tables = parameters.split_tables(
    initialization.abstract_variables(model)['params']
  )
  batch = next(_text_batches(data, config, vocabulary), None)
  if batch is None:
    return {'flops_compiled': None, 'flops_has_loops': False}
  router = evaluations.make_router(config, [batch], {})
  eval_step = jax.jit(
    training_step.make_eval_step(model, training_step.LossConfig())
  )
  compiled = eval_step.lower(params, tables, *router(batch)).compile()
  flops = compiled.cost_analysis().get('flops')
  places = sum(
    batch[name].size
    for name in ('encoder_input_tokens', 'decoder_target_tokens')
    if name in batch
  )
  return {
    'flops_compiled': None if flops is None else flops / places,
    # XLA counts the body of a loop once, however often it runs.
    'flops_has_loops': bool(_LOOPED_PRODUCT.search(compiled.as_text())),
  }


# Text.


def _counted(batches) -> list[dict[str, Any]]:
  return list(itertools.islice(batches, _COUNTED_BATCHES))


def _real_lengths(data, batches) -> dict[str, float]:
  """Returns the mean tokens of an example of the text, without padding."""
  if not batches:
    return data.task_feature_lengths
  features = {
    'inputs': 'encoder_input_tokens',
    'targets': 'decoder_target_tokens',
  }
  return {
    name: float(
      sum(np.count_nonzero(batch[feature]) for batch in batches)
      / sum(len(batch[feature]) for batch in batches)
    )
    for name, feature in features.items()
    if feature in batches[0]
  }


def _text_batches(data, config, vocabulary) -> Iterator[dict[str, Any]]:
  """Yields batches with every example once; none of contiguous text."""
  opened = data.open(vocabulary, config)
  if isinstance(opened, lm_batches.ContiguousBatches):
    return iter(())
  return opened.eval_batches()


def _on_text(planned, data, loaded) -> dict[str, Any]:
  """Measures losses, recall and loads of the model before finetuning."""
  config = loaded.model.config
  params, tables = parameters.split_tables(loaded.params)
  losses = {'text': data}
  if planned.has_held_out:
    losses[experiment_data.HELD_OUT] = dataclasses.replace(
      data, mixture_or_task_name=experiment_data.HELD_OUT
    )
  values: dict[str, Any] = {}
  for name, source in losses.items():
    evaluation = evaluations.LossEvaluation(
      source, _COUNTED_BATCHES if name == 'text' else None, name
    ).prepare(loaded.model, loaded.vocabulary, training_step.LossConfig())
    values |= evaluation(params, tables)
  loss = lambda name: _finite(values.get(f'{name}/loss'))
  batches = _counted(_text_batches(data, config, loaded.vocabulary))
  return {
    'text_loss': loss('text'),
    'held_out_loss': loss(experiment_data.HELD_OUT),
    'recall': _recall(planned, data, loaded),
    'loads': [*_word_loads(config, batches), *_router_loads(values)],
  }


def _silent(loaded) -> model_folder.LoadedModel:
  """Returns a loaded model without what its memories hold."""
  config = silenced_models.silenced(loaded.model.config)
  return dataclasses.replace(loaded, model=loaded.model.clone(config=config))


def _on_text_silenced(planned, data, loaded) -> dict[str, Any]:
  """Measures the loss and the recall of a silenced model."""
  print('With its memories silenced:')
  evaluation = evaluations.LossEvaluation(
    data, _COUNTED_BATCHES, 'text'
  ).prepare(loaded.model, loaded.vocabulary, training_step.LossConfig())
  values = evaluation(*parameters.split_tables(loaded.params))
  return {
    'text_loss': _finite(values.get('text/loss')),
    'recall': _recall(planned, data, loaded),
  }


def _recall(planned, data, loaded) -> dict[str, Any]:
  """Measures what the model can fill in of the text that it was pretrained on.

  A model may have stored facts that it cannot yet give as answers.
  """
  number = max(1, planned.num_recalled // data.batch_size)
  batches = list(
    itertools.islice(
      _text_batches(data, loaded.model.config, loaded.vocabulary), number
    )
  )
  generator = data.make_generator(loaded.model, loaded.params)
  recalled: dict[str, Any] = {}
  for name, counts in (('all spans', None), ('whole dates', _is_date)):
    try:
      found = task_evaluation.span_recall(
        generator, batches, loaded.vocabulary, counts=counts
      )
    except task_evaluation.NoSpanError:
      continue
    recalled[name] = {'right': found.num_right, 'spans': found.num_spans}
    print(
      f'Recall of masked text, {name}: {found.recall:.3f} '
      f'({found.num_right:,} of {found.num_spans:,})'
    )
  return recalled


def _is_date(text: str) -> bool:
  return bool(_DATE.fullmatch(text.strip()))


# Functions that measure loads of experts.


def _word_loads(config, batches) -> Iterator[dict[str, Any]]:
  """Yields the load of word experts; all blocks of a stack have the same."""
  names = model_config.names_experts(config)
  for stream in model_config.word_streams(config):
    feature, routing_ids = {
      'encoder': ('encoder_input_tokens', names.encoder_ids),
      'decoder': ('decoder_input_tokens', names.decoder_ids),
    }[stream]
    number = names.num_experts
    counts = np.zeros(number + 1, np.int64)
    for batch in batches:
      ids = np.asarray(routing_ids(batch[feature]))
      counts += np.bincount(ids[ids >= 0], minlength=number + 1)
    blocks = ', '.join(str(i + 1) for i in config.sparse_blocks()[stream])
    real, routed = counts.sum(), counts[:-1].sum()
    if not routed:
      continue
    yield {
      'layer': f'{stream}, block {blocks}',
      'shares': (counts[:-1] / routed).tolist(),
      'skipped': float(counts[-1] / real),
      'dropped': 0.0,
    }


def _router_loads(values) -> Iterator[dict[str, Any]]:
  """Yields the loads of layers with routers, which an evaluation reported."""
  for name, value in values.items():
    if not (name.startswith('text/') and name.endswith('/load')):
      continue
    # Such as text/encoder/layers_1/mlp.
    layer = name.removesuffix('/load')
    yield {
      'layer': _layer_name(layer.split('/')[1:]),
      'shares': np.nan_to_num(value).tolist(),
      'skipped': _finite(values.get(f'{layer}/skipped')),
      'dropped': _finite(values.get(f'{layer}/dropped')),
    }


def _layer_name(path: Sequence[str]) -> str:
  """Returns how the report names a layer, such as 'encoder, block 2'."""
  block = int(path[1].removeprefix('layers_')) + 1
  kind = '' if path[-1] == 'mlp' else f', {path[-1]}'
  return f'{path[0]}, block {block}{kind}'


def _dropped_in_training(planned) -> dict[str, float]:
  """Returns the fraction of choices that pretraining dropped, by layer."""
  found: dict[str, list[float]] = {}
  for stage in planned.stages[:-1]:
    path = pathlib.Path(stage.folder) / 'train_metrics.jsonl'
    for line in train_metrics.read_json_lines(path):
      for name, value in line.items():
        if name.endswith('/dropped') and value is not None:
          layer = _layer_name(name.split('/')[:-1])
          found.setdefault(layer, []).append(value)
  return {layer: statistics.mean(values) for layer, values in found.items()}


def _dropped_in_generation(generator, cache) -> dict[str, float]:
  """Returns the fraction of choices that a decoder drops while it answers."""
  number = min(generator.batch_size, cache.num_examples)
  longest = max(len(cache.tokens('inputs', i)) for i in range(number))
  inputs = np.zeros((number, longest), np.int32)
  for i in range(number):
    tokens = cache.tokens('inputs', i)
    inputs[i, : len(tokens)] = tokens
  counted = decoding.count_routed(
    generator.model,
    {'params': generator.params},
    inputs,
    generator.max_target_length,
  )
  stats = router_training.layer_stats({router_losses.COLLECTION: counted})
  return {
    _layer_name(path): float(np.sum(one.dropped) / one.num_choices)
    for path, one in stats.items()
    if one.num_choices > 0
  }


# Functions that read what training wrote.


def _curves(planned) -> dict[str, Any]:
  """Returns the losses of all stages of pretraining in a row, and the speed."""
  curve: list[tuple[int, float | None]] = []
  held_out: list[tuple[int, float | None]] = []
  speed, before = None, 0
  for number, stage in enumerate(planned.stages[:-1]):
    folder = pathlib.Path(stage.folder)
    training = train_metrics.read_json_lines(folder / 'train_metrics.jsonl')
    evaluated = train_metrics.read_json_lines(folder / 'eval_metrics.jsonl')
    curve += [(before + line['step'], line['loss']) for line in training]
    held_out += [
      (before + line['step'], line[f'{experiment_data.HELD_OUT}/loss'])
      for line in evaluated
      if f'{experiment_data.HELD_OUT}/loss' in line
    ]
    if number == 0:
      speed = _steps_per_second(evaluated)
    before = curve[-1][0] if curve else before
  if speed is not None:
    speed *= _tokens_per_step(planned.stages[0])
  return {
    'curve': curve,
    'held_out_curve': held_out,
    'tokens_per_second': speed,
  }


def _steps_per_second(evaluated: Sequence[dict[str, Any]]) -> float | None:
  """Returns the median speed over stretches of training without compilation."""
  speeds = [
    (after['step'] - before['step']) / after[SECONDS]
    for before, after in itertools.pairwise(evaluated)
    if after.get(SECONDS)
  ]
  return statistics.median(speeds) if speeds else None


def _tokens_per_step(stage) -> float:
  """Returns the mean tokens of the first batches, without padding."""
  data = _data_of(stage)
  folder = pathlib.Path(stage.folder)
  config, vocabulary = model_folder.load_config(folder)
  make = data.open(vocabulary, config).batch_maker(0)
  names = ('encoder_input_tokens', 'decoder_target_tokens')
  return statistics.mean(
    sum(np.count_nonzero(batch[name]) for name in names if name in batch)
    for batch in map(make, range(_COUNTED_BATCHES))
  )


# Functions that ask questions.


def _ask(planned, loaded) -> tuple[int, dict[str, float]]:
  """Asks all questions, and writes a line for each of them.

  Returns:
    The number of questions, and for each layer of the decoder the fraction of
    choices that were dropped while it answered.
  """
  data = _data_of(planned.reading[-1])
  generator = data.make_generator(loaded.model, loaded.params)
  lines = []
  dropped: dict[str, float] = {}
  for task in planned.questions:
    cache = data.open_cache(task, loaded.vocabulary)
    dropped = dropped or _dropped_in_generation(generator, cache)
    folder = pathlib.Path(planned.folder) / 'answers' / task
    _asked(planned, loaded, generator, cache, folder)
    # splitlines would also split at other line ends, which texts may hold.
    text = (folder / 'predictions.jsonl').read_text('utf-8')
    for record, line in zip(
      cache.records(), text.rstrip('\n').split('\n'), strict=True
    ):
      kept = {k: record[k] for k in ('relation', 'entity') if k in record}
      lines.append({'task': task, **json.loads(line), **kept})
  content = ''.join(
    json.dumps(line, ensure_ascii=False) + '\n' for line in lines
  )
  atomic_files.write_atomically(
    pathlib.Path(planned.folder) / QUESTIONS, content.encode('utf-8', 'replace')
  )
  return len(lines), dropped


def _ask_silenced(planned, loaded) -> dict[str, Any]:
  """Returns the exact match of a silenced model, 0 to 100, for each task."""
  print('With its memories silenced:')
  data = _data_of(planned.reading[-1])
  generator = data.make_generator(loaded.model, loaded.params)
  return {
    task: _asked(
      planned, loaded, generator, data.open_cache(task, loaded.vocabulary)
    ).em
    for task in planned.questions
  }


def _asked(planned, loaded, generator, cache, folder=None):
  """Asks the questions of one cache, and prints the scores."""
  result = task_evaluation.evaluate_questions(
    generator,
    cache,
    loaded.vocabulary,
    metric=planned.metric and text_metrics.of_name(planned.metric),
    output_dir=folder,
  )
  print(
    f'{cache.path.name}: EM {result.em:.1f}  F1 {result.f1:.1f}  '
    f'({result.num_questions:,} questions, step {loaded.step})',
    flush=True,
  )
  return result


def read_results(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what `measure` found of a run."""
  return json_files.read_object(
    folder / RESULTS, 'Remove the file: the run is then measured again.'
  )


def read_answers(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines that `measure` wrote for the questions of a run."""
  # splitlines would also split at other line ends, which texts may hold.
  text = (folder / QUESTIONS).read_text('utf-8')
  return [json.loads(line) for line in text.rstrip('\n').split('\n')]


def _finite(value: Any) -> float | None:
  return None if value is None or not np.isfinite(value) else float(value)
