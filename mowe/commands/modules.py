"""`mowe modules`: adds, prunes or measures the modules of a model."""

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
# Minimum width of a table. When the output goes to a file, rich would
# otherwise cut off the places of layers.
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
  """Writes a model with more modules. At first its outputs are the same.

  Args:
    source: a model folder or a checkpoint in it; it is only read.
    target: the model folder to write, which must not exist.
    mlp: number of new modules in every layer of MLP modules.
    attention: number of new modules in every layer of attention modules.
    k: number of new modules that each token meets.
    seed: the seed from which the inner kernels and the router columns of the
      new modules are drawn.
    expert_parts: the size of the mesh axis `expert`, over which the modules
      will be split evenly.

  Raises:
    FileExistsError: the target exists.
    FileNotFoundError: the source does not exist.
    ValueError: the modules cannot be added. Nothing is written then.
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
    target: the model folder to write, which must not exist.
    usage: path of the usage.json that `mowe modules usage` wrote for the same
      checkpoint.
    fraction: the share of the modules of each layer that is kept.
    threshold: can be given instead of `fraction`. Modules are kept that were
      chosen at least this often, relative to the mean of their layer.
    gates: 'keep' for `modules_pruned.KeepGates`, or 'renormalise' for
      `modules_pruned.Renormalise`.
    expert_parts: the size of the mesh axis `expert`, over which the modules
      will be split evenly.

  Raises:
    FileExistsError: the target exists.
    FileNotFoundError: the source or the usage does not exist.
    ValueError: the modules cannot be removed. Nothing is written then.
  """
  modules_folder.check_target(target)
  if (fraction is None) == (threshold is None):
    raise ValueError(
      'Either --fraction or --threshold must be given, but --fraction is '
      f'{fraction} and --threshold is {threshold}. Give exactly one of them.'
    )
  opened = modules_folder.open_source(source)
  measured = module_usage.read(pathlib.Path(usage))
  layers = module_surgery.module_layers(opened.config)
  if not layers:
    # This raises an error that says what the model lacks.
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
  """Counts how often the tokens of a task choose each module.

  Padding is not counted. Prints a table, and writes usage.json and usage.png.

  Args:
    checkpoint_path: a model folder (its latest checkpoint), or one checkpoint.
    output_dir: folder for the two files.
    data: the task. Every example is read once, in order; of running text every
      token is read once.
    num_batches: maximum number of batches; None: all of them.

  Returns:
    What was counted.

  Raises:
    FileNotFoundError: there is no model, or no token cache of the task.
    ValueError: the model has no modules.
  """
  # Imported only here: matplotlib takes a second to load.
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
  """Yields batches that hold every example, or every token of a text, once."""
  config = loaded.model.config
  cache = data.open_verified(data.mixture_or_task_name, loaded.vocabulary)
  if 'inputs' in cache.features or 'encoder' in config.streams:
    batches = data.open(loaded.vocabulary, config).eval_batches()
    router = evaluations.make_router(config, [], {})
    yield from (router(batch)[0] for batch in batches)
    return
  text, length = cache.stream('targets'), data.task_feature_lengths['targets']
  if config.memory_length:
    yield from lm_batches.segments(text, data.batch_size, length)
  else:
    yield from lm_batches.sliding_windows(text, data.batch_size, length, length)


def _check_measured(measured, opened, layers):
  """Raises ValueError unless the usage was measured with this checkpoint."""
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
  """Raises ValueError unless `parts` divides every layer's modules."""
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
  """Prints how many modules each layer has, and what was written."""
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
  console = rich.console.Console(
    highlight=False, soft_wrap=True, color_system=None
  )
  console.width = max(console.width, _WIDTH)
  console.print(table)
