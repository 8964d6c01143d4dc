"""`mowe build-routing-vocabulary`: from text files to words with experts."""

import itertools
import os
from collections.abc import Iterator, Sequence

from mowe.commands import show_progress
from mowe.data.text import text_files
from mowe.words import (
  placement,
  routing_vocabulary,
  subword_vocabularies,
  vocabulary_builder,
)

# Texts that travel to a worker process together.
_TEXTS_AT_ONCE = 2000


def build_routing_vocabulary(
  output: str,
  files: Sequence[str],
  vocabulary: str,
  *,
  num_experts: int,
  num_words: int = 1_000_000,
  num_skipped: int = 16,
  names_files: Sequence[str] = (),
  balanced: bool = False,
  num_blocks: int = 1,
  field: str = 'text',
  num_workers: int | None = None,
  extra_ids: int = 100,
) -> routing_vocabulary.RoutingVocabulary:
  """Builds a routing vocabulary from files, saves it and says what it holds.

  Args:
    output: the file to write.
    files: paths or globs of text.
    vocabulary: a SentencePiece file, or 'bytes'.
    num_experts: number of experts.
    num_words: the most frequent words that are kept.
    num_skipped: the most frequent entries, which get no expert.
    names_files: only words of these names are kept; one name a line, and after
      a tab anything.
    balanced: experts by expected load instead of id modulo `num_experts`.
    num_blocks: parts of equal count and even load into which experts are
      numbered, one for each device that shares them; serves all numbers of
      devices that divide it.
    field: the field of .jsonl records that holds the text.
    num_workers: processes; None: one, or all cores for much text.
    extra_ids: sentinels of the vocabulary.
  """
  placement.check_num_blocks(num_experts, num_blocks)
  loaded = subword_vocabularies.load_subwords(vocabulary, extra_ids)
  names = None
  if names_files:
    names = [
      record['text'].split('\t')[0]
      for record in text_files.read_records(names_files)
    ]
  if num_workers is None:
    size = sum(os.path.getsize(path) for path in text_files.match_files(files))
    num_workers = (os.cpu_count() or 1) if size > 2**25 else 0
  texts = (record[field] for record in text_files.read_records(files, (field,)))
  with show_progress.counting('texts') as progress:
    built, report = vocabulary_builder.build_routing_vocabulary(
      _groups(texts),
      loaded,
      num_words=num_words,
      num_experts=num_experts,
      names=names,
      assign=routing_vocabulary.assign_balanced
      if balanced
      else routing_vocabulary.assign_by_hash,
      num_skipped=num_skipped,
      num_workers=num_workers,
      progress=lambda phase, done: progress(done) if phase == 'count' else None,
    )
  built = placement.in_blocks(built, num_blocks)
  built.save(output)
  _say(output, built, report, num_blocks)
  return built


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
  while group := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
    yield group


def _say(output, built, report, num_blocks):
  loads = built.loads()
  lines = [
    f'{output}: {report.num_kept_words:,} words of '
    f'{report.num_distinct_words:,}, in {report.num_texts:,} texts, and '
    f'{built.num_words - report.num_kept_words:,} pieces',
    f'  {report.known_share:.1%} of the tokens are in a known word, '
    f'{loads.without_expert:.1%} are skipped '
    f'(the {built.num_skipped} most frequent entries)',
    f'  {built.num_experts:,} experts; the busiest has '
    f'{loads.max_over_mean:.1f} times the mean load',
  ]
  if num_blocks > 1:
    balance = placement.balance(loads.shares, num_blocks)
    lines.append(
      f'  {num_blocks} blocks of {built.num_experts // num_blocks:,} experts; '
      f'the busiest has {balance.max_over_mean:.2f} times the mean load'
    )
    if hot := placement.describe_hot_words(built, num_blocks):
      lines.append(f'  {hot}')
  if report.num_collisions:
    lines.append(
      f'  {report.num_collisions:,} spellings had the hash of a more '
      'frequent word and back off to their pieces'
    )
  if report.num_pruned_chunks:
    lines.append(
      f'  {report.num_pruned_chunks:,} rare words were forgotten to bound '
      f'memory ({report.num_pruned_occurrences:,} occurrences)'
    )
  print('\n'.join(lines))
