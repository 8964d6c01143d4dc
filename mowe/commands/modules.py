"""`mowe modules`: a model with more modules, with fewer, or which are used."""

import itertools
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import rich.console
import rich.table

from mowe.commands import data_config, evaluations, show_progress
from mowe.data import lm_batches
from mowe.evaluation import module_usage
from mowe.model_folders import model_folder, modules_folder
from mowe.models.surgery import module_surgery, modules_added, modules_pruned
from mowe.words import atomic_files

GATES = {
  'keep': modules_pruned.KeepGates(),
  'renormalise': modules_pruned.Renormalise(),
}

_PICTURE = 'usage.png'
# So that places of layers are not cut off where the output is a file.
_WIDTH = 110


def add(
  source: str,
  target: str,
  *,
  mlp: int = 0,
  attention: int = 0,
  k: int = 1,
  seed: int = 0,
  expert_parts: int = 1,
) -> None:
  """Writes a model with more modules, whose outputs are the same at first.

  Args:
    source: a model folder or a checkpoint in it; it is only read.
    target: the model folder to write; must not be there.
    mlp: new modules in every layer of MLP modules.
    attention: new modules in every layer of attention modules.
    k: the number of new modules that each token meets.
    seed: the seed from which the inner kernels and the router columns of the
      new modules are drawn.
    expert_parts: parts of the mesh axis `expert` that modules will lie on.

  Raises:
    FileExistsError: the target is there.
    FileNotFoundError: the source is not there.
    ValueError: modules that cannot be added. Nothing is written then.
  """
  modules_folder.check_target(target)
  opened = modules_folder.open_source(source)
  numbers = {'mlp': mlp, 'attention': attention}
  config, edits = modules_added.add(opened.config, numbers, k=k, seed=seed)
  layers = module_surgery.module_layers(config)
  _check_parts(layers, expert_parts)
  rule = {
    'operation': 'add',
    'rule': 'old modules as before, and besides k new ones by the softmax of '
    'all; output kernels of new modules begin at zero',
    'added': {kind: n for kind, n in numbers.items() if n},
    'k': k,
    'seed': seed,
  }
  reason = modules_folder.write(target, opened, config, edits, rule)
  _show(opened, target, layers, reason)


def prune(
  source: str,
  target: str,
  *,
  usage: str,
  fraction: float | None = None,
  threshold: float | None = None,
  gates: str = 'keep',
  expert_parts: int = 1,
) -> None:
  """Writes a model without the modules that a task uses least.

  Args:
    source: a model folder or a checkpoint in it; it is only read.
    target: the model folder to write; must not be there.
    usage: usage.json of `mowe modules usage`, of this very model.
    fraction: the share of the modules of each layer that is left.
    threshold: instead: modules are left that were chosen at least so often,
      relative to the mean of their layer.
    gates: 'keep' or 'renormalise'; see `modules_pruned`.
    expert_parts: parts of the mesh axis `expert` that modules will lie on.

  Raises:
    FileExistsError: the target is there.
    FileNotFoundError: the source or the usage is not there.
    ValueError: modules that cannot go. Nothing is written then.
  """
  modules_folder.check_target(target)
  if (fraction is None) == (threshold is None):
    raise ValueError(
      'Modules are left by a fraction or by a threshold, but '
      f'--fraction is {fraction} and --threshold is {threshold}. Give one.'
    )
  opened = modules_folder.open_source(source)
  measured = module_usage.read(pathlib.Path(usage))
  layers = module_surgery.module_layers(opened.config)
  if not layers:
    # Which says what is missing.
    modules_pruned.prune(opened.config, {}, GATES[gates])
  _check_measured(measured, opened, layers)
  kept = {}
  for one in layers:
    counts = measured.layers[one.place].counts
    if fraction is not None:
      kept[one.place] = modules_pruned.most_used(one, counts, fraction)
    else:
      kept[one.place] = modules_pruned.above_threshold(
        one, counts, threshold, expert_parts
      )
  config, edits = modules_pruned.prune(opened.config, kept, GATES[gates])
  smaller = module_surgery.module_layers(config)
  _check_parts(smaller, expert_parts)
  rule = {
    'operation': 'prune',
    'task': measured.task,
    'fraction': fraction,
    'threshold': threshold,
    'gates': gates,
    'kept': kept,
  }
  reason = modules_folder.write(target, opened, config, edits, rule)
  _show(opened, target, smaller, reason)


