"""Verbs that prepare data: their options, and what they call."""


# Everything else is imported by the verb that needs it: `mowe --help` is fast.


def add_to(verbs) -> None:
  """Adds the verbs to the subparsers of `mowe`."""
  _add_build_routing_vocabulary(verbs)
  _add_explain(verbs)
  _add_cache_task(verbs)
  _add_train_vocabulary(verbs)


def _add_build_routing_vocabulary(verbs):
  parser = verbs.add_parser(
    'build-routing-vocabulary', help='count words and give them experts'
  )
  parser.add_argument('output', help='the file to write (.npz)')
  parser.add_argument(
    'files', nargs='+', help='.txt or .jsonl, also .gz; globs'
  )
  parser.add_argument(
    '--vocabulary', required=True, help="SentencePiece model, or 'bytes'"
  )
  parser.add_argument('--num_experts', type=int, required=True)
  parser.add_argument('--num_words', type=int, default=1_000_000)
  parser.add_argument('--num_skipped', type=int, default=16)
  parser.add_argument(
    '--names', nargs='*', default=(), help='files of names: only their words'
  )
  parser.add_argument('--balanced', action='store_true', help='not id modulo')
  parser.add_argument(
    '--num_blocks',
    type=int,
    default=1,
    help='evenly loaded parts for devices that share the experts, such as 128',
  )
  parser.add_argument('--field', default='text', help='of .jsonl records')
  parser.add_argument('--num_workers', type=int)
  parser.add_argument('--extra_ids', type=int, default=100)
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
  )


def _add_explain(verbs):
  parser = verbs.add_parser(
    'explain', help='show which expert each word of a text has'
  )
  parser.add_argument('routing_vocabulary', help='.npz')
  parser.add_argument('text')
  parser.add_argument('--vocabulary', required=True)
  parser.add_argument('--extra_ids', type=int, default=100)
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
  parser = verbs.add_parser('cache-task', help='tokenise a task once')
  parser.add_argument('output', help='the folder to write')
  parser.add_argument(
    'files', nargs='*', help='.txt or .jsonl, also .gz; globs'
  )
  parser.add_argument('--vocabulary', required=True)
  parser.add_argument(
    '--kind',
    choices=('text', 'questions', 'claims', 'language_model'),
    default='text',
  )
  parser.add_argument('--seqio_task', default='', help='instead of files')
  parser.add_argument(
    '--task_modules', nargs='*', default=(), help="default: mowe's own tasks"
  )
  parser.add_argument('--tfds_data_dir', help='where TFDS keeps its data sets')
  parser.add_argument('--split', default='train', help='of the seqio task')
  parser.add_argument('--field', default='text')
  parser.add_argument(
    '--unit', choices=('line', 'paragraph', 'file'), default='line'
  )
  parser.add_argument(
    '--title_field', help='of .jsonl records of text: put before the text'
  )
  parser.add_argument(
    '--max_paragraphs', type=int, help='of each text, for --kind text'
  )
  parser.add_argument('--prompt', default='question: {question}')
  parser.add_argument('--answers_field', default='answers')
  parser.add_argument(
    '--metric',
    default='squad',
    choices=('squad', 'trivia_qa'),
    help='by which answers are scored: trivia_qa takes a hyphen for a blank',
  )
  parser.add_argument('--overwrite', action='store_true')
  parser.add_argument('--num_workers', type=int)
  parser.add_argument('--extra_ids', type=int, default=100)
  parser.set_defaults(run=_cache_task)


def _cache_task(options, bindings):
  del bindings
  from mowe.commands import cache_task, show_progress
  from mowe.data.text import passages

  with show_progress.counting('records') as progress:
    cache = cache_task.cache_task(
      options.output,
      options.vocabulary,
      files=options.files,
      kind=options.kind,
      seqio_task=options.seqio_task,
      split=options.split,
      task_modules=options.task_modules,
      tfds_data_dir=options.tfds_data_dir,
      extra_ids=options.extra_ids,
      field=options.field,
      unit=options.unit,
      cut=passages.Passages(options.title_field, options.max_paragraphs),
      prompt=options.prompt,
      answers_field=options.answers_field,
      metric=options.metric,
      overwrite=options.overwrite,
      num_workers=options.num_workers,
      progress=progress,
    )
  tokens = ', '.join(
    f'{int(cache.lengths(name).sum()):,} tokens of {name}'
    for name in cache.features
    if name != 'spans'
  )
  print(f'{cache.path}: {cache.num_examples:,} examples, {tokens}.')


def _add_train_vocabulary(verbs):
  parser = verbs.add_parser(
    'train-vocabulary', help='make a vocabulary of pieces or words of text'
  )
  parser.add_argument('output', help='the file to write')
  parser.add_argument('files', nargs='+')
  parser.add_argument(
    '--size', type=int, help='default: 32,000 pieces, or all words'
  )
  parser.add_argument(
    '--words', action='store_true', help='whole words between white space'
  )
  parser.add_argument('--field', default='text')
  parser.add_argument(
    '--questions', nargs='+', default=(), help='.jsonl files with questions'
  )
  parser.set_defaults(run=_train_vocabulary)


def _train_vocabulary(options, bindings):
  del bindings
  from mowe.commands import train_vocabulary

  vocabulary = train_vocabulary.train_vocabulary(
    options.output,
    options.files,
    size=options.size,
    field=options.field,
    questions=options.questions,
    words=options.words,
  )
  print(f'{options.output}: {vocabulary.size:,} ids with sentinels.')
