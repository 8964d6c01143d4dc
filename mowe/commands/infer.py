"""`mowe infer`: writes a model's prediction for every example of a task."""

import json
import pathlib
from typing import Any

from mowe.commands import data_config
from mowe.model_folders import model_folder
from mowe.models import decoding
from mowe.stores import expert_stores
from mowe.training import manifests, progress_lines
from mowe.words import atomic_files, json_files, writer_locks

# Number of batches whose predictions are written together. A run that was
# stopped has to repeat at most these.
_BATCHES_AT_ONCE = 8


def infer(
  *,
  checkpoint_path: str,
  output_dir: str,
  data: data_config.DataConfig,
  store: expert_stores.Store | None = None,
  strategy: decoding.Strategy = decoding.Greedy(),
) -> pathlib.Path:
  """Writes one line of JSON for each example, in the order of the task.

  A run that was stopped continues after the last complete line of its file. A
  text without any token has an empty prediction, and no score.

  Args:
    checkpoint_path: a model folder (its latest checkpoint), or one checkpoint.
    output_dir: folder for <task>-predictions.jsonl.
    data: a token cache with inputs, or a token cache of text. Each text is cut
      to the length of 'inputs', and the model continues it.
    store: where the word experts lie. None: on the device, or on disk if they
      are larger than 4 GiB.
    strategy: how the tokens of a prediction are chosen.

  Returns:
    The path of the file. Each of its lines is a JSON object with "index",
    "inputs", "prediction" and "score".

  Raises:
    ValueError: the folder has predictions of another checkpoint, of other data,
      or with other settings.
    PlaceInUseError: another process writes in the folder.
  """
  with writer_locks.of_folder(output_dir):
    return _infer(checkpoint_path, output_dir, data, store, strategy)


def _infer(checkpoint_path, output_dir, data, store, strategy):
  loaded = model_folder.load(checkpoint_path, store)
  cache = data.open_verified(data.mixture_or_task_name, loaded.vocabulary)
  if 'inputs' not in data.task_feature_lengths:
    raise ValueError(
      'Lengths must say how many tokens of each text are read before it is '
      'continued, but task_feature_lengths, the macro TASK_FEATURE_LENGTHS, is '
      f"{dict(data.task_feature_lengths)}. Add 'inputs'."
    )
  generator = data.make_generator(
    loaded.model, loaded.params, strategy=strategy
  )
  name = pathlib.Path(data.mixture_or_task_name).name
  path = pathlib.Path(output_dir) / f'{name}-predictions.jsonl'
  _check_same(
    path,
    {
      'checkpoint': _digest(checkpoint_path, loaded.step),
      'step': loaded.step,
      'data': cache.fingerprint,
      'lengths': dict(data.task_feature_lengths),
      'strategy': repr(strategy),
    },
  )
  first = _keep_complete_lines(path)
  if first:
    print(f'{path} has {first:,} predictions; continuing after them.')
  group = data.batch_size * _BATCHES_AT_ONCE
  shown = progress_lines.Progress(
    cache.num_examples, first, log_period=group, unit='example'
  )
  decode = loaded.vocabulary.decode
  with path.open('a', encoding='utf-8') as file, shown:
    for start in range(first, cache.num_examples, group):
      indices = range(start, min(start + group, cache.num_examples))
      inputs = {index: _inputs(cache, index, data) for index in indices}
      asked = {index: tokens for index, tokens in inputs.items() if len(tokens)}
      found = {}
      if asked:
        generations = generator(list(asked.values()))
        scores = generations.scores.tolist()
        pairs = zip(generations.tokens, scores, strict=True)
        found = dict(zip(asked, pairs, strict=True))
      for index, tokens in inputs.items():
        output, score = found.get(index, ((), None))
        line = {
          'index': index,
          'inputs': decode(tokens),
          'prediction': decode(output),
          'score': score,
        }
        file.write(json.dumps(line, ensure_ascii=False) + '\n')
      file.flush()
      shown.update(indices[-1] + 1)
  print(f'{path}: {cache.num_examples:,} predictions.')
  return path


def _digest(checkpoint_path: str, step: int) -> str:
  """The digest of the checkpoint's manifest, which names all its files."""
  folder, _ = model_folder.split_checkpoint_path(checkpoint_path)
  manifest = folder / f'checkpoint_{step}' / manifests.FILE_NAME
  return manifests.digest(manifest)


def _check_same(path: pathlib.Path, described: dict[str, Any]) -> None:
  """Raises ValueError if the predictions that are there are of another run.

  A file beside them says what they are of; it is written if there are none.
  """
  file = path.with_suffix('.json')
  if path.exists():
    old = {}
    if file.exists():
      old = json_files.read_object(file, f'Remove it and {path}.')
    different = [
      f'{name} ({old.get(name, "unknown")} there, {value} now)'
      for name, value in described.items()
      if old.get(name) != value
    ]
    if different:
      raise ValueError(
        f'{path} must hold predictions of this run to be continued, but differs '
        f'in {", ".join(different)}. Give another INFER_OUTPUT_DIR, or remove '
        'that file.'
      )
  content = json.dumps(described, indent=2) + '\n'
  atomic_files.write_atomically(file, content.encode())


def _inputs(cache, index, data):
  """The inputs of an example, or the beginning of a text to be continued."""
  if 'inputs' in cache.features:
    return cache.tokens('inputs', index)
  # The EOS is left out: after it a language model begins another text.
  tokens = cache.tokens('targets', index)[:-1]
  return tokens[: data.task_feature_lengths['inputs']]


def _keep_complete_lines(path: pathlib.Path) -> int:
  """Cuts off a half-written last line; returns how many lines are left."""
  if not path.exists():
    return 0
  content = path.read_bytes()
  end = content.rfind(b'\n') + 1
  if end != len(content):
    with path.open('r+b') as file:
      file.truncate(end)
  return content[:end].count(b'\n')
