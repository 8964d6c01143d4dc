"""Token caches keep tokenised examples in a folder of memory-mapped arrays.

The files of a cache are:
  cache.json             the recipe (what went in), its fingerprint, and size,
                         dtype and sha256 of every array (what came out);
  <feature>.tokens.bin   the tokens of all examples, one after another;
  <feature>.offsets.bin  <int64>[examples + 1], where each begins and ends;
  records.jsonl          the fields that evaluation needs, a line per example;
  records.offsets.bin    <int64>[examples + 1], where each line begins and ends;
  *.checksums.bin        <uint32>[blocks], the CRC-32 of each block of 64 KiB of
                         the array of that name (see `verified_array`).

The folder is written under another name beside its place and renamed at the
end, so that a build that was interrupted never looks finished.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mowe.data.caches import verified_array
from mowe.words import (
  atomic_files,
  base_vocabulary,
  json_files,
  terminations,
  writer_locks,
)

FORMAT_VERSION = 3
_SUMMARY = 'cache.json'
# The ending of the name of a cache that is being replaced.
_OLD = '.old'
_BUILD_AGAIN = 'Remove the folder, and build the cache again.'
# Vocabularies up to this size are stored as uint16, larger ones as int32. Both
# are read without a copy.
_SMALL = 1 << 16
# Bytes of a file that are digested at a time.
_BLOCK = 1 << 24


def digest_of(content: bytes) -> str:
  """Returns the sha256 of some bytes as hex digits."""
  return hashlib.sha256(content).hexdigest()


def fingerprint_of(recipe: Mapping[str, Any]) -> str:
  """Returns the sha256 of a recipe, written as JSON with sorted keys."""
  text = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
  return digest_of(text.encode())


def describe_vocabulary(subwords: base_vocabulary.Vocabulary) -> dict[str, Any]:
  """Returns what a cache depends on of its vocabulary, for its recipe."""
  return {
    'sha256': subwords.sha256,
    'size': int(subwords.size),
    'extra_ids': int(subwords.extra_ids),
    'sentinels': [
      subwords.sentinels.start,
      subwords.sentinels.stop,
      subwords.sentinels.step,
    ],
    'eos_id': int(subwords.eos_id),
  }


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """A finished cache, opened for reading. Make one with `TokenCache.open`.

  Attributes:
    path: the folder.
    summary: the content of cache.json.
  """

  path: pathlib.Path
  summary: Mapping[str, Any]

  @classmethod
  def open(
    cls,
    path: str | os.PathLike,
    subwords: base_vocabulary.Vocabulary | None = None,
  ) -> 'TokenCache':
    """Opens a cache and checks the sizes of its files.

    Args:
      path: the folder of the cache.
      subwords: the vocabulary that it must have been made with; None accepts
        any.

    Raises:
      ValueError: there is no finished cache, it has another format or
        vocabulary, or a file is not what cache.json says.
    """
    path = pathlib.Path(path)
    if not (path / _SUMMARY).is_file():
      raise ValueError(
        f'A token cache must hold {_SUMMARY}, but {path} has none: it is no '
        'cache, or its build was interrupted. Build it with '
        '`mowe cache-task`.'
      )
    summary = json_files.read_object(path / _SUMMARY, _BUILD_AGAIN)
    version = summary.get('recipe', {}).get('format_version')
    if version != FORMAT_VERSION:
      raise ValueError(
        f'The format of a token cache must be version {FORMAT_VERSION}, but '
        f'{path} has version {version}. Build it again with this release.'
      )
    cache = cls(path, summary)
    if subwords is not None:
      cache.check_vocabulary(subwords)
    cache._check_files()
    return cache

  @property
  def kind(self) -> str:
    """The kind of the examples.

    Examples of 'text' and 'language_model' are texts; those of 'questions' and
    'text_to_text' have inputs and targets.
    """
    kind = self.summary['recipe']['kind']
    if kind == 'seqio':  # The recipe was written before any example was seen.
      kind = 'text_to_text' if 'inputs' in self.features else 'text'
    return kind

  @property
  def fingerprint(self) -> str:
    """The sha256 of the recipe."""
    return self.summary['fingerprint']

  @property
  def vocabulary(self) -> Mapping[str, Any]:
    """The vocabulary: sha256, size, extra_ids, sentinels and eos_id."""
    return self.summary['recipe']['vocabulary']

  @property
  def metric(self) -> str:
    """The metric of these questions, by its name in `text_metrics.METRICS`."""
    return self.summary['recipe'].get('metric', 'squad')

  @property
  def num_examples(self) -> int:
    """Number of examples."""
    return self.summary['num_examples']

  @property
  def features(self) -> tuple[str, ...]:
    """Names of the features, such as 'inputs' and 'targets'."""
    names = [name.split('.')[0] for name in self.summary['arrays']]
    return tuple(dict.fromkeys(name for name in names if name != 'records'))

  @property
  def totals(self) -> Mapping[str, int]:
    """Counts of the text before it was tokenised; {} if none were taken."""
    return self.summary.get('totals', {})

  @property
  def sentinels(self) -> range:
    """The ids of the sentinels, see `Vocabulary.sentinels`."""
    return range(*self.vocabulary['sentinels'])

  def check_vocabulary(self, subwords: base_vocabulary.Vocabulary) -> None:
    """Raises ValueError unless the cache was made with this vocabulary."""
    wanted = describe_vocabulary(subwords)
    if dict(self.vocabulary) != wanted:
      raise ValueError(
        'A cache must be used with the vocabulary it was made with, but '
        f'{self.path} was made with {dict(self.vocabulary)} and the '
        f'vocabulary given is {wanted}. Give the other vocabulary, or build '
        'the cache again with this one.'
      )

  def flat(self, feature: str) -> np.ndarray:
    """Returns all examples of a feature, <uint16 or int32>[total], at once."""
    return self.stream(feature).whole()

  def stream(self, feature: str) -> verified_array.VerifiedArray:
    """Returns all examples of a feature, as `flat`, to be read in parts."""
    return self._array(f'{feature}.tokens')

  def offsets(self, feature: str) -> np.ndarray:
    """Returns the bounds of examples in `flat`, <int64>[num_examples + 1]."""
    return self._array(f'{feature}.offsets').whole()

  def lengths(self, feature: str) -> np.ndarray:
    """Returns the length of each example, <int64>[num_examples]."""
    return np.diff(self.offsets(feature))

  def tokens(self, feature: str, index: int) -> np.ndarray:
    """Returns one example of a feature with its EOS, <int32>[length]."""
    start, end = self.offsets(feature)[index : index + 2]
    return self.stream(feature)[start:end].astype(np.int32)

  def spans(self, index: int) -> np.ndarray:
    """Returns the salient spans of a text, in tokens, <int32>[num_spans, 2]."""
    return self.tokens('spans', index).reshape(-1, 2)

  def record(self, index: int) -> dict[str, Any]:
    """Returns the fields of an example kept for evaluation; {} if none are."""
    if 'records.offsets' not in self.summary['arrays']:
      return {}
    start, end = self.offsets('records')[index : index + 2].tolist()
    with open(self.path / 'records.jsonl', 'rb') as file:
      file.seek(start)
      return json.loads(file.read(end - start))

  def records(self) -> Iterator[dict[str, Any]]:
    """Yields the records of all examples in order."""
    if 'records.offsets' not in self.summary['arrays']:
      yield from ({} for _ in range(self.num_examples))
      return
    with open(self.path / 'records.jsonl', 'rb') as file:
      yield from map(json.loads, file)

  @functools.cached_property
  def _arrays(self) -> dict[str, verified_array.VerifiedArray]:
    return {}

  def _array(self, name: str) -> verified_array.VerifiedArray:
    if name not in self._arrays:
      if name not in self.summary['arrays']:
        raise ValueError(
          f'This use needs the feature {name.split(".")[0]!r}, but the cache '
          f'{self.path} of kind {self.kind!r} has only {self.features}. '
          'Build a cache of the kind that the task needs.'
        )
      path = self.path / self.summary['arrays'][name]['file']
      self._arrays[name] = verified_array.VerifiedArray(
        self._mapped(name), self._mapped(f'{name}.checksums'), path
      )
    return self._arrays[name]

  def _mapped(self, name: str) -> np.ndarray:
    about = self.summary['arrays'][name]
    shape, dtype = (about['length'],), np.dtype(about['dtype'])
    # An empty file cannot be mapped.
    if not about['length']:
      return np.zeros(shape, dtype)
    mapped = np.memmap(self.path / about['file'], dtype, 'r', shape=shape)
    # A part of a memmap takes several times as long to make.
    return mapped.view(np.ndarray)

  def verify(self, is_over: Callable[[], bool] = lambda: False) -> None:
    """Compares every file with its digest, which reads all of them.

    Args:
      is_over: asked from time to time; if it is True, the rest is left out.

    Raises:
      ValueError: a file is not what it was when the cache was built.
    """
    for about in self.summary['arrays'].values():
      path = self.path / about['file']
      found = _digest(path, is_over)
      if found not in (None, about['sha256']):
        raise ValueError(
          f'{path} must have the sha256 of {_SUMMARY}, {about["sha256"]}, '
          f'but has {found}: the file has changed. Build the cache again '
          '(--overwrite).'
        )

  def _check_files(self) -> None:
    for about in self.summary['arrays'].values():
      path = self.path / about['file']
      wanted = about['length'] * np.dtype(about['dtype']).itemsize
      found = path.stat().st_size if path.is_file() else None
      if found != wanted:
        raise ValueError(
          f'{path} must have {wanted} bytes, but '
          f'{"is missing" if found is None else f"has {found}"}. Build the '
          'cache again (--overwrite).'
        )


class CacheWriter:
  """Writes a cache group by group; `build_cache` makes and finishes a writer.

  Args:
    folder: the folder to write to.
    recipe: what goes into the cache, for cache.json.
  """

  def __init__(self, folder: pathlib.Path, recipe: Mapping[str, Any]):
    self._folder = folder
    self._recipe = recipe
    size = recipe['vocabulary']['size']
    self._token_dtype = np.dtype(np.uint16 if size <= _SMALL else np.int32)
    self._files: dict[str, Any] = {}
    self._ends: dict[str, list[np.ndarray]] = {}
    self._totals: dict[str, int] = {}
    self._num_examples: dict[str, int] = {}
    self._record_sizes: list[int] = []
    self._has_records = False
    self._summed: dict[str, int] = {}

  def add(
    self,
    features: Mapping[str, tuple[np.ndarray, np.ndarray]],
    records: Sequence[Mapping[str, Any]],
    totals: Mapping[str, int] | None = None,
  ) -> None:
    """Appends a group of examples.

    Args:
      features: for each feature all tokens <int>[total] of the group, and the
        length of each example <int>[group].
      records: the fields to be kept of each example, possibly none.
      totals: counts of the text that the group was made from, which are summed
        over groups; None counts nothing.
    """
    for name, count in (totals or {}).items():
      self._summed[name] = self._summed.get(name, 0) + count
    for name, (tokens, lengths) in features.items():
      if name not in self._files:
        self._files[name] = open(self._folder / f'{name}.tokens.bin', 'wb')
        self._ends[name], self._totals[name] = [], 0
      ends = self._totals[name] + np.cumsum(lengths, dtype=np.int64)
      self._files[name].write(tokens.astype(self._dtype_of(name)).tobytes())
      self._ends[name].append(ends)
      self._totals[name] += len(tokens)
      self._num_examples[name] = self._num_examples.get(name, 0) + len(lengths)
    if 'records' not in self._files:
      self._files['records'] = open(self._folder / 'records.jsonl', 'wb')
    for record in records:
      line = json.dumps(record, ensure_ascii=False).encode() + b'\n'
      self._files['records'].write(line)
      self._record_sizes.append(len(line))
      self._has_records |= bool(record)

  def finish(self) -> None:
    """Writes offsets and cache.json and forces all of it to the disk."""
    counts = set(self._num_examples.values())
    if not counts or counts == {0}:
      raise ValueError(
        'A cache must hold at least one example, but no record was left '
        'after reading and filtering. Check the files and the fields.'
      )
    assert counts == {len(self._record_sizes)}, counts
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
      file.close()
    arrays = {}
    for name in self._ends:
      dtype, length = self._dtype_of(name), self._totals[name]
      arrays[f'{name}.tokens'] = self._describe(
        f'{name}.tokens.bin', dtype, length
      )
      tokens = np.zeros(0, dtype)
      if length:
        tokens = np.memmap(self._folder / f'{name}.tokens.bin', dtype, 'r')
      arrays[f'{name}.tokens.checksums'] = self._write_checksums(
        f'{name}.tokens', tokens
      )
      arrays |= self._write_offsets(
        name, np.concatenate([[0], *self._ends[name]])
      )
    if self._has_records:
      ends = np.cumsum([0, *self._record_sizes])
      arrays['records.tokens'] = self._describe(
        'records.jsonl', np.dtype(np.uint8), int(ends[-1])
      )
      arrays |= self._write_offsets('records', ends)
    else:
      (self._folder / 'records.jsonl').unlink()
    summary = {
      'fingerprint': fingerprint_of(self._recipe),
      'num_examples': counts.pop(),
      'recipe': dict(self._recipe),
      'arrays': arrays,
    }
    if self._summed:
      summary['totals'] = self._summed
    with open(self._folder / _SUMMARY, 'w', encoding='utf-8') as file:
      json.dump(summary, file, indent=2, ensure_ascii=False)
      file.flush()
      os.fsync(file.fileno())

  def close(self) -> None:
    """Closes the files; it may be called after `finish`."""
    for file in self._files.values():
      file.close()

  def _dtype_of(self, name: str) -> np.dtype:
    # Spans are positions in a text, which the vocabulary's size does not bound.
    return np.dtype(np.int32) if name == 'spans' else self._token_dtype

  def _write_offsets(self, name: str, ends: np.ndarray) -> dict[str, Any]:
    name, ends = f'{name}.offsets', ends.astype(np.int64)
    return {
      name: self._write(f'{name}.bin', ends),
      f'{name}.checksums': self._write_checksums(name, ends),
    }

  def _write_checksums(self, name: str, array: np.ndarray) -> dict[str, Any]:
    return self._write(f'{name}.checksums.bin', verified_array.checksums(array))

  def _write(self, name: str, array: np.ndarray) -> dict[str, Any]:
    with open(self._folder / name, 'wb') as file:
      file.write(array.tobytes())
      file.flush()
      os.fsync(file.fileno())
    return self._describe(name, array.dtype, len(array))

  def _describe(
    self, name: str, dtype: np.dtype, length: int
  ) -> dict[str, Any]:
    return {
      'file': name,
      'dtype': dtype.str,
      'length': length,
      'sha256': _digest(self._folder / name),
    }


def has_other_format(path: str | os.PathLike) -> bool:
  """Returns whether there is a cache that another version of mowe has built."""
  summary = pathlib.Path(path) / _SUMMARY
  if not summary.is_file():
    return False
  recipe = json_files.read_object(summary, _BUILD_AGAIN).get('recipe', {})
  return recipe.get('format_version') != FORMAT_VERSION


def find_finished(
  path: str | os.PathLike, recipe: Mapping[str, Any], overwrite: bool
) -> TokenCache | None:
  """Returns the cache at `path` if it was made by this recipe.

  Args:
    path: the folder of the cache.
    recipe: what the cache must have been made from.
    overwrite: returns None for a cache of another recipe instead of raising.

  Returns:
    The cache, or None if there is none and one is to be built.

  Raises:
    ValueError: there is a cache of another recipe and `overwrite` is False, or
      a folder that is no cache.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return None
  summary = path / _SUMMARY
  if not summary.is_file():
    if path.is_dir() and not any(path.iterdir()):
      return None
    # The folder is never removed, not even to overwrite, because it may hold
    # other things.
    raise ValueError(
      f'A cache is written to a new folder, but {path} exists and is no '
      'token cache. Choose another path, or remove it yourself.'
    )
  old = json_files.read_object(summary, _BUILD_AGAIN)
  if old['fingerprint'] == fingerprint_of(recipe):
    return TokenCache.open(path)
  if overwrite:
    return None
  raise ValueError(
    f'The cache at {path} must have been made from the same things, but '
    f'{_differences(old["recipe"], recipe)} (fingerprint old '
    f'{old["fingerprint"][:12]}, new {fingerprint_of(recipe)[:12]}). Choose '
    'another path, or replace it with --overwrite.'
  )


