"""Verbs that go from files of one's own to a model: their options."""

from mowe.cli import data_verbs, gin_arguments, verb_parsers

# Each verb imports what it needs only when it runs, so that `mowe --help` is
# fast.


def add_to(verbs) -> None:
  """Adds the verbs to the subparsers of `mowe`."""
  _add_pretrain(verbs)
  _add_finetune(verbs)


def _add_pretrain(verbs):
  parser = verb_parsers.add(
    verbs,
    'pretrain',
    does='make a model of files of text, from the vocabulary on',
    description='Makes a subword vocabulary, words with experts and a token '
    'cache of your text, and pretrains a model on it. Prints the commands that '
    'do each of these alone.',
    example="mowe pretrain 'corpus/*.jsonl.gz' --questions qa.jsonl "
    '--minutes 30 --output runs/mine',
  )
  parser.add_argument('files', nargs='+', help=data_verbs.TEXT_FILES)
  parser.add_argument(
    '--output',
    default='pretrained',
    help='the model folder to write (default: pretrained)',
  )
  parser.add_argument(
    '--model',
    default='mowe_tiny',
    help='a model of gin_configs/models/, such as t5_tiny, or a gin file '
    '(default: mowe_tiny)',
  )
  parser.add_argument(
    '--vocabulary',
    help="a SentencePiece model, or 'bytes'; default: one is trained",
  )
  parser.add_argument(
    '--vocabulary_size',
    type=int,
    help='number of ids of a vocabulary that is trained; default: 8,000, or as '
    'many as the text fills',
  )
  parser.add_argument(
    '--questions',
    nargs='+',
    default=(),
    help='files whose field `question` the vocabulary is trained on too',
  )
  parser.add_argument(
    '--num_experts',
    type=int,
    help='how many experts the words share, of a model that has them (default: '
    '2,048)',
  )
  data_verbs.add_field(parser)
  data_verbs.add_on_bad_record(parser)
  _add_budget(parser, 'steps of the recipe, 2,000')
  gin_arguments.add_to(parser)
  parser.set_defaults(run=_pretrain)


def _pretrain(options, bindings):
  from mowe.commands.own_text import pretrain

  pretrain.pretrain(
    options.files,
    options.output,
    model=options.model,
    vocabularies=pretrain.Vocabularies(
      options.vocabulary,
      options.vocabulary_size,
      options.questions,
      options.num_experts,
    ),
    field=options.field,
    **_of_run(options, bindings),
  )


def _add_finetune(verbs):
  parser = verb_parsers.add(
    verbs,
    'finetune',
    does='finetune a model on questions, and score its best checkpoint',
    description='Splits questions into those for training, those by which the '
    'checkpoint is chosen, and those that are reported (8 : 1 : 1); finetunes '
    'the model until the second ones are no longer answered better; and answers '
    'the third ones.',
    example='mowe finetune runs/mine qa.jsonl --epochs 20',
  )
  parser.add_argument('model', help='a model folder, or a checkpoint in it')
  parser.add_argument(
    'questions',
    nargs='+',
    help='files with the fields question and answers, or globs of them',
  )
  parser.add_argument(
    '--choosing',
    nargs='+',
    default=(),
    help='files of questions that choose the checkpoint; default: a tenth of '
    'the others',
  )
  parser.add_argument(
    '--reported',
    nargs='+',
    default=(),
    help='files of questions that are reported; default: a tenth of the others',
  )
  parser.add_argument(
    '--output', help='the model folder to write (default: MODEL_finetuned)'
  )
  data_verbs.add_on_bad_record(parser)
  _add_budget(parser, 'steps of the recipe, 500')
  gin_arguments.add_to(parser)
  parser.set_defaults(run=_finetune)


def _finetune(options, bindings):
  from mowe.commands.own_text import finetune, question_split

  finetune.finetune(
    options.model,
    question_split.QuestionFiles(
      options.questions, options.choosing, options.reported
    ),
    options.output,
    **_of_run(options, bindings),
  )


def _add_budget(parser, default):
  """Adds the options that say how long a run trains."""
  group = parser.add_mutually_exclusive_group()
  group.add_argument(
    '--steps', type=int, help=f'how many updates to make (default: {default})'
  )
  group.add_argument(
    '--epochs', type=float, help='how often to go over the examples'
  )
  group.add_argument(
    '--minutes',
    type=float,
    help='how long the steps of training take on this machine; preparing, '
    'evaluating and saving come on top',
  )


def _of_run(options, bindings):
  """The arguments that both verbs pass on to their run."""
  from mowe.commands.own_text import run_budget

  budget = None
  if options.steps is not None:
    budget = run_budget.Steps(options.steps)
  elif options.epochs is not None:
    budget = run_budget.Epochs(options.epochs)
  elif options.minutes is not None:
    budget = run_budget.Minutes(options.minutes)
  return {
    'budget': budget,
    'gin_files': options.gin_file,
    'bindings': gin_arguments.all_bindings(options, bindings),
    'search_paths': gin_arguments.search_paths(options),
    'skip_bad_records': options.on_bad_record == 'skip',
  }
