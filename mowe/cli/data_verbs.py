"""Verbs that prepare data: their options, and what they call."""

import argparse
import dataclasses
import functools

from mowe.cli import verb_parsers

# Each verb imports what it needs only when it runs, so that `mowe --help` is
# fast.

# What a verb says of files of text.
TEXT_FILES = (
  'files of text, JSON or tables (.txt, .jsonl, .json, .csv, .tsv, .parquet, '
  '.arrow, .feather), or globs of them'
)


def add_to(verbs) -> None:
  """Adds the verbs to the subparsers of `mowe`."""
  _add_build_routing_vocabulary(verbs)
  _add_explain(verbs)
  _add_cache_task(verbs)
  _add_train_vocabulary(verbs)


def _add_vocabulary(parser):
  parser.add_argument(
    '--vocabulary', required=True, help="a SentencePiece model, or 'bytes'"
  )
  parser.add_argument(
    '--extra_ids',
    type=int,
    help='sentinels that are added to the vocabulary (default: 100, or none if '
    'it has its own)',
  )


def add_field(parser):
  """Adds the option that names the field of the text."""
  parser.add_argument(
    '--field',
    default='text',
    help='field of records that holds the text (default: text)',
  )


def add_on_bad_record(parser):
  """Adds the option that says what is done about bad records."""
  parser.add_argument(
    '--on_bad_record',
    choices=('stop', 'skip'),
    default='stop',
    help='whether a line that cannot be read ends the command, or is left out '
    'and counted (default: stop)',
  )


def _add_build_routing_vocabulary(verbs):
  parser = verb_parsers.add(
    verbs,
    'build-routing-vocabulary',
    does='count words and give each an expert',
    description='Counts the words of text files, keeps the most frequent ones, '
    'and gives each an expert. The most frequent of all get none: they are '
    'skipped.',
    example="mowe build-routing-vocabulary words.npz 'corpus/*.jsonl.gz' "
    '\\\n  --vocabulary vocabulary.model --num_experts 8192',
  )
  parser.add_argument('output', help='the file to write (.npz)')
  parser.add_argument('files', nargs='+', help=TEXT_FILES)
  _add_vocabulary(parser)
  parser.add_argument(
    '--num_experts',
    type=int,
    required=True,
    help='how many experts the words share',
  )
  parser.add_argument(
    '--num_words',
    type=int,
    default=1_000_000,
    help='how many of the most frequent words are kept (default: 1,000,000)',
  )
  parser.add_argument(
    '--num_skipped',
    type=int,
    default=16,
    help='how many of the most frequent entries get no expert (default: 16)',
  )
  parser.add_argument(
    '--names',
    nargs='*',
    default=(),
    help='files with one name a line; only words of these names are kept',
  )
  parser.add_argument(
    '--balanced',
    action='store_true',
    help='assign experts by expected load instead of by id modulo',
  )
  parser.add_argument(
    '--num_blocks',
    type=int,
    default=1,
    help='blocks of experts with even loads, to be split over devices; 128 '
    'suits many numbers of devices',
  )
  add_field(parser)
  parser.add_argument(
    '--num_workers',
    type=int,
    help='processes that read the text; default: more than one for much text',
  )
  add_on_bad_record(parser)
  parser.set_defaults(run=_build_routing_vocabulary)


def _build_routing_vocabulary(options, bindings):
  del bindings
  from mowe.commands import build_routing_vocabulary as command

  command.build_routing_vocabulary(
    options.output,
    options.files,
    options.vocabulary,
    num_experts=options.num_experts,
    num_words=options.num_words,
    num_skipped=options.num_skipped,
    names_files=options.names,
    balanced=options.balanced,
    num_blocks=options.num_blocks,
    field=options.field,
    num_workers=options.num_workers,
    extra_ids=options.extra_ids,
    skip_bad_records=options.on_bad_record == 'skip',
  )


