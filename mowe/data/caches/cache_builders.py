"""Builds token caches of texts with salient spans, and of questions.

Every stored sequence ends with EOS, so that the flat array of a cache of text
is itself the stream that pretraining cuts into chunks.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mowe.data.caches import token_cache
from mowe.data.text import passages
from mowe.words import base_vocabulary

QUESTION_PROMPT = 'question: {question}'
_GROUP = 512  # Records tokenised together; few, so that progress is smooth.

# Called to report progress, with the number of records that are done.
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class EncodedExamples:
  """A group of tokenised records, as `CacheWriter.add` takes it.

  Attributes:
    features: for each feature all its tokens <int32>[total] and the length of
      each example <int64>[group].
    records: for each example the fields to be kept, possibly none.
    totals: counts of the text before it was tokenised.
  """

  features: dict[str, tuple[np.ndarray, np.ndarray]]
  records: list[dict[str, Any]]
  totals: Mapping[str, int] = dataclasses.field(default_factory=dict)


def cache_text(
  records: Iterable[Mapping[str, Any]],
  path: str | os.PathLike,
  subwords: base_vocabulary.Vocabulary,
  *,
  sources: Sequence[Mapping[str, Any]] | None = None,
  field: str = 'text',
  cut: passages.Passages = passages.Passages(),
  overwrite: bool = False,
  num_workers: int = 1,
  progress: Progress | None = None,
) -> token_cache.TokenCache:
  """Caches texts as 'targets' with their salient 'spans', for pretraining.

  The spans of a text are the field 'spans' of its record ([start, end] in
  characters), or else what `salient_spans.find_salient_spans` finds. Other
  fields are not kept. A text without any token is left out.

  Args:
    records: records that have `field`; they are read only if the cache has to
      be built.
    path: the folder to write.
    subwords: the vocabulary that tokenises the texts.
    sources: the description of the records for the fingerprint, as from
      `text_files.describe_sources`; None takes a digest of the records, which
      must then be a list.
    field: name of the field that holds the text.
    cut: whether titles are put before texts, and how much of a text is kept.
    overwrite: replaces a cache at `path` that was made from other things.
    num_workers: number of processes that tokenise. With more than one, the
      vocabulary must be picklable, and the program's entry must be guarded by
      `if __name__ == '__main__'`.
    progress: called with the number of records done so far; None reports
      nothing.

  Returns:
    The cache, opened. An existing cache is opened if it was made from the same
    things.

  Raises:
    ValueError: another cache is at `path`, a record lacks the field or has bad
      spans, or no text is left.
  """
  recipe = _make_recipe('text', subwords, records, sources, fields=[field])
  # The recipe names what is not the default alone, so that the fingerprints of
  # older caches remain valid.
  if cut != passages.Passages():
    recipe['passages'] = dataclasses.asdict(cut)
  encode = functools.partial(
    encode_text, subwords=subwords, field=field, cut=cut
  )
  return build(path, recipe, records, encode, overwrite, num_workers, progress)


def cache_questions(
  records: Iterable[Mapping[str, Any]],
  path: str | os.PathLike,
  subwords: base_vocabulary.Vocabulary,
  *,
  sources: Sequence[Mapping[str, Any]] | None = None,
  prompt: str = QUESTION_PROMPT,
  answers_field: str = 'answers',
  metric: str = 'squad',
  overwrite: bool = False,
  num_workers: int = 1,
  progress: Progress | None = None,
) -> token_cache.TokenCache:
  """Caches questions as 'inputs' and their first answer as 'targets'.

  The whole record is kept for evaluation, with 'answers' as a list. The other
  arguments, the result and the errors are those of `cache_text`.

  Args:
    records: records with the fields of the prompt, and the answers.
    path: the folder to write.
    subwords: the vocabulary that tokenises questions and answers.
    prompt: the text of the inputs, with fields of the record in braces.
    answers_field: name of the field that holds a list of answers, or one
      answer.
    metric: name of the metric that scores answers, 'squad' or 'trivia_qa'. An
      evaluation reads it from the cache.
  """
  names = fields_of(prompt)
  recipe = _make_recipe(
    'questions',
    subwords,
    records,
    sources,
    fields=[*names, answers_field],
    prompt=prompt,
  )
  # Again, the recipe names what is not the default alone.
  if metric != 'squad':
    recipe['metric'] = metric
  encode = functools.partial(
    encode_questions,
    subwords=subwords,
    prompt=prompt,
    names=tuple(names),
    answers_field=answers_field,
  )
  return build(path, recipe, records, encode, overwrite, num_workers, progress)


def fields_of(prompt: str) -> list[str]:
  """Returns the names of the fields in braces of a prompt.

  Raises:
    ValueError: it has none.
  """
  names = [name for _, name, _, _ in string.Formatter().parse(prompt) if name]
  if not names:
    raise ValueError(
      'The prompt must name a field in braces, but is '
      f'{prompt!r}. Write for example {QUESTION_PROMPT!r}.'
    )
  return names


def encode_text(
  records: Sequence[Mapping[str, Any]],
  subwords: base_vocabulary.Vocabulary,
  field: str = 'text',
  cut: passages.Passages = passages.Passages(),
) -> EncodedExamples:
  """Tokenises texts and maps their salient spans to tokens."""
  targets, spans = [], []
  for record in records:
    for name in filter(None, (field, cut.title_field)):
      _need(record, name)
    text, char_spans = cut.read(record, field)
    ids, starts, ends = subwords.encode_with_offsets(text)
    if not len(ids):
      continue
    targets.append([*ids, subwords.eos_id])
    spans.append(
      token_spans(text, char_spans, ids, starts, ends, subwords).reshape(-1)
    )
  features = {'targets': flatten(targets), 'spans': flatten(spans)}
  return EncodedExamples(features, [{}] * len(targets))


def encode_questions(
  records: Sequence[Mapping[str, Any]],
  subwords: base_vocabulary.Vocabulary,
  prompt: str,
  names: Sequence[str],
  answers_field: str,
) -> EncodedExamples:
  """Tokenises prompts and first answers."""
  inputs, targets, kept = [], [], []
  for record in records:
    question = prompt.format(**{name: _need(record, name) for name in names})
    answers = _need(record, answers_field)
    answers = [answers] if isinstance(answers, str) else list(answers)
    if not answers or not all(
      isinstance(answer, str) and answer.strip() for answer in answers
    ):
      raise ValueError(
        'A question must have at least one answer and no empty one, but '
        f'{question[:80]!r} has {answers!r}. Leave such questions out of '
        'the file.'
      )
    inputs.append([*subwords.encode(question), subwords.eos_id])
    targets.append([*subwords.encode(answers[0]), subwords.eos_id])
    kept.append({**record, 'answers': answers})
  features = {'inputs': flatten(inputs), 'targets': flatten(targets)}
  return EncodedExamples(features, kept)


def token_spans(
  text: str,
  char_spans: Sequence[tuple[int, int]],
  ids: Sequence[int],
  starts: Sequence[int],
  ends: Sequence[int],
  subwords: base_vocabulary.Vocabulary,
) -> np.ndarray:
  """Turns spans of characters into spans of all tokens that touch them.

  Args:
    text: the text that was tokenised.
    char_spans: sorted spans [start, end) in characters.
    ids: the tokens of the text.
    starts: for each token, the first character that it stands for.
    ends: for each token, the end of the characters that it stands for.
    subwords: the vocabulary that made the tokens.

  Returns:
    <int32>[num_spans, 2], sorted spans [start, end) in tokens. Spans that share
    a token are joined.
  """
  starts, ends = np.asarray(starts), np.asarray(ends)
  spans = []
  for start, end in char_spans:
    first = int(np.searchsorted(ends, start, side='right'))
    last = int(np.searchsorted(starts, end, side='left'))
    if first >= last:  # The normalisation of the text removed the whole span.
      continue
    first = _with_leading_space(
      text[start:end], first, ids, text, starts, ends, subwords
    )
    if spans and first < spans[-1][1]:
      spans[-1][1] = max(last, spans[-1][1])
    else:
      spans.append([first, last])
  return np.asarray(spans, dtype=np.int32).reshape(-1, 2)


def _with_leading_space(
  span_text: str,
  first: int,
  ids: Sequence[int],
  text: str,
  starts: np.ndarray,
  ends: np.ndarray,
  subwords: base_vocabulary.Vocabulary,
) -> int:
  # SentencePiece may write ' 1981' as '▁' + '1981'. An answer on its own begins
  # with that '▁' too. The '▁' therefore belongs to the span, so that what is
  # masked in pretraining is, token for token, what finetuning asks for.
  before = first - 1
  if before < 0 or text[starts[before] : ends[before]].strip():
    return first
  alone = subwords.encode(span_text)
  return before if len(alone) and alone[0] == ids[before] else first


def _make_recipe(
  kind: str,
  subwords: base_vocabulary.Vocabulary,
  records: Iterable[Mapping[str, Any]],
  sources: Sequence[Mapping[str, Any]] | None,
  **options: Any,
) -> dict[str, Any]:
  if sources is None:
    if not isinstance(records, list | tuple):
      raise ValueError(
        'Without sources the records must be a list, so that their digest '
        f'can be taken, but they are a {type(records).__name__}. Pass '
        'sources=text_files.describe_sources(patterns).'
      )
    digest = hashlib.sha256()
    for record in records:
      line = json.dumps(record, sort_keys=True, ensure_ascii=False)
      digest.update(line.encode() + b'\n')
    sources = [{'records': len(records), 'sha256': digest.hexdigest()}]
  return {
    'format_version': token_cache.FORMAT_VERSION,
    'kind': kind,
    'vocabulary': token_cache.describe_vocabulary(subwords),
    'sources': [dict(source) for source in sources],
    **options,
  }


def build(
  path: str | os.PathLike,
  recipe: Mapping[str, Any],
  records: Iterable[Mapping[str, Any]],
  encode: Callable[[Sequence[Mapping[str, Any]]], EncodedExamples],
  overwrite: bool,
  num_workers: int,
  progress: Progress | None,
) -> token_cache.TokenCache:
  """Returns the finished cache of a recipe, or builds it from records.

  Args:
    path: the folder to write.
    recipe: what goes into the cache, for its fingerprint.
    records: the records; they are read only if the cache has to be built.
    encode: function that tokenises a group of records.
    overwrite: replaces a cache at `path` that was made from other things.
    num_workers: number of processes that tokenise.
    progress: called with the number of records done so far; None reports
      nothing.
  """
  finished = token_cache.find_finished(path, recipe, overwrite)
  if finished is not None:
    return finished
  done = 0
  with token_cache.build_cache(path, recipe) as writer:
    for size, group in _encode_groups(records, encode, num_workers):
      writer.add(group.features, group.records, group.totals)
      done += size
      if progress is not None:
        progress(done)
  return token_cache.TokenCache.open(path)


def _encode_groups(
  records: Iterable[Mapping[str, Any]],
  encode: Callable[[Sequence[Mapping[str, Any]]], EncodedExamples],
  num_workers: int,
) -> Iterator[tuple[int, EncodedExamples]]:
  """Yields group sizes and encoded groups, in the order of the records."""
  groups = _groups(records)
  if num_workers <= 1:
    yield from ((len(group), encode(group)) for group in groups)
    return
  # Processes are spawned, because a fork of a process with JAX's threads may
  # hang.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(
    num_workers, context, _keep_encoder, (encode,)
  ) as pool:
    waiting = collections.deque()
    for group in groups:
      waiting.append((len(group), pool.submit(_encode_kept, group)))
      # The queue is bounded, because a corpus may not fit in memory.
      if len(waiting) >= 4 * num_workers:
        size, future = waiting.popleft()
        yield size, future.result()
    for size, future in waiting:
      yield size, future.result()


def _groups(
  records: Iterable[Mapping[str, Any]],
) -> Iterator[list[Mapping[str, Any]]]:
  iterator = iter(records)
  while group := list(itertools.islice(iterator, _GROUP)):
    yield group


# The encoder of a worker process. It is sent once to each process, because its
# vocabulary is too big to be sent with each group.
_kept_encoder: list[Callable[..., EncodedExamples]] = []


def _keep_encoder(encode: Callable[..., EncodedExamples]) -> None:
  _kept_encoder[:] = [encode]


def _encode_kept(group: Sequence[Mapping[str, Any]]) -> EncodedExamples:
  return _kept_encoder[0](group)


def _need(record: Mapping[str, Any], field: str) -> Any:
  if field not in record:
    raise ValueError(
      f'Every record must have the field {field!r}, but one has only '
      f'{sorted(record)}. Name the field that holds it.'
    )
  return record[field]


def flatten(sequences: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
  """Returns all tokens <int32>[total] and the sequences' lengths <int64>[n]."""
  lengths = np.asarray([len(s) for s in sequences], dtype=np.int64)
  flat = np.fromiter(itertools.chain.from_iterable(sequences), dtype=np.int32)
  return flat, lengths
