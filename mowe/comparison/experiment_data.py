"""Prepares the data of an experiment: text, questions, vocabularies, caches.

Each source of data makes, or finds, the same things: a subword vocabulary, and
token caches with the names in `CACHES`. What is there already is not made
again.

Validation questions are split into two caches, by a hash of the entity that
they are about. Learning rates and checkpoints may be chosen by the questions of
`qa_choosing`; a report is about the questions of `qa_reported`.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

from mowe.commands import build_routing_vocabulary, cache_task, train_vocabulary
from mowe.commands.own_text import question_split, shown_commands
from mowe.data.caches import token_cache
from mowe.data.text import (
  claims,
  generated_world,
  passages,
  record_fields,
  text_files,
)
from mowe.words import (
  atomic_files,
  subword_vocabularies,
  vocabulary_builder,
  word_vocabulary,
)

# The names of token caches: text for pretraining, questions for finetuning,
# questions by which rates and checkpoints are chosen, and reported questions.
CHOOSING, REPORTED = 'qa_choosing', 'qa_reported'
CACHES = ('documents', 'qa_train', CHOOSING, REPORTED)
# The name of the token cache of text that no model is trained on. There may be
# no such text.
HELD_OUT = 'held_out'

# The files that a source of data has.
_SOURCES = ('documents', 'qa_train', 'qa_validation')
# One in so many entities has its validation questions among those for choosing.
_CHOOSING_PART = 3

# The names that these files may have in a user's own folder.
_NAMES = {
  'documents': ('documents', 'paragraphs', 'evidence'),
  'qa_train': ('qa_train', 'claims_train'),
  'qa_validation': ('qa_validation', 'claims_validation'),
}

# The most held-out documents, which are enough for a loss with three digits.
_MOST_HELD_OUT = 500


@dataclasses.dataclass(frozen=True)
class Words:
  """A routing vocabulary, as `mowe build-routing-vocabulary` makes it.

  Attributes:
    num_experts: number of experts.
    num_words: how many words to keep, the most frequent ones. With 0, tokens
      have the experts of their pieces, as in a hash layer.
    num_skipped: number of the most frequent entries, which get no expert.
    names_files: files of names, whose words alone are kept; empty keeps all
      words. '{data}' is replaced by the folder of the experiment's data, where
      a generated world has names.txt.
    balanced: gives entries to experts by expected load, not by hash.
  """

  num_experts: int
  num_words: int = 1_000_000
  num_skipped: int = 16
  names_files: tuple[str, ...] = ()
  balanced: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Data that is ready for training.

  Attributes:
    vocabulary: path of the subword vocabulary, or 'bytes'.
    cache_dir: folder of the token caches.
    documents: files of the text in which words are counted.
    folder: folder where routing vocabularies are written.
    has_held_out: whether there is a cache of held-out text.
    notes: sentences that the report says about the data.
  """

  vocabulary: str
  cache_dir: str
  documents: tuple[str, ...]
  folder: pathlib.Path
  has_held_out: bool
  notes: tuple[str, ...] = ()

  def vocab_size(self) -> int:
    """Returns the rows of an embedding for it, a multiple of 128."""
    vocabulary = subword_vocabularies.load_subwords(self.vocabulary)
    return subword_vocabularies.embedding_rows(vocabulary)

  def routing_vocabulary(self, words: Words) -> str:
    """Returns the path of a routing vocabulary, which is built if missing."""
    settings = json.dumps(
      [dataclasses.asdict(words), self.documents, self.vocabulary]
    )
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    path = self.folder / f'words_{words.num_experts}_{digest}.npz'
    if path.exists():
      return str(path)
    if not self.documents:
      raise ValueError(
        'Words must be counted in some text to give them experts, but '
        'documents is (). Set experiment_data.Caches.documents.'
      )
    options = dataclasses.asdict(words) | {
      'names_files': tuple(
        name.replace('{data}', str(self.folder)) for name in words.names_files
      )
    }
    shown = options | {'names': options['names_files']}
    del shown['names_files'], shown['balanced']
    flags = ['--balanced'] if words.balanced else []
    shown_commands.say(
      'build-routing-vocabulary',
      path,
      *self.documents,
      *flags,
      vocabulary=self.vocabulary,
      **{name: value for name, value in shown.items() if value != ()},
    )
    build_routing_vocabulary.build_routing_vocabulary(
      str(path), self.documents, self.vocabulary, **options
    )
    return str(path)