def _add_explain(verbs):
  parser = verb_parsers.add(
    verbs,
    'explain',
    does='show the expert of each word of a text',
    description='Shows how each piece of a text is routed: its word, how often '
    'that was counted, its expert, and why it has that or none.',
    example="mowe explain words.npz 'Marie Curie was born in Warsaw.' "
    '--vocabulary vocabulary.model',
  )
  parser.add_argument('routing_vocabulary', help='an .npz file')
  parser.add_argument('text', help='a text in quotes')
  _add_vocabulary(parser)
  parser.set_defaults(run=_explain)


def _explain(options, bindings):
  del bindings
  from mowe.words import routing_vocabulary, subword_vocabularies

  routing = routing_vocabulary.load(options.routing_vocabulary)
  vocabulary = subword_vocabularies.load_subwords(
    options.vocabulary, options.extra_ids
  )
  rows = routing.explain(options.text, vocabulary)
  print(routing_vocabulary.format_explanation(rows))


def _add_cache_task(verbs):
  parser = verb_parsers.add(
    verbs,
    'cache-task',
    does='write a task as token ids',
    description='Writes text, questions or a seqio task as token ids, which '
    'training and evaluation read from memory-mapped files. A cache that is '
    'finished is not built again, and one that was stopped goes on.',
    example="mowe cache-task cache/corpus 'corpus/*.jsonl.gz' --vocabulary "
    'vocabulary.model\nmowe cache-task cache/questions qa.jsonl --kind questions '
    '--vocabulary vocabulary.model',
  )
  parser.add_argument('output', help='the folder to write')
  parser.add_argument('files', nargs='*', help=TEXT_FILES)
  _add_vocabulary(parser)
  parser.add_argument(
    '--overwrite',
    action='store_true',
    help='replace a cache that was made from other things',
  )
  parser.add_argument(
    '--num_workers',
    type=int,
    help='processes that read the text; default: more than one for much text',
  )
  parser.add_argument(
    '--kind',
    choices=('text', 'questions', 'claims', 'language_model'),
    help='what the files hold (default: text)',
  )
  # The other options have no default here, so that it is known which were
  # given: each belongs to some sources, whose fields have the defaults.
  add = functools.partial(
    parser.add_argument_group('options of some kinds').add_argument,
    default=argparse.SUPPRESS,
  )
  add('--field', help='of records of text (default: text)')
  add(
    '--unit',
    choices=('line', 'paragraph', 'file'),
    help='what one text of a .txt file is (default: line)',
  )
  add('--title_field', help='of records; its value precedes the text')
  add('--max_paragraphs', type=int, help='how many of each text are kept')
  add('--prompt', help='inputs of questions (default: question: {question})')
  add('--answers_field', help='of records of questions (default: answers)')
  add(
    '--metric',
    choices=('squad', 'trivia_qa'),
    help='how answers are scored: trivia_qa takes a hyphen for a blank',
  )
  add = functools.partial(
    parser.add_argument_group('in place of files').add_argument,
    default=argparse.SUPPRESS,
  )
  add('--seqio_task', help='name of a registered task')
  add('--split', help='of the seqio task (default: train)')
  add('--task_modules', nargs='+', help="default: mowe's own tasks")
  add('--tfds_data_dir', help='where TFDS keeps its data sets')
  add_on_bad_record(parser)
  parser.set_defaults(run=_cache_task)


_CUT = ('title_field', 'max_paragraphs')
_SOURCE_OPTIONS = (
  *('field', 'unit', 'prompt', 'answers_field', 'metric', *_CUT),
  *('seqio_task', 'split', 'task_modules', 'tfds_data_dir'),
)