@contextlib.contextmanager
def build_cache(
  path: str | os.PathLike, recipe: Mapping[str, Any]
) -> Iterator[CacheWriter]:
  """Context of a writer whose cache appears at `path` when the block ends.

  An exception inside the block leaves `path` as it was.
  """
  path = pathlib.Path(path).absolute()
  with (
    atomic_files.naming(path),
    writer_locks.of_path(path),
    terminations.cleaning_up(),
  ):
    yield from _build_cache(path, recipe)


def _build_cache(
  path: pathlib.Path, recipe: Mapping[str, Any]
) -> Iterator[CacheWriter]:
  # What a process that was killed has left. Nobody else writes here now.
  for left in path.parent.glob(f'.{glob.escape(path.name)}.building-*'):
    if left.suffix == _OLD and not path.exists():
      left.rename(path)
      raise FileExistsError(
        f'A process that was replacing {path} was killed before the new cache '
        'had its name; the old one is back. Run the same command again.'
      )
    else:
      shutil.rmtree(left, ignore_errors=True)
  folder = pathlib.Path(
    tempfile.mkdtemp(prefix=f'.{path.name}.building-', dir=path.parent)
  )
  writer = CacheWriter(folder, recipe)
  try:
    yield writer
    writer.finish()
    atomic_files.sync(folder)
    folder.chmod(0o755)  # Only one user can read a folder of mkdtemp.
    if path.exists():
      # A folder cannot be renamed over one that is not empty.
      old = folder.with_name(folder.name + _OLD)
      path.rename(old)
      try:
        folder.rename(path)
      except BaseException:
        old.rename(path)
        raise
      atomic_files.sync(path.parent)
      shutil.rmtree(old)
    else:
      folder.rename(path)
      atomic_files.sync(path.parent)
  finally:
    writer.close()
    shutil.rmtree(folder, ignore_errors=True)


def _digest(
  path: pathlib.Path, is_over: Callable[[], bool] = lambda: False
) -> str | None:
  """The sha256 of a file; None if it is over before the end."""
  digest = hashlib.sha256()
  with path.open('rb') as file:
    while block := file.read(_BLOCK):
      if is_over():
        return None
      digest.update(block)
  return digest.hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  parts = [
    f'{name} was {old.get(name)} and is now {new.get(name)}'
    for name in sorted({*old, *new})
    if old.get(name) != new.get(name)
  ]
  return '; '.join(parts)
