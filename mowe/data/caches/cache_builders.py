"""Builds token caches from records: texts with salient spans, and questions.

Every stored sequence ends with EOS, so that the flat array of a text cache is
itself the stream that pretraining cuts into chunks.
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

QUESTION_PROMPT = 'question: {question}'
_GROUP = 512  # Records tokenised together: few enough for smooth progress.

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class EncodedExamples:
  """A group of tokenised records: what `CacheWriter.add` takes."""

  features: dict[str, tuple[np.ndarray, np.ndarray]]
  records: list[dict[str, Any]]
  totals: Mapping[str, int] = dataclasses.field(default_factory=dict)


def cache_text(
  records: Iterable[Mapping[str, Any]],
  path: str | os.PathLike,
  subwords: Any,
  *,
  sources: Sequence[Mapping[str, Any]] | None = None,
  field: str = 'text',
  cut: passages.Passages = passages.Passages(),
  overwrite: bool = False,
  num_workers: int = 1,
  progress: Progress | None = None,
) -> token_cache.TokenCache:
  """Caches texts as 'targets' with their salient 'spans', for pretraining.

  Spans are the record's field 'spans' ([start, end] in characters) or those of
  `salient_spans.find_salient_spans`. Other fields are not kept. A text without
  any token is left out.

  Args:
    records: dicts with `field`; read only if the cache has to be built.
    path: the folder to write.
    subwords: the vocabulary (mowe.words.subword_vocabularies).
    sources: what the fingerprint says of the records
      (`text_files.describe_sources`); None: a digest of the records, which
      must then be a list.
    field: holds the text.
    cut: titles before texts, and how much of each is kept.
    overwrite: replace a cache that was made from other things.
    num_workers: processes that tokenise; with more than one, the vocabulary
      must be picklable and the program's entry guarded by __main__.
    progress: called with the number of records done so far.

  Returns:
    The cache, opened; an existing one if it was made from the same things.

  Raises:
    ValueError: another cache is at `path`, a record lacks the field or has bad
      spans, or nothing is left.
  """
  recipe = _make_recipe('text', subwords, records, sources, fields=[field])
  # Only where it says something: older caches stay what they are.
  if cut != passages.Passages():
    recipe['passages'] = dataclasses.asdict(cut)
  encode = functools.partial(
    encode_text, subwords=subwords, field=field, cut=cut
  )
  return build(path, recipe, records, encode, overwrite, num_workers, progress)


def cache_questions(
  records: Iterable[Mapping[str, Any]],
  path: str | os.PathLike,
  subwords: Any,
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

  The whole record is kept for evaluation, with 'answers' as a list. Arguments
  and errors are those of `cache_text`, and:

  Args:
    prompt: the inputs, with the record's fields in braces.
    answers_field: a list of answers, or one answer.
    metric: name of the metric by which answers are scored, 'squad' or
      'trivia_qa'; an evaluation takes it from the cache.
  """
  names = [name for _, name, _, _ in string.Formatter().parse(prompt) if name]
  if not names:
    raise ValueError(
      'The prompt must name a field in braces, but is '
      f'{prompt!r}. Write for example {QUESTION_PROMPT!r}.'
    )
  recipe = _make_recipe(
    'questions',
    subwords,
    records,
    sources,
    fields=[*names, answers_field],
    prompt=prompt,
  )
  # Only where it says something, as above.
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


def encode_text(
  records: Sequence[Mapping[str, Any]],
  subwords: Any,
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
  subwords: Any,
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
  subwords: Any,
) -> np.ndarray:
  """Turns character spans into token spans: every token that touches one.

  Args:
    text: the text.
    char_spans: sorted [start, end) in characters.
    ids, starts, ends: tokens of the text and the characters they cover.
    subwords: the vocabulary.

  Returns:
    <int32>[num_spans, 2], sorted; spans that share a token are one.
  """
  starts, ends = np.asarray(starts), np.asarray(ends)
  spans = []
  for start, end in char_spans:
    first = int(np.searchsorted(ends, start, side='right'))
    last = int(np.searchsorted(starts, end, side='left'))
    if first >= last:  # Only characters that normalisation removes.
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
  subwords: Any,
) -> int:
  # SentencePiece may write ' 1981' as '▁' + '1981'. An answer on its own begins
  # with that '▁' too, so it belongs to the span: what is masked in pretraining
  # is then, token for token, what is asked for in finetuning.
  before = first - 1
  if before < 0 or text[starts[before] : ends[before]].strip():
    return first
  alone = subwords.encode(span_text)
  return before if len(alone) and alone[0] == ids[before] else first


def _make_recipe(
  kind: str,
  subwords: Any,
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
  """The finished cache of a recipe, or a new one with the encoded records."""
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
  """Encoded groups in the order of the records, whatever num_workers is."""
  groups = _groups(records)
  if num_workers <= 1:
    yield from ((len(group), encode(group)) for group in groups)
    return
  # spawn: forking a process that has started JAX's threads may hang.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(
    num_workers, context, _keep_encoder, (encode,)
  ) as pool:
    waiting = collections.deque()
    for group in groups:
      waiting.append((len(group), pool.submit(_encode_kept, group)))
      # A bounded queue: a corpus need not fit in memory.
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


# Once per worker process: a vocabulary is too big to travel with each group.
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
  """All tokens <int32>[total], and the length of each sequence <int64>[...]."""
  lengths = np.asarray([len(s) for s in sequences], dtype=np.int64)
  flat = np.fromiter(itertools.chain.from_iterable(sequences), dtype=np.int32)
  return flat, lengths
