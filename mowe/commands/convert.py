"""`mowe convert`: converts the weights of a model to another format.

What was written is read again and compared with the source.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import flax
import numpy as np
import rich.console
import rich.table

from mowe.interop import (
  huggingface,
  huggingface_tokenizer,
  mowe_safetensors,
  new_folder,
  safetensors_folder,
  tokenizer_json,
  weights,
)
from mowe.interop.t5x import t5x_checkpoint, t5x_legacy, t5x_orbax, t5x_tree
from mowe.model_folders import model_folder, model_weights
from mowe.models.surgery import baked_experts
from mowe.models.t5 import t5_config
from mowe.training import manifests
from mowe.words import sentencepiece_vocabulary, subword_vocabularies

# Minimum width of a table. When the output goes to a file, rich would
# otherwise cut off the names of parameters.
_WIDTH = 110

# Formats whose checkpoints do not describe their model.
_WITHOUT_CONFIG = ('t5x', 't5x-orbax')

_SPIECE, _TOKENIZER = 'spiece.model', 'tokenizer.json'
# Of tokens that are lost, so many are named.
_MOST_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Format:
  """A format that can be read and written.

  Attributes:
    title: name of the format in messages.
    opened: takes a path, and returns a context manager that gives the weights.
      Their arrays can be read only while the context is open.
    save: writes weights to a new folder.
    is_rounded: whether the weights can be written in bfloat16.
  """

  title: str
  opened: Callable[..., AbstractContextManager[weights.Weights]]
  save: Callable[[pathlib.Path, weights.Weights], Any]
  is_rounded: bool = True


def convert(
  source: str,
  target: str,
  to: str,
  *,
  dtype: str = 'float32',
  vocabulary: str | None = None,
  extra_ids: int | None = None,
  like: str | None = None,
  bake: bool = False,
) -> None:
  """Converts weights, and prints what was read and written.

  Args:
    source: a model folder or a checkpoint in it, a folder of safetensors, or a
      checkpoint of T5X. Its files tell which of them it is.
    target: the folder to write, which must not exist.
    to: the format to write, a key of `FORMATS`.
    dtype: 'float32', or 'bfloat16' to round the weights to it.
    vocabulary: path of a subword vocabulary, or 'bytes', for a source without a
      vocabulary.
    extra_ids: number of sentinels of `vocabulary`, or of the spiece.model in
      the source. None: as many as the model's own vocabulary has, or its
      tokenizer says, or 100 if it has none as pieces.
    like: a folder that describes the model, for a source that does not.
    bake: whether experts that see nothing but a token's row become a table; see
      `baked_experts`. The optimizer's state is then left out.

  Raises:
    FileExistsError: the target exists.
    FileNotFoundError: the source, or a part of it, does not exist.
    ValueError: the source is damaged, incomplete or of an unknown format, or
      the format to write cannot hold the model. No target is left then.
  """
  _check_target(target, to)
  if dtype == 'bfloat16' and not FORMATS[to].is_rounded:
    raise ValueError(
      'Parameters of a model folder must be float32, but --dtype is bfloat16. '
      'Leave out --dtype; the macro DTYPE makes activations bfloat16.'
    )
  found = recognise(source)
  is_guess = found in _WITHOUT_CONFIG and like is None
  settings = _settings(source, found, vocabulary, extra_ids)
  with contextlib.ExitStack() as closing:
    given = _open(source, found, like, closing, settings)
    if vocabulary is not None:
      given = _with_vocabulary(given, vocabulary, extra_ids)
    if bake:
      config, params = baked_experts.baked(given.config, given.params)
      given = dataclasses.replace(
        given,
        config=config,
        params=params,
        moments=None,
        has_other_state=given.has_other_state or given.moments is not None,
      )
    written = given
    if dtype == 'bfloat16':
      rounded = weights.rounded(given.params)
      written = dataclasses.replace(given, params=rounded)
    FORMATS[to].save(pathlib.Path(target), written)
    try:
      digest = weights.digest(given.params)
      wanted = digest if written is given else _rounded_digest(given)
      again = _read_again(target, to, given, wanted)
    except BaseException:
      new_folder.remove(target)
      raise
    _show_parameters(given, written, is_guess)
    _show_folder('Read', source, found, given.step, digest)
    _show_folder('Written', target, to, again.step, wanted)
    if given.moments is not None:
      fate = 'left out' if again.moments is None else 'kept'
      print(f'Optimizer  state of Adafactor, {fate}')
  if given.has_other_state:
    print('Optimizer  state of another kind, left out')


def recognise(source: str | os.PathLike) -> str:
  """Returns the key in `FORMATS` of the format that `source` has.

  Raises:
    FileNotFoundError: `source` does not exist.
    ValueError: `source` has none of the formats, or is a checkpoint of mowe
      without its model folder.
  """
  path = pathlib.Path(source)
  if not path.exists():
    raise FileNotFoundError(
      f'The weights to convert must exist, but there is no {path}. Check the '
      'path.'
    )
  folder, _ = model_folder.split_checkpoint_path(os.fspath(path))
  if (folder / 'model.json').is_file():
    return 'mowe'
  if path.is_dir():
    names = sorted(one.name for one in path.iterdir())
    if safetensors_folder.is_candidate(names):
      return _kind_of_safetensors(path)
    checkpoint = t5x_checkpoint.find(path)
    # A checkpoint of TensorFlow also has a file `checkpoint`, as T5X's legacy
    # layout does; its *.index files tell it apart.
    if checkpoint is not None and not list(checkpoint.glob('*.index')):
      if (checkpoint / manifests.FILE_NAME).is_file():
        raise ValueError(
          'A checkpoint of mowe must have the model.json of its model folder '
          f'beside it, but {checkpoint.parent} has none. Fetch the whole model '
          'folder.'
        )
      is_legacy = (checkpoint / t5x_legacy.FILE_NAME).is_file()
      return 't5x' if is_legacy else 't5x-orbax'
    kinds = f'has {names[:10]}'
  else:
    kinds = 'is a file'
  raise ValueError(
    f'{path} must be a model folder (model.json), a folder of safetensors '
    '(config.json), or a checkpoint of T5X (a file checkpoint, or state/'
    f'_METADATA), but {kinds}. Give the folder of a complete one. Save a '
    'checkpoint of TensorFlow with t5x first.'
  )


def _check_target(target, to):
  """Raises unless a folder can be written to `target` and read from there."""
  new_folder.check_new(target)
  whole = pathlib.Path(target).resolve()
  _, step = model_folder.split_checkpoint_path(os.fspath(whole))
  if to == 'mowe' and step is not None:
    raise ValueError(
      'The name of a model folder must not be that of a checkpoint, but is '
      f'{whole.name}. Choose another.'
    )
  for folder in whole.parents:
    if (folder / 'model.json').is_file():
      raise ValueError(
        f'The target must not be in another model folder, but {target} is in '
        f'{folder}, which has a model.json. Choose another place.'
      )


def _settings(source, found, vocabulary, extra_ids) -> dict[str, Any]:
  """Options that open the source: the sentinels and vocabulary that are given.

  Raises ValueError if no vocabulary is there that could have them.
  """
  settings = {}
  if found == 'huggingface':
    settings['has_vocabulary'] = vocabulary is not None
    if (pathlib.Path(source) / _SPIECE).is_file() or _has_tokenizer(source):
      settings['extra_ids'] = extra_ids
  if extra_ids is not None and 'extra_ids' not in settings and not vocabulary:
    raise ValueError(
      '--extra_ids must be the sentinels of --vocabulary or of a spiece.model '
      f'or tokenizer.json in the source, but there is neither for {source}. '
      'Leave --extra_ids out, or give --vocabulary too.'
    )
  return settings


def _with_vocabulary(given, path, extra_ids) -> weights.Weights:
  """Adds a vocabulary; if the model has one already, it must be the same."""
  own = given.vocabulary
  if extra_ids is None and own is not None:
    extra_ids = own.extra_ids
  loaded = subword_vocabularies.load_subwords(path, extra_ids)
  if own is not None and (loaded.sha256, loaded.size) != (
    own.sha256,
    own.size,
  ):
    raise ValueError(
      '--vocabulary must be the same as that in the source, which has sha256 '
      f'{own.sha256} and {own.size:,} ids, but {path} has {loaded.sha256} and '
      f'{loaded.size:,} ids. Leave --vocabulary out.'
    )
  if given.config.routing is not None:
    given.config.routing.check_subwords(loaded)
  return dataclasses.replace(given, vocabulary=loaded)


def _open(source, found, like, closing, settings) -> weights.Weights:
  """Opens the weights; `like` names a folder with their config, or is None."""
  if like is None:
    return closing.enter_context(FORMATS[found].opened(source, **settings))
  if found not in _WITHOUT_CONFIG:
    raise ValueError(
      '--like is for checkpoints of T5X, which have no config, but '
      f'{source} is {FORMATS[found].title}, which has one. Leave --like out.'
    )
  config, vocabulary = _described(like)
  given = closing.enter_context(FORMATS[found].opened(source, config=config))
  return dataclasses.replace(given, vocabulary=vocabulary)


def _described(like):
  """Config and vocabulary of a folder that describes its model."""
  kind = recognise(like)
  if kind == 'mowe':
    folder, _ = model_folder.split_checkpoint_path(like)
    return model_folder.load_config(folder)
  with FORMATS[kind].opened(like) as other:
    return other.config, other.vocabulary


def _kind_of_safetensors(path):
  with contextlib.suppress(OSError, ValueError, RecursionError):
    described = json.loads((path / safetensors_folder.CONFIG).read_text())
    is_object = isinstance(described, dict)
    if is_object and described.get('model_type') == mowe_safetensors.MODEL_TYPE:
      return 'safetensors'
  # If config.json is damaged, the reader of this format says what is wrong.
  return 'huggingface'


def _rounded_digest(given) -> str:
  """Digest of the weights as they are after rounding, in their old dtypes.

  Reading a file casts its arrays to the dtypes of the parameters.
  """
  rounded = weights.rounded(given.params)
  return weights.digest(
    {
      path: weights.Cast(array, given.params[path].dtype)
      for path, array in rounded.items()
    }
  )


def _read_again(target, to, given, wanted) -> weights.Weights:
  """Reads the target, whose arrays are closed when this returns.

  Raises ValueError if the target does not hold what was to be written.
  """
  settings = {'config': given.config} if to in _WITHOUT_CONFIG else {}
  with FORMATS[to].opened(target, **settings) as again:
    moments = again.moments or {}
    if weights.digest(again.params) != wanted or any(
      weights.digest(arrays) != weights.digest(given.moments[name])
      for name, arrays in moments.items()
    ):
      raise ValueError(
        f'{target} must hold what was written to it, but reading it again '
        'gave something else. Check the disk; the target was removed.'
      )
    return again


def _show_parameters(given, written, is_guess):
  console = rich.console.Console(
    highlight=False, soft_wrap=True, color_system=None
  )
  console.width = max(console.width, _WIDTH)
  console.print(_table(given.params, written.params))
  name = t5x_tree.released_name(given.config)
  size = sum(math.prod(array.shape) for array in given.params.values())
  sizes = f', the sizes of {name}' if name else ''
  print(
    f'Model      {size:,} parameters in {len(given.params):,} arrays{sizes}'
  )
  if is_guess:
    activations = ', '.join(given.config.mlp_activations)
    print(
      f'           activations {activations}: guessed from the number of '
      'kernels, because a checkpoint of T5X does not name them'
    )


def _show_folder(what, path, kind, step, digest):
  print(f'{what:10} {path}: {FORMATS[kind].title}, step {step:,}')
  print(f'           sha256 {digest} of all weights')
  for file in sorted(pathlib.Path(path).glob('*.safetensors')):
    print(f'           sha256 {manifests.digest(file)} of {file.name}')


def _as_in_file(array):
  """The array of a `Cast`, which changes the dtype on reading; or any other."""
  return array.array if isinstance(array, weights.Cast) else array


def _table(read, written) -> rich.table.Table:
  """One row for all parameters whose names differ only in the layer number."""
  table = rich.table.Table(box=None, pad_edge=False)
  for name in ('parameters', 'arrays', 'shape', 'read as', 'written as'):
    table.add_column(name, justify='right' if name == 'arrays' else 'left')
  rows: dict[tuple, int] = {}
  for path, array in read.items():
    row = (
      re.sub(r'(?<=layers_)\d+', '*', '/'.join(path)),
      ' x '.join(map(str, array.shape)),
      str(np.dtype(_as_in_file(array).dtype)),
      str(np.dtype(written[path].dtype)),
    )
    rows[row] = rows.get(row, 0) + 1
  for (name, *rest), number in rows.items():
    table.add_row(name, f'{number:,}', *rest)
  return table


@contextlib.contextmanager
def _opened_huggingface(
  path, extra_ids=None, has_vocabulary=False
) -> Iterator[weights.Weights]:
  config, params = huggingface.load(path)
  flat = flax.traverse_util.flatten_dict(params)
  folder = pathlib.Path(path)
  with contextlib.ExitStack() as closing:
    spiece, vocabulary = folder / _SPIECE, None
    temporary = closing.enter_context(tempfile.TemporaryDirectory())
    made = pathlib.Path(temporary) / _SPIECE
    if not spiece.is_file() and _has_tokenizer(folder) and not has_vocabulary:
      spiece = made
      spiece.write_bytes(
        tokenizer_json.sentencepiece_model(folder / _TOKENIZER)
      )
    if spiece.is_file():
      vocabulary = _vocabulary_of(spiece, folder, extra_ids)
      added = huggingface_tokenizer.read(folder, vocabulary).added
      if added and _are_next(added.values(), vocabulary, config):
        made.write_bytes(
          tokenizer_json.with_added_tokens(
            spiece.read_bytes(), vocabulary.extra_ids, list(added)
          )
        )
        vocabulary = subword_vocabularies.load_subwords(made)
      elif added:
        _say_lost(list(added), spiece)
    yield weights.Weights(config, flat, vocabulary=vocabulary)


def _has_tokenizer(folder) -> bool:
  return (pathlib.Path(folder) / _TOKENIZER).is_file()


def _vocabulary_of(spiece, folder, extra_ids):
  """The vocabulary of a tokenizer, without tokens that were added to it."""
  vocabulary = subword_vocabularies.load_subwords(spiece, extra_ids)
  settings = huggingface_tokenizer.read(folder, vocabulary)
  if extra_ids is None and settings.extra_ids is not None:
    return subword_vocabularies.load_subwords(spiece, settings.extra_ids)
  return vocabulary


def _are_next(ids, vocabulary, config) -> bool:
  """Whether ids follow those of a vocabulary, and have embeddings."""
  end = vocabulary.size + len(ids)
  return [*ids] == [*range(vocabulary.size, end)] and end <= config.vocab_size


def _say_lost(added, spiece) -> None:
  named = ', '.join(map(repr, added[:_MOST_NAMED]))
  more = ', ...' if len(added) > _MOST_NAMED else ''
  print(
    f'Tokens that were added to the tokenizer are lost ({named}{more}), as their '
    'ids do not follow those of the pieces and sentinels, or the model has no '
    'embeddings for them: texts with them are read by the pieces of '
    f'{spiece.name} alone.'
  )


def _save_huggingface(folder, given):
  if not isinstance(given.config, t5_config.T5Config):
    raise ValueError(
      '--to huggingface must get a T5 or a Switch, the models that '
      'transformers has too, but this is a '
      f'{type(given.config).__name__}. Convert it with --to safetensors.'
    )
  dtypes = {np.dtype(array.dtype) for array in given.params.values()}

  def copy_vocabulary(partial):
    if isinstance(
      given.vocabulary, sentencepiece_vocabulary.SentencePieceVocabulary
    ):
      shutil.copyfile(given.vocabulary.path, partial / _SPIECE)

  huggingface.save(
    folder,
    given.config,
    flax.traverse_util.unflatten_dict(
      {path: array[...] for path, array in given.params.items()}
    ),
    dtype='bfloat16' if dtypes == {weights.BFLOAT16} else 'float32',
    attach=copy_vocabulary,
  )


@contextlib.contextmanager
def _opened_safetensors(path) -> Iterator[weights.Weights]:
  yield mowe_safetensors.load(path)


@contextlib.contextmanager
def _opened_t5x(path, config=None) -> Iterator[weights.Weights]:
  yield t5x_checkpoint.load(path, config)


FORMATS = {
  'mowe': Format(
    'a model folder of mowe',
    model_weights.opened,
    model_weights.save,
    is_rounded=False,
  ),
  'safetensors': Format(
    'a folder of safetensors of mowe',
    _opened_safetensors,
    mowe_safetensors.save,
  ),
  'huggingface': Format(
    'a folder of safetensors of transformers',
    _opened_huggingface,
    _save_huggingface,
  ),
  't5x': Format(
    'a checkpoint of T5X, legacy layout',
    _opened_t5x,
    lambda folder, given: t5x_checkpoint.save(folder, given, t5x_legacy),
  ),
  't5x-orbax': Format(
    'a checkpoint of T5X by Orbax',
    _opened_t5x,
    lambda folder, given: t5x_checkpoint.save(folder, given, t5x_orbax),
  ),
}