class Data(Protocol):
  """A source of the data of an experiment."""

  def prepare(self, folder: pathlib.Path) -> Prepared:
    """Makes, in a folder, what is not there yet."""

  def is_prepared(self, folder: pathlib.Path) -> bool:
    """Whether `prepare` would find all of it."""

  def stand_in(self, folder: pathlib.Path) -> Prepared:
    """Makes, in a folder, vocabularies of the same sizes that hold nothing.

    Models can be sized with them, and not be trained. It takes no time.
    """


@dataclasses.dataclass(frozen=True)
class GeneratedWorld:
  """Invented people and facts about them.

  The held-out text has the same facts in wordings that pretraining never has.

  Attributes:
    config: size and seed of the world.
    vocabulary: path of a SentencePiece model, or 'bytes'; None trains one on
      the text.
    vocabulary_size: number of pieces of a vocabulary that is trained.
  """

  config: generated_world.WorldConfig = generated_world.WorldConfig()
  vocabulary: str | None = None
  vocabulary_size: int = 1000

  def prepare(self, folder: pathlib.Path) -> Prepared:
    """Generates the world, its vocabulary and its caches."""
    config = self.config
    paths = generated_world.write_world(config, folder / 'world')
    files = {name: str(paths[name]) for name in _SOURCES}
    people = {
      record['entity']
      for name in _SOURCES
      for record in text_files.read_records(files[name], {})
    }
    atomic_files.write_atomically(
      folder / 'names.txt', ('\n'.join(sorted(people)) + '\n').encode()
    )
    held_out = folder / 'world' / 'held_out.jsonl'
    records = _other_wordings(config)[:_MOST_HELD_OUT]
    note = (
      f'Generated world: {config.num_people:,} people, '
      f'{len(config.relations)} facts of each.'
    )
    if records:
      _write_lines(held_out, records)
      files[HELD_OUT] = str(held_out)
      note += ' Held-out text: the same facts, worded as in no training text.'
    return _prepare(
      folder, files, self.vocabulary, self.vocabulary_size, (note,)
    )

  def is_prepared(self, folder: pathlib.Path) -> bool:
    """See `Data.is_prepared`."""
    return _has_last_cache(folder)

  def stand_in(self, folder: pathlib.Path) -> Prepared:
    """See `Data.stand_in`."""
    return _stand_in(folder, self.vocabulary, self.vocabulary_size)


@dataclasses.dataclass(frozen=True)
class Files:
  """A user's own files.

  Attributes:
    folder: folder with the files documents (or paragraphs, or evidence),
      qa_train and qa_validation, each .jsonl or .jsonl.gz. Documents have the
      field text; questions have question and answers, and relation and entity
      for the breakdowns of the report. In place of questions there may be
      claims_train and claims_validation, with claim and label as in FEVER.
    vocabulary: path of a SentencePiece model, or 'bytes'; None trains one on
      the text.
    vocabulary_size: number of pieces of a vocabulary that is trained.
    held_out: a file of documents on which the loss of pretraining is measured,
      without those that are in the pretraining text; None measures no such
      loss.
    documents: a file of text elsewhere, for a folder without documents; None
      reads the documents of the folder.
    cut: whether titles are put before texts, and how much of a text is read.
  """

  folder: str
  vocabulary: str | None = None
  vocabulary_size: int = 16_000
  held_out: str | None = None
  documents: str | None = None
  cut: passages.Passages = passages.Passages()

  def prepare(self, folder: pathlib.Path) -> Prepared:
    """Makes the vocabulary and the caches."""
    files = {
      name: self.documents
      if name == 'documents' and self.documents
      else _find(self.folder, name)
      for name in _SOURCES
    }
    notes = [f'Text and questions of {pathlib.Path(self.folder).name}.']
    if self.held_out is not None:
      held_out = folder / 'held_out.jsonl'
      records = list(
        _not_in(self.held_out, files['documents'], self.cut.title_field)
      )
      if not records:
        raise ValueError(
          'Held-out text must be other than the text of pretraining, but '
          f'{self.held_out} has no document that {files["documents"]} has not. '
          'Give another file, or None.'
        )
      _write_lines(held_out, records)
      files[HELD_OUT] = str(held_out)
      notes.append(f'Held-out text: {len(records):,} other documents.')
    if self.cut.max_paragraphs:
      notes.append(
        f'Of each text the first {self.cut.max_paragraphs} paragraphs.'
        if self.cut.max_paragraphs > 1
        else 'Of each text the first paragraph.'
      )
    if self.cut.title_field:
      notes.append('Each text follows its title.')
    return _prepare(
      folder, files, self.vocabulary, self.vocabulary_size, notes, self.cut
    )

  def is_prepared(self, folder: pathlib.Path) -> bool:
    """See `Data.is_prepared`."""
    return _has_last_cache(folder)

  def stand_in(self, folder: pathlib.Path) -> Prepared:
    """See `Data.stand_in`; the files must be there."""
    for name in _SOURCES:
      if name != 'documents' or self.documents is None:
        _find(self.folder, name)
    return _stand_in(folder, self.vocabulary, self.vocabulary_size)


