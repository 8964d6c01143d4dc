"""`mowe build-routing-vocabulary`: counts words and gives them experts."""

import itertools
import os
from collections.abc import Iterator, Sequence

from mowe.commands import show_progress
from mowe.data.text import bad_records, record_fields, text_files
from mowe.words import (
  placement,
  routing_vocabulary,
  subword_vocabularies,
  vocabulary_builder,
)

# Number of texts that are sent to a worker process at once.
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
  extra_ids: int | None = None,
  skip_bad_records: bool = False,
) -> routing_vocabulary.RoutingVocabulary:
  """Builds a routing vocabulary from files, saves it, and prints a summary.

  Args:
    output: path of the file to write (.npz).
    files: paths or globs of files, see `text_files.read_records`.
    vocabulary: path of a subword vocabulary, or 'bytes'.
    num_experts: number of experts.
    num_words: maximum number of words; the most frequent ones are kept.
    num_skipped: number of the most frequent entries, which get no expert.
    names_files: paths or globs of files with one name a line, which ends at
      the first tab. If given, only words of these names are kept.
    balanced: whether experts are assigned so that expected loads are even,
      instead of by entry number modulo `num_experts`.
    num_blocks: number of blocks of experts, each with equally many experts and
      about the same load. The experts can then be split evenly over any number
      of devices that divides `num_blocks`.
    field: the field of .jsonl records that holds the text.
    num_workers: number of worker processes; 0 works in this process. None: one
      for each core if the files exceed 32 MiB, else 0.
    extra_ids: number of sentinels of the vocabulary; see
      `subword_vocabularies.load_subwords`.
    skip_bad_records: whether records that cannot be read are left out; it is then
      printed how many they were.

  Returns:
    The vocabulary that was saved.
  """
  placement.check_num_blocks(num_experts, num_blocks)
  loaded = subword_vocabularies.load_subwords(vocabulary, extra_ids)
  names = None
  if names_files:
    # What stands behind a tab, such as a count, is no part of a name.
    lines = itertools.chain.from_iterable(
      map(text_files.read_lines, text_files.match_files(names_files))
    )
    names = [name for line in lines if (name := line.split('\t')[0].strip())]
  if num_workers is None:
    size = sum(os.path.getsize(path) for path in text_files.match_files(files))
    num_workers = (os.cpu_count() or 1) if size > 2**25 else 0
  bad = bad_records.BadRecords(skip_bad_records)
  records = text_files.read_records(
    files, record_fields.all_texts([field]), bad=bad
  )
  texts = (record[field] for record in records)
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
  bad.say()
  return built


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
  while group := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
    yield group


def _say(output, built, report, num_blocks):
  """Prints what the vocabulary holds, and what was left out of it."""
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
      f'  {report.num_collisions:,} spellings have the same hash as a more '
      'frequent word, so they back off to their pieces'
    )
  if report.num_pruned_chunks:
    lines.append(
      f'  {report.num_pruned_chunks:,} rare words were dropped to limit the '
      f'memory of counting ({report.num_pruned_occurrences:,} occurrences)'
    )
  print('\n'.join(lines))
