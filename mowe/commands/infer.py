"""`mowe infer`: writes a model's prediction for every example of a task."""

import json
import pathlib

from mowe.commands import data_config
from mowe.model_folders import model_folder
from mowe.models import decoding
from mowe.stores import expert_stores
from mowe.training import progress_lines

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

  A run that was stopped continues after the last complete line of its file.

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
  """
  loaded = model_folder.load(checkpoint_path, store)
  cache = data.open_cache(data.mixture_or_task_name, loaded.vocabulary)
  generator = data.make_generator(
    loaded.model, loaded.params, strategy=strategy
  )
  name = pathlib.Path(data.mixture_or_task_name).name
  path = pathlib.Path(output_dir) / f'{name}-predictions.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  first = _keep_complete_lines(path)
  if first:
    print(f'{path} has {first:,} predictions; continuing after them.')
  group = data.batch_size * _BATCHES_AT_ONCE
  shown = progress_lines.Progress(cache.num_examples, first, log_period=group)
  decode = loaded.vocabulary.decode
  with path.open('a', encoding='utf-8') as file, shown:
    for start in range(first, cache.num_examples, group):
      indices = range(start, min(start + group, cache.num_examples))
      inputs = [_inputs(cache, index, data) for index in indices]
      generations = generator(inputs)
      for index, tokens, output, score in zip(
        indices,
        inputs,
        generations.tokens,
        generations.scores.tolist(),
        strict=True,
      ):
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