@dataclasses.dataclass(frozen=True)
class Caches:
  """Token caches that exist already, such as those of seqio tasks.

  Attributes:
    cache_dir: folder of the caches; stages and questions name caches in it. A
      cache with the name 'held_out' is the held-out text.
    vocabulary: path of the subword vocabulary of the caches, or 'bytes'.
    documents: text files in which words are counted for routing vocabularies.
  """

  cache_dir: str
  vocabulary: str
  documents: tuple[str, ...] = ()

  def prepare(self, folder: pathlib.Path) -> Prepared:
    """Looks at which caches exist."""
    folder.mkdir(parents=True, exist_ok=True)
    caches = pathlib.Path(self.cache_dir)
    return Prepared(
      vocabulary=self.vocabulary,
      cache_dir=self.cache_dir,
      documents=self.documents,
      folder=folder,
      has_held_out=(caches / HELD_OUT).is_dir(),
      notes=(f'Token caches of {caches.name}.',),
    )

  def is_prepared(self, folder: pathlib.Path) -> bool:
    """See `Data.is_prepared`; only words are counted in the folder."""
    return folder.is_dir()

  def stand_in(self, folder: pathlib.Path) -> Prepared:
    """See `Data.stand_in`; the caches are there, and words are a stand-in."""
    return _stand_in(folder, self.vocabulary, 0)


def _has_last_cache(folder: pathlib.Path) -> bool:
  """Whether a folder has the cache of reported questions, built last.

  It has this file when it is complete.
  """
  return (folder / 'cache' / REPORTED / 'cache.json').is_file()


def _prepare(
  folder, files, vocabulary, size, notes, cut=passages.Passages()
) -> Prepared:
  folder.mkdir(parents=True, exist_ok=True)
  files = dict(files)
  files |= _split_questions(files.pop('qa_validation'), folder)
  if vocabulary is None:
    vocabulary = str(folder / 'vocabulary.model')
    sizes = folder / 'vocabulary.json'
    if pathlib.Path(vocabulary).exists():
      _check_size(sizes, size)
    else:
      atomic_files.write_atomically(sizes, json.dumps({'size': size}).encode())
      # Only questions are added to the text, because claims are worded as the
      # text that they are about.
      asked = _kind('qa_train', files['qa_train']) == 'questions'
      options = {'size': size}
      if asked:
        options['questions'] = (files['qa_train'],)
      shown_commands.say(
        'train-vocabulary', vocabulary, files['documents'], **options
      )
      train_vocabulary.train_vocabulary(
        vocabulary, [files['documents']], **options
      )
  for name, file in files.items():
    cache = folder / 'cache' / name
    kind = _kind(name, file)
    source = cache_task.FILES_OF_KIND[kind](files=[file])
    said = {'kind': kind, 'vocabulary': vocabulary}
    if kind == 'text':
      source = dataclasses.replace(source, cut=cut)
      said |= {name: value for name, value in vars(cut).items() if value}
    shown_commands.say('cache-task', cache, file, **said)
    # The caches of an experiment are its own: those of another version of mowe
    # are built again.
    overwrite = token_cache.has_other_format(cache)
    cache_task.cache_task(cache, vocabulary, source, overwrite=overwrite)
  return Prepared(
    vocabulary=vocabulary,
    cache_dir=str(folder / 'cache'),
    documents=(files['documents'],),
    folder=folder,
    has_held_out=HELD_OUT in files,
    notes=tuple(notes),
  )


def _stand_in(
  folder: pathlib.Path, vocabulary: str | None, size: int
) -> Prepared:
  """Vocabularies of invented words; see `Data.stand_in`."""
  words = [f'word{number}' for number in range(size)]
  if vocabulary is None:
    vocabulary = str(folder / 'vocabulary.txt')
    word_vocabulary.build_word_vocabulary([' '.join(words)], vocabulary, size)
  # Balanced hash routing counts tokens of the text.
  text = folder / 'text.jsonl'
  _write_lines(text, [{'text': 'a few words'}])
  source = cache_task.TextFiles(files=[str(text)])
  cache_task.cache_task(folder / 'cache' / CACHES[0], vocabulary, source)
  return _StandIn(
    vocabulary=vocabulary,
    cache_dir=str(folder / 'cache'),
    documents=(),
    folder=folder,
    has_held_out=False,
  )


