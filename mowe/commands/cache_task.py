"""Builds a token cache, from local files or from a seqio task."""

import importlib
import os
from collections.abc import Callable, Sequence

from mowe.data.caches import cache_builders, lm_cache, token_cache
from mowe.data.text import claims, passages, text_files
from mowe.evaluation import text_metrics
from mowe.words import subword_vocabularies

KINDS = ('text', 'questions', 'claims', lm_cache.KIND)
TASK_MODULES = (
  'mowe.tasks.pretraining',
  'mowe.tasks.closed_book_qa',
  'mowe.tasks.glue',
  'mowe.tasks.super_glue',
)
# Below this a process pool costs more than it saves.
_BYTES_WORTH_WORKERS = 32 * 2**20


def cache_task(
  output: str | os.PathLike,
  vocabulary: str,
  *,
  files: Sequence[str] = (),
  kind: str = 'text',
  seqio_task: str = '',
  split: str = 'train',
  task_modules: Sequence[str] = (),
  tfds_data_dir: str | None = None,
  extra_ids: int = 100,
  field: str = 'text',
  unit: str = 'line',
  cut: passages.Passages = passages.Passages(),
  prompt: str = cache_builders.QUESTION_PROMPT,
  answers_field: str = 'answers',
  metric: str = 'squad',
  overwrite: bool = False,
  num_workers: int | None = None,
  progress: Callable[[int], None] | None = None,
) -> token_cache.TokenCache:
  """Builds a token cache from `files` or from `seqio_task`, one of the two.

  Args:
    output: the folder to write.
    vocabulary: a SentencePiece file, or 'bytes'.
    files: paths or globs of .jsonl, .txt, and either with .gz.
    kind: what the files hold: 'text' for pretraining, 'questions' for question
      answering, 'claims' for FEVER's claims and labels, 'language_model' for
      running text.
    seqio_task: name of a registered task; loads TensorFlow.
    split: the split of the seqio task that is cached.
    task_modules: imported first, to register the seqio task; one that has a
      function `register_tfds_tasks` is told the vocabulary by a call of it.
      None: mowe's own, TASK_MODULES.
    tfds_data_dir: where TFDS keeps its data sets.
    extra_ids: sentinels of the vocabulary.
    field: the field of records of text that holds the text.
    unit: what a record of a text file is: 'line' or 'paragraph' is one record;
      running text has the units of `lm_cache`.
    cut: for the kind 'text', which title stands before a text, and how much of
      the text is kept.
    prompt: for the kind 'questions', the inputs, with fields in braces.
    answers_field: for the kind 'questions', the field with a list of answers or
      one answer.
    metric: for the kind 'questions', how answers are scored: 'squad', or
      'trivia_qa', whose normalisation takes a hyphen for a blank. A seqio task
      has its own.
    overwrite: replace a cache that was made from other things.
    num_workers: processes that tokenise; None: one, and more for much text.
    progress: called with the number of records done so far.

  Returns:
    The finished cache, opened.

  Raises:
    ValueError: both or none of files and seqio_task, an unknown kind, or what
      the builders raise.
  """
  if bool(files) == bool(seqio_task):
    raise ValueError(
      'A cache is built from files or from a seqio task, but got files '
      f'{list(files)} and seqio_task {seqio_task!r}. Give exactly one of them.'
    )
  if kind not in KINDS:
    raise ValueError(
      f'kind must be one of {KINDS}, but is {kind!r}. Choose one of these.'
    )
  if cut != passages.Passages() and (seqio_task or kind != 'text'):
    raise ValueError(
      "title_field and max_paragraphs are for files of kind 'text', but were "
      f'given for {seqio_task or kind!r}. Leave them out.'
    )
  text_metrics.of_name(metric)
  if metric != 'squad' and (seqio_task or kind != 'questions'):
    raise ValueError(
      "A metric is for files of kind 'questions', but was given for "
      f'{seqio_task or kind!r}. Leave it out.'
    )
  subwords = subword_vocabularies.load_subwords(vocabulary, extra_ids)
  if seqio_task:
    # Only here: TensorFlow takes seconds to load.
    from mowe.data import seqio_stream

    if tfds_data_dir:
      _, seqio = seqio_stream.import_seqio()
      seqio.set_tfds_data_dir_override(tfds_data_dir)
    for name in task_modules or TASK_MODULES:
      module = importlib.import_module(name)
      if hasattr(module, 'register_tfds_tasks'):
        module.register_tfds_tasks(subwords)
    return seqio_stream.cache_seqio_task(
      seqio_task,
      output,
      subwords,
      split=split,
      overwrite=overwrite,
      progress=progress,
    )
  sources = text_files.describe_sources(files)
  if num_workers is None:
    num_workers = _choose_workers(sum(source['bytes'] for source in sources))
  shared = {
    'sources': sources,
    'overwrite': overwrite,
    'num_workers': num_workers,
    'progress': progress,
  }
  if kind == lm_cache.KIND:
    del shared['sources']
    return lm_cache.cache_texts(
      files, output, subwords, field=field, unit=unit, **shared
    )
  if kind == 'text':
    # A source's digest does not tell how it was cut into records.
    shared['sources'] = [{**source, 'unit': unit} for source in sources]
    fields = tuple(filter(None, (field, cut.title_field)))
    records = text_files.read_records(files, fields=fields, unit=unit)
    return cache_builders.cache_text(
      records, output, subwords, field=field, cut=cut, **shared
    )
  if kind == 'claims':
    records = text_files.read_records(files, fields=claims.FIELDS)
    return cache_builders.cache_questions(
      map(claims.as_question, records),
      output,
      subwords,
      prompt=claims.PROMPT,
      **shared,
    )
  records = text_files.read_records(files, fields=(answers_field,))
  return cache_builders.cache_questions(
    records,
    output,
    subwords,
    prompt=prompt,
    answers_field=answers_field,
    metric=metric,
    **shared,
  )


def _choose_workers(num_bytes: int) -> int:
  return min(os.cpu_count() or 1, 8) if num_bytes > _BYTES_WORTH_WORKERS else 1