def usage(
  *,
  checkpoint_path: str,
  output_dir: str,
  data: data_config.DataConfig,
  num_batches: int | None = None,
) -> module_usage.Usage:
  """Counts on a task how often each module is chosen; padding does not count.

  Prints a table, and writes usage.json and usage.png.

  Args:
    checkpoint_path: a model folder (its latest checkpoint), or one checkpoint.
    output_dir: where the files go.
    data: the task; every example is read once, in order, and of running text
      every token once.
    num_batches: at most so many; None: all.

  Raises:
    FileNotFoundError: no model, or no such task.
    ValueError: a model without modules.
  """
  # Only here: matplotlib takes a second to load.
  from mowe.evaluation import module_usage_figure

  opened = modules_folder.open_source(checkpoint_path)
  if not module_surgery.module_layers(opened.config):
    raise ValueError(
      'The model must have layers of modules, but has none. Take a model that '
      'was trained with MoeLayer or with attention modules.'
    )
  loaded = model_folder.load(str(opened.checkpoint))
  batches = itertools.islice(_batches(data, loaded), num_batches)
  with show_progress.counting('rows') as progress:
    layers = module_usage.count(loaded.model, loaded.params, batches, progress)
  places = [one.place for one in module_surgery.module_layers(opened.config)]
  measured = module_usage.Usage(
    {place: layers[place] for place in places},
    str(data.mixture_or_task_name),
    opened.named(),
  )
  folder = pathlib.Path(output_dir)
  folder.mkdir(parents=True, exist_ok=True)
  content = json.dumps(module_usage.to_json(measured), indent=2) + '\n'
  atomic_files.write_atomically(
    folder / module_usage.FILE_NAME, content.encode()
  )
  module_usage_figure.draw(measured, folder / _PICTURE)
  _print(_usage_table(measured))
  print(f'{folder / module_usage.FILE_NAME}, {folder / _PICTURE}')
  return measured


def _batches(data, loaded) -> Iterator[dict[str, np.ndarray]]:
  """Every example or every token once."""
  config = loaded.model.config
  cache = data.open_cache(data.mixture_or_task_name, loaded.vocabulary)
  if 'inputs' in cache.features or 'encoder' in config.streams:
    batches = data.open(loaded.vocabulary, config).eval_batches()
    router = evaluations.make_router(config, [], {})
    yield from (router(batch)[0] for batch in batches)
    return
  text, length = cache.flat('targets'), data.task_feature_lengths['targets']
  if config.memory_length:
    yield from lm_batches.segments(text, data.batch_size, length)
  else:
    yield from lm_batches.sliding_windows(text, data.batch_size, length, length)


def _check_measured(measured, opened, layers):
  places = {one.place for one in layers}
  same = measured.model.get('manifest_sha256') == opened.digest
  if not same or set(measured.layers) != places:
    raise ValueError(
      'The usage must be that of the model to be pruned, '
      f'{opened.checkpoint}, but is of step {measured.model.get("step")} of '
      f'{measured.model.get("folder")} (another manifest). Measure this very '
      'model: `mowe modules usage`.'
    )


def _check_parts(layers, parts):
  """Raises unless every number of modules divides among so many devices."""
  wrong = {
    one.place: one.num_modules for one in layers if one.num_modules % parts
  }
  if wrong:
    place, number = next(iter(wrong.items()))
    raise ValueError(
      f'Modules must divide evenly among the {parts} parts of the mesh axis '
      f'`expert`, but {place} would have {number}. Make it '
      f'{-(-number // parts) * parts}, or change --expert_parts.'
    )


def _show(opened, target, layers, reason):
  table = rich.table.Table(box=None, pad_edge=False)
  table.add_column('layer')
  table.add_column('modules before', justify='right')
  table.add_column('now', justify='right')
  before = {
    one.place: one.num_modules
    for one in module_surgery.module_layers(opened.config)
  }
  for one in layers:
    table.add_row(one.place, f'{before[one.place]}', f'{one.num_modules}')
  _print(table)
  fate = 'kept' if reason is None else f'left out. {reason}'
  print(f'Optimizer  state {fate}')
  print(f'Read       {opened.checkpoint}, which stays as it is')
  print(f'Written    {target}, step {opened.step:,}')


def _usage_table(measured) -> rich.table.Table:
  table = rich.table.Table(box=None, pad_edge=False)
  table.add_column('layer')
  names = (
    'modules',
    'tokens',
    'most used',
    'least used',
    'unused',
    'effective',
  )
  for name in names:
    table.add_column(name, justify='right')
  for place, layer in measured.layers.items():
    shares = layer.shares
    table.add_row(
      place,
      f'{len(shares)}',
      f'{layer.num_tokens:,}',
      f'{max(shares):.1%}',
      f'{min(shares):.1%}',
      f'{sum(count == 0 for count in layer.counts)}',
      f'{layer.num_effective:.1f}',
    )
  return table


def _print(table):
  console = rich.console.Console(highlight=False, soft_wrap=True)
  console.width = max(console.width, _WIDTH)
  console.print(table)
