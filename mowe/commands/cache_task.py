"""Builds a token cache, from local files or from a seqio task."""

import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from mowe.data.caches import (
  cache_builders,
  lm_cache,
  token_cache,
  unknown_tokens,
)
from mowe.data.text import (
  bad_records,
  claims,
  passages,
  record_fields,
  salient_spans,
  text_files,
)
from mowe.evaluation import text_metrics
from mowe.words import base_vocabulary, subword_vocabularies, terminal_text

TASK_MODULES = (
  'mowe.tasks.pretraining',
  'mowe.tasks.closed_book_qa',
  'mowe.tasks.glue',
  'mowe.tasks.super_glue',
)
# Starting a pool of processes takes longer than tokenising less text than this.
_BYTES_WORTH_WORKERS = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Building:
  """How a cache is built, whatever it is built from.

  Attributes:
    output: path of the folder to write.
    subwords: the vocabulary that tokenises.
    overwrite: whether a cache at `output` that was made from other things is
      replaced.
    num_workers: number of processes that tokenise; None takes one, and more for
      much text.
    progress: called with the number of records done so far; None reports
      nothing.
    bad: takes the errors of records that cannot be read.
  """

  output: str | os.PathLike
  subwords: base_vocabulary.Vocabulary
  overwrite: bool = False
  num_workers: int | None = None
  progress: Callable[[int], None] | None = None
  bad: bad_records.BadRecords = dataclasses.field(
    default_factory=bad_records.BadRecords
  )

  def describe(self, files: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what a fingerprint says of files, and of what is left out."""
    # The recipe names what is not the default alone.
    left_out = {'bad_records': 'skipped'} if self.bad.skip else {}
    return [source | left_out for source in text_files.describe_sources(files)]

  def options(self, num_bytes: int) -> dict[str, Any]:
    """Returns the arguments that builders share, for text of so many bytes."""
    num_workers = self.num_workers
    if num_workers is None:
      is_long = num_bytes > _BYTES_WORTH_WORKERS
      num_workers = min(os.cpu_count() or 1, 8) if is_long else 1
    return {
      'overwrite': self.overwrite,
      'num_workers': num_workers,
      'progress': self.progress,
    }


class CacheSource(Protocol):
  """What a cache is built from.

  Raises:
    ValueError: `build` found no text, or text that cannot be used.
  """

  def build(self, building: Building) -> token_cache.TokenCache:
    """Builds the cache, or opens the one that was built from the same."""


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """Texts for pretraining, with their salient spans.

  Attributes:
    files: paths or globs of files, see `text_files.read_records`.
    field: name of the field of records that holds the text.
    unit: what a text of a .txt file is, 'line' or 'paragraph'.
    cut: whether titles are put before texts, and how much of a text is kept.
  """

  kind: ClassVar[str] = 'text'
  files: Sequence[str]
  field: str = 'text'
  unit: str = 'line'
  cut: passages.Passages = passages.Passages()

  def build(self, building: Building) -> token_cache.TokenCache:
    """See `CacheSource.build`."""
    sources = building.describe(self.files)
    fields = record_fields.all_texts(
      filter(None, (self.field, self.cut.title_field))
    )
    return cache_builders.cache_text(
      text_files.read_records(
        self.files,
        fields,
        self.unit,
        check=self._check_spans,
        sources=sources,
        bad=building.bad,
      ),
      building.output,
      building.subwords,
      # The digest of a file does not tell how it was cut into records.
      sources=[{**source, 'unit': self.unit} for source in sources],
      field=self.field,
      cut=self.cut,
      **building.options(_num_bytes(sources)),
    )

  def _check_spans(self, record: dict[str, Any]) -> None:
    if record.get('spans') is not None:
      salient_spans.spans_of_record(record, self.field)


@dataclasses.dataclass(frozen=True)
class RunningTextFiles:
  """Running text for language models.

  Attributes:
    files: paths or globs of files, see `text_files.read_records`.
    field: name of the field of records that holds the text.
    unit: what one text is, 'line' or 'file' (see `lm_cache.cache_texts`).
  """

  kind: ClassVar[str] = lm_cache.KIND
  files: Sequence[str]
  field: str = 'text'
  unit: str = 'line'

  def build(self, building: Building) -> token_cache.TokenCache:
    """See `CacheSource.build`."""
    sources = building.describe(self.files)
    return lm_cache.cache_texts(
      self.files,
      building.output,
      building.subwords,
      field=self.field,
      unit=self.unit,
      sources=sources,
      bad=building.bad,
      **building.options(_num_bytes(sources)),
    )


@dataclasses.dataclass(frozen=True)
class QuestionFiles:
  """Questions and their answers.

  Attributes:
    files: paths or globs of files of records, see `text_files.read_records`.
    prompt: the text of the inputs, with fields of a record in braces.
    answers_field: name of the field that holds a list of answers, or one
      answer.
    metric: name of the metric that scores answers, 'squad' or 'trivia_qa'. The
      normalisation of the second takes a hyphen for a blank.
  """

  kind: ClassVar[str] = 'questions'
  files: Sequence[str]
  prompt: str = cache_builders.QUESTION_PROMPT
  answers_field: str = 'answers'
  metric: str = 'squad'

  def build(self, building: Building) -> token_cache.TokenCache:
    """See `CacheSource.build`."""
    text_metrics.of_name(self.metric)
    sources = building.describe(self.files)
    fields = {self.answers_field: record_fields.answers} | dict.fromkeys(
      cache_builders.fields_of(self.prompt), record_fields.text_or_number
    )
    return cache_builders.cache_questions(
      text_files.read_records(
        self.files, fields, sources=sources, bad=building.bad
      ),
      building.output,
      building.subwords,
      sources=sources,
      prompt=self.prompt,
      answers_field=self.answers_field,
      metric=self.metric,
      **building.options(_num_bytes(sources)),
    )


@dataclasses.dataclass(frozen=True)
class ClaimFiles:
  """Claims and their labels, in the format of FEVER.

  Attributes:
    files: paths or globs of files of records, see `text_files.read_records`.
  """

  kind: ClassVar[str] = 'claims'
  files: Sequence[str]

  def build(self, building: Building) -> token_cache.TokenCache:
    """See `CacheSource.build`."""
    sources = building.describe(self.files)
    records = text_files.read_records(
      self.files,
      record_fields.all_texts(claims.FIELDS),
      check=claims.as_question,
      sources=sources,
      bad=building.bad,
    )
    return cache_builders.cache_questions(
      map(claims.as_question, records),
      building.output,
      building.subwords,
      sources=sources,
      prompt=claims.PROMPT,
      **building.options(_num_bytes(sources)),
    )


@dataclasses.dataclass(frozen=True)
class SeqioTask:
  """A registered seqio task; building its cache loads TensorFlow.

  Attributes:
    seqio_task: name of the task.
    split: name of the split that is cached.
    task_modules: names of modules that are imported first, because they
      register the task.
    tfds_data_dir: folder where TFDS keeps its data sets; None takes the one of
      TFDS.
  """

  seqio_task: str
  split: str = 'train'
  task_modules: Sequence[str] = TASK_MODULES
  tfds_data_dir: str | None = None

  def build(self, building: Building) -> token_cache.TokenCache:
    """See `CacheSource.build`."""
    # The import is here because TensorFlow takes seconds to load.
    from mowe.data import seqio_stream

    if self.tfds_data_dir:
      _, seqio = seqio_stream.import_seqio()
      seqio.set_tfds_data_dir_override(self.tfds_data_dir)
    for name in self.task_modules:
      module = importlib.import_module(name)
      # The tasks of some modules depend on the vocabulary. These modules
      # register them in a function, others when they are imported.
      register = vars(module).get('register_tfds_tasks')
      if register is not None:
        register(building.subwords)
    # TFDS shows bars of its own while it prepares a data set.
    with terminal_text.steerable_output():
      return seqio_stream.cache_seqio_task(
        self.seqio_task,
        building.output,
        building.subwords,
        split=self.split,
        overwrite=building.overwrite,
        progress=building.progress,
      )


# What `mowe cache-task --kind` chooses from.
FILES_OF_KIND = {
  source.kind: source
  for source in (TextFiles, QuestionFiles, ClaimFiles, RunningTextFiles)
}


def cache_task(
  output: str | os.PathLike,
  vocabulary: str,
  source: CacheSource,
  *,
  extra_ids: int | None = None,
  overwrite: bool = False,
  num_workers: int | None = None,
  progress: Callable[[int], None] | None = None,
  skip_bad_records: bool = False,
) -> token_cache.TokenCache:
  """Builds a token cache.

  Args:
    output: path of the folder to write.
    vocabulary: path of a SentencePiece file, or 'bytes'.
    source: what the cache is built from, such as `TextFiles`.
    extra_ids: number of sentinels of the vocabulary; see
      `subword_vocabularies.load_subwords`.
    overwrite: whether a cache at `output` that was made from other things is
      replaced.
    num_workers: number of processes that tokenise; None takes one, and more for
      much text. A seqio task always has one.
    progress: called with the number of records done so far; None reports
      nothing.
    skip_bad_records: whether records of files that cannot be read are left out;
      it is then printed how many they were. A seqio task has none.

  Returns:
    The finished cache, opened.

  Raises:
    BadRecordError: a record cannot be read.
    ValueError: the source cannot be used, or another cache is at `output`.
  """
  subwords = subword_vocabularies.load_subwords(vocabulary, extra_ids)
  bad = bad_records.BadRecords(skip_bad_records)
  cache = source.build(
    Building(output, subwords, overwrite, num_workers, progress, bad)
  )
  bad.say()
  return cache


def describe(
  cache: token_cache.TokenCache, vocabulary: base_vocabulary.Vocabulary
) -> str:
  """Says in a line what a cache holds, and what its vocabulary cannot write."""
  tokens = ', '.join(
    f'{int(cache.lengths(name).sum()):,} tokens of {name}'
    for name in cache.features
    if name != 'spans'
  )
  said = (
    f'{cache.path}: {cache.num_examples:,} examples, {tokens}; '
    f'{unknown_tokens.share(cache):.2%} of the tokens are unknown to the '
    'vocabulary'
  )
  if number := unknown_tokens.num_unwritable(cache, vocabulary):
    said += f', which cannot write the answers to {number:,} of the questions'
  return f'{said}.'


def _num_bytes(sources) -> int:
  return sum(source['bytes'] for source in sources)