class _StandIn(Prepared):
  """Prepared data that hold nothing."""

  def routing_vocabulary(self, words: Words) -> str:
    """Returns the path of a routing vocabulary with as many experts."""
    path = self.folder / f'words_{words.num_experts}.npz'
    if not path.exists():
      built, _ = vocabulary_builder.build_routing_vocabulary(
        ['a few words'],
        subword_vocabularies.load_subwords(self.vocabulary),
        num_words=9,
        num_experts=words.num_experts,
        num_skipped=1,
      )
      built.save(path)
    return str(path)


def _split_questions(file: str, folder: pathlib.Path) -> dict[str, str]:
  """Writes the questions for choosing and those to be reported to two files.

  All questions about one entity are in the same file. Which one depends on the
  entity's name alone, so that it is the same in a larger set of questions.
  """
  kind = _kind('qa_validation', file)
  parts: dict[str, list[dict[str, Any]]] = {CHOOSING: [], REPORTED: []}
  fields = {
    'questions': record_fields.QUESTIONS,
    'claims': record_fields.all_texts(claims.FIELDS),
  }
  (first, *_) = fields[kind]
  for record in text_files.read_records(file, fields[kind]):
    about = record.get('entity') or record[first]
    number = question_split.part_number(about, _CHOOSING_PART)
    parts[REPORTED if number else CHOOSING].append(record)
  if not parts[REPORTED]:
    # There are so few questions that none are left to choose by.
    parts = {CHOOSING: [], REPORTED: parts[CHOOSING]}
  paths = {}
  for name, records in parts.items():
    if records:
      path = folder / f'{kind}_{name.removeprefix("qa_")}.jsonl'
      _write_lines(path, records)
      paths[name] = str(path)
  return paths


def _check_size(path: pathlib.Path, size: int) -> None:
  old = json.loads(path.read_text())['size'] if path.exists() else size
  if old != size:
    raise ValueError(
      f'The vocabulary of an output must be that of its experiment, but the '
      f'one in {path.parent} was trained for {old:,} pieces and {size:,} are '
      'asked for. Restore vocabulary_size, or give another OUTPUT.'
    )


def _kind(name: str, file: str) -> str:
  """Returns the kind of a file for `mowe cache-task`."""
  if not name.startswith('qa_'):
    return 'text'
  return (
    'claims' if pathlib.Path(file).name.startswith('claims') else 'questions'
  )


def _find(folder: str, name: str) -> str:
  for own in _NAMES[name]:
    for ending in ('.jsonl', '.jsonl.gz'):
      path = pathlib.Path(folder) / (own + ending)
      if path.is_file():
        return str(path)
  raise FileNotFoundError(
    f'The data folder must hold {", ".join(_SOURCES)}, each .jsonl or '
    f'.jsonl.gz, but {folder} has no {" or ".join(_NAMES[name])}. Documents '
    'have the field text; questions have question and answers. Text may also '
    'lie elsewhere: experiment_data.Files.documents, or --documents of `mowe '
    'quickstart`.'
  )


def _not_in(
  file: str, documents: str, title_field: str | None
) -> Iterator[dict[str, Any]]:
  """Yields the first documents of a file that another one does not have."""
  seen = {record['text'] for record in text_files.read_records(documents)}
  number = 0
  fields = record_fields.all_texts(filter(None, ('text', title_field)))
  for record in text_files.read_records(file, fields):
    if record['text'] not in seen and number < _MOST_HELD_OUT:
      number += 1
      yield {name: record[name] for name in fields}


def _other_wordings(
  config: generated_world.WorldConfig,
) -> list[dict[str, Any]]:
  """Returns documents about the same facts in wordings that the world lacks.

  People and facts do not change with the number of templates.
  """
  if config.num_templates == 4:
    return []
  known = {
    _wording(document)
    for document in generated_world.make_world(config).documents
    if len(document['relations']) == 1
  }
  other = dataclasses.replace(
    config, num_templates=4, num_extra_mentions=0, opening_rate=0
  )
  return [
    document
    for document in generated_world.make_world(other).documents
    if _wording(document) not in known
  ]


def _wording(document: dict[str, Any]) -> str:
  ((start, end),) = document['spans']
  text = document['text']
  # The article depends on the value, and is no part of the wording.
  before = text[:start].removesuffix(' an ').removesuffix(' a ')
  return f'{before}*{text[end:]}'.replace(document['entity'], '{n}')


def _write_lines(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
  # JSON is written in ASCII, because a text may hold half of a surrogate pair,
  # which UTF-8 cannot encode.
  lines = [json.dumps(record) + '\n' for record in records]
  atomic_files.write_atomically(path, ''.join(lines).encode())