def _source(options):
  """Makes what the cache is built from; refuses options of other sources."""
  from mowe.commands import cache_task
  from mowe.data.text import passages

  given = {k: v for k, v in vars(options).items() if k in _SOURCE_OPTIONS}
  if bool(options.files) == ('seqio_task' in given):
    raise ValueError(
      'A cache is built from files or from a seqio task, but got files '
      f'{options.files} and seqio_task {given.get("seqio_task")!r}. Give '
      'exactly one of them.'
    )
  if options.files:
    kind = options.kind or 'text'
    source, name = cache_task.FILES_OF_KIND[kind], f'files of kind {kind!r}'
    given['files'] = options.files
  else:
    source, name = cache_task.SeqioTask, 'a seqio task'
    if options.kind:
      given['kind'] = options.kind
  fields = {field.name for field in dataclasses.fields(source)}
  allowed = fields - {'cut', 'files'} | (
    set(_CUT) if 'cut' in fields else set()
  )
  wrong = sorted(set(given) - allowed - {'files'})
  if wrong:
    raise ValueError(
      f'Options of {name} are {", ".join(sorted(allowed)) or "none"}, but '
      f'--{wrong[0]} was given. Leave it out.'
    )
  cut = {name: given.pop(name) for name in _CUT if name in given}
  if cut:
    given['cut'] = passages.Passages(**cut)
  return source(**given)


def _cache_task(options, bindings):
  del bindings
  from mowe.commands import cache_task, show_progress
  from mowe.words import subword_vocabularies

  source = _source(options)
  with show_progress.counting('records') as progress:
    cache = cache_task.cache_task(
      options.output,
      options.vocabulary,
      source,
      extra_ids=options.extra_ids,
      overwrite=options.overwrite,
      num_workers=options.num_workers,
      progress=progress,
      skip_bad_records=options.on_bad_record == 'skip',
    )
  vocabulary = subword_vocabularies.load_subwords(
    options.vocabulary, options.extra_ids
  )
  print(cache_task.describe(cache, vocabulary))


def _add_train_vocabulary(verbs):
  parser = verb_parsers.add(
    verbs,
    'train-vocabulary',
    does='make a subword vocabulary from text',
    description='Trains a SentencePiece model with the ids and the '
    'normalisation of T5, or lists whole words.',
    example="mowe train-vocabulary vocabulary.model 'corpus/*.jsonl.gz' "
    '--questions qa.jsonl --size 16000',
  )
  parser.add_argument('output', help='the file to write')
  parser.add_argument('files', nargs='+', help=TEXT_FILES)
  parser.add_argument(
    '--size',
    type=int,
    help='number of ids; default: 32,000 pieces, or as many as the text fills; '
    'with --words all words',
  )
  parser.add_argument(
    '--at_most',
    action='store_true',
    help='take fewer ids than --size if the text does not fill them',
  )
  parser.add_argument(
    '--words',
    action='store_true',
    help='take whole words between white space, not pieces',
  )
  add_field(parser)
  parser.add_argument(
    '--questions',
    nargs='+',
    default=(),
    help='files whose field `question` is trained on too',
  )
  # These have no default here, so that it is known which were given.
  add = functools.partial(
    parser.add_argument_group('options of pieces').add_argument,
    default=argparse.SUPPRESS,
  )
  add(
    '--model_type',
    choices=('unigram', 'bpe'),
    help='how SentencePiece finds pieces (default: unigram, as in T5)',
  )
  add(
    '--character_coverage',
    type=float,
    help='fraction of the characters that get a piece (default: 0.9999); the '
    'others are unknown. 0.9995 suits scripts with thousands of characters',
  )
  add(
    '--byte_fallback',
    action='store_true',
    help='write characters without a piece as bytes, so that nothing is '
    'unknown; takes 256 of the ids',
  )
  add_on_bad_record(parser)
  parser.set_defaults(run=_train_vocabulary)


def _train_vocabulary(options, bindings):
  del bindings
  from mowe.commands import train_vocabulary

  of_pieces = {
    field.name for field in dataclasses.fields(train_vocabulary.Pieces)
  }
  given = {k: v for k, v in vars(options).items() if k in of_pieces}
  if given and options.words:
    raise ValueError(
      f'--{min(given)} must be given for pieces of SentencePiece, but --words '
      'takes whole words. Leave one of them out.'
    )
  vocabulary = train_vocabulary.train_vocabulary(
    options.output,
    options.files,
    size=options.size,
    field=options.field,
    questions=options.questions,
    at_most=options.at_most,
    words=options.words,
    pieces=train_vocabulary.Pieces(**given),
    skip_bad_records=options.on_bad_record == 'skip',
  )
  print(f'{options.output}: {vocabulary.size:,} ids with sentinels.')
