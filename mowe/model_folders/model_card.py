"""Writes the model card of a model folder: its README.md.

The front matter is that of the Hugging Face Hub. What is generated stands
between two marks. The next card replaces it, and leaves all that somebody wrote
around it. A README.md without these marks is somebody else's, and stays.
"""

import json
import pathlib
import re
import shlex
from collections.abc import Iterable
from typing import Any

from mowe.models import model_config
from mowe.models.families import costs
from mowe.training import checkpointing, run_history
from mowe.words import atomic_files

FILE_NAME = 'README.md'
_BEGIN = '<!-- mowe writes from here ... -->'
_END = '<!-- ... to here; what stands elsewhere is yours -->'
_GENERATED = re.compile(f'{re.escape(_BEGIN)}.*?{re.escape(_END)}', re.DOTALL)
# The limits that hold for every model of this kind.
_LIMITS = (
  'It knows the data above, and those of the model from which its training '
  'started, if there was one. It repeats what they say, right or wrong, with '
  'their biases.',
  'It answers every question, also those about things that its data do not '
  'name: such an answer is a guess, and is not marked as one.',
  'It was not made safe for talking to people, and not tested for any use but '
  'the evaluations above.',
)


def write(
  folder: pathlib.Path,
  config: model_config.ModelConfig,
  cost: costs.ModelCosts,
) -> None:
  """Writes the card of a folder, or the generated part of the one there.

  A README.md without such a part is left alone.

  Args:
    folder: a model folder with a checkpoint.
    config: the config of its model.
    cost: the costs of its model.
  """
  path = folder / FILE_NAME
  generated = '\n'.join([_BEGIN, *_lines(folder, cost), _END])
  if path.exists():
    # What somebody wrote in another encoding stays as it is.
    old = path.read_bytes().decode('utf-8', 'surrogateescape')
    text = _GENERATED.sub(lambda _: generated, old)
  else:
    text = (
      f'{_front_matter(config)}\n# {folder.resolve().name}\n\n{generated}\n'
    )
  atomic_files.write_atomically(path, text.encode('utf-8', 'surrogateescape'))


def _front_matter(config: model_config.ModelConfig) -> str:
  """What the Hub reads; who publishes the model adds language and licence."""
  task = 'text-generation'
  if 'encoder' in config.streams:
    task = 'text2text-generation'
  lines = ['library_name: mowe', f'pipeline_tag: {task}', 'tags:', '- jax']
  return '\n'.join(['---', *lines, '---', ''])


def _lines(folder, cost) -> Iterable[str]:
  with checkpointing.Checkpoints(folder) as checkpoints:
    step = checkpoints.latest_step()
    metadata, metrics = checkpoints.metadata(), checkpoints.metrics()
  name = folder.resolve().name
  yield '## Model'
  yield ''
  yield (
    f'{cost.total_parameters:,} parameters, of which a token uses '
    f'{cost.active_parameters:,}. `model.json` has the config, and the '
    'vocabularies lie beside it.'
  )
  yield ''
  yield '```bash'
  yield f"mowe ask {shlex.quote(name)} 'Who ...?'"
  yield '```'
  yield from _data(metadata)
  yield from _training(folder, step, metadata)
  yield from _evaluation(folder, step, metrics)
  yield ''
  yield '## Limits'
  yield ''
  yield from (f'- {limit}' for limit in _LIMITS)


def _data(metadata) -> Iterable[str]:
  data = metadata.get('data')
  if data is None:
    return
  yield ''
  yield '## Data'
  yield ''
  lengths = ', '.join(
    f'{number} tokens of {name}'
    for name, number in sorted(data['task_feature_lengths'].items())
  )
  yield f'Batches of {data["batch_size"]} rows, of at most {lengths}.'
  yield ''
  for name, rate in data.get('rates', {data.get('task'): 1.0}).items():
    digest = data.get('fingerprints', {}).get(name)
    made_of = f', token cache {digest[:12]}' if digest else ''
    share = f', {rate:.0%} of the rows' if rate != 1 else ''
    yield f'- {name}{made_of}{share}'


def _training(folder, step, metadata) -> Iterable[str]:
  yield ''
  yield '## Training'
  yield ''
  frozen = ', with experts frozen' if metadata.get('freeze_experts') else ''
  yield (
    f'{step:,} steps{frozen}. `config.gin` has all settings, and '
    '`train_metrics.jsonl` the metrics. Started by:'
  )
  yield ''
  yield '```bash'
  for start in run_history.read(folder):
    commit = f', commit {start["commit"][:12]}' if start['commit'] else ''
    yield (
      f'# {start["time"]}, from step {start["step"]:,}, mowe '
      f'{start["version"]}{commit}'
    )
    yield start['command']
  yield '```'


def _evaluation(folder, step, metrics) -> Iterable[str]:
  rows = [
    (name, f'{value:.4g}', f'during training, step {step:,}')
    for name, value in metrics.items()
    if '/layers_' not in name
  ]
  for file in sorted(folder.glob('*/results.json')):
    for name, value in _numbers(file):
      rows.append((name, f'{value:.4g}', f'`{file.parent.name}/results.json`'))
  if not rows:
    return
  yield ''
  yield '## Evaluation'
  yield ''
  yield '| metric | value | measured |'
  yield '|---|---:|---|'
  yield from (f'| {" | ".join(row)} |' for row in rows)


def _numbers(file: pathlib.Path) -> Iterable[tuple[str, Any]]:
  """The numbers of an evaluation; none of a file that is none."""
  try:
    results = json.loads(file.read_text('utf-8'))
  except ValueError:
    return
  if isinstance(results, dict):
    for name, value in results.items():
      if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
