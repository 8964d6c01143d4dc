"""Verbs that train and compare several models."""

from mowe.cli import gin_arguments, verb_parsers

# Each verb imports what it needs only when it runs, so that `mowe --help` is
# fast.


def add_to(verbs) -> None:
  """Adds the verbs to the subparsers of `mowe`."""
  _add_compare(verbs)
  _add_quickstart(verbs)


def _add_compare(verbs):
  parser = verb_parsers.add(
    verbs,
    'compare',
    does='train and compare the models of an experiment',
    description='Trains the models of an experiment at equal FLOPs or '
    'parameters, each with the same tries of its learning rate, asks them, and '
    'writes a report. A command that was stopped goes on. '
    + verb_parsers.MACROS,
    example='mowe compare gin_configs/experiments/world.gin --dry_run\n'
    'mowe compare gin_configs/experiments/world.gin --gin.OUTPUT=runs/world',
  )
  parser.add_argument('experiment', help='a file in gin_configs/experiments/')
  gin_arguments.add_to(parser)
  parser.add_argument(
    '--dry_run', action='store_true', help='print the sizes of models and stop'
  )
  parser.add_argument(
    '--as_measured',
    action='store_true',
    help='train no model: make the report from the measurements that are there, '
    'though an earlier version or other settings may have made them',
  )
  parser.add_argument(
    '--add',
    action='append',
    default=[],
    metavar='NAME=FOLDER',
    help='also compare a finetuned model from another folder',
  )
  parser.set_defaults(run=_compare)


def _compare(options, bindings):
  _leave_devices_to_runs()
  from mowe.comparison import compare, experiments

  files = [options.experiment, *options.gin_file]
  paths = gin_arguments.search_paths(options)
  experiment = experiments.load(
    files, gin_arguments.all_bindings(options, bindings), paths
  )
  gin_arguments.say_what_is_lost(files, paths)
  for added in options.add:
    experiment = experiments.with_folder(experiment, added)
  compared = compare.compare(
    experiment, dry_run=options.dry_run, as_measured=options.as_measured
  )
  if compared is not None:
    compare.show(compared)


def _add_quickstart(verbs):
  parser = verb_parsers.add(
    verbs,
    'quickstart',
    does='train and compare a T5 and a MoWE of equal FLOPs',
    description='Pretrains a T5 and a MoWE on a generated world or on documents '
    'of yours, finetunes both on questions, and reports how they answer others.',
    example='mowe quickstart\n'
    'mowe quickstart --data_dir my_data --recipe wiki_entities',
  )
  parser.add_argument(
    '--output',
    default='quickstart_output',
    help='folder for data, runs and the report (default: quickstart_output)',
  )
  parser.add_argument(
    '--data_dir',
    help='folder with your documents.jsonl, qa_train.jsonl and '
    'qa_validation.jsonl; default: a generated world',
  )
  parser.add_argument(
    '--documents', help='text file for a --data_dir that has only questions'
  )
  parser.add_argument(
    '--recipe', default='world', help='use gin_configs/examples/<recipe>_*.gin'
  )
  parser.add_argument('--vocabulary', help='default: train one on the text')
  parser.add_argument(
    '--vocabulary_size',
    type=int,
    default=1000,
    help='pieces of a vocabulary that is trained (default: 1,000)',
  )
  parser.add_argument(
    '--num_experts',
    type=int,
    default=2048,
    help='word experts of MoWE (default: 2,048)',
  )
  parser.add_argument(
    '--names_files',
    nargs='*',
    default=(),
    help='files of names; only their words get experts',
  )
  parser.add_argument(
    '--num_seeds',
    type=int,
    default=1,
    help='how often each model is trained (default: 1)',
  )
  parser.add_argument(
    '--with_longer_t5',
    action='store_true',
    help='also train a T5 for 3 times as many steps',
  )
  parser.add_argument(
    '--with_larger_t5',
    action='store_true',
    help='also train a T5 with as many parameters (hours on a CPU)',
  )
  parser.add_argument(
    '--with_moe',
    nargs='+',
    default=(),
    choices=('switch', 'top2', 'expert_choice', 'hash'),
    help='also train mixtures of experts with these routers',
  )
  parser.add_argument('--steps', type=int, help='steps of pretraining')
  parser.add_argument('--finetune_steps', type=int, help='steps of finetuning')
  parser.set_defaults(run=_quickstart)


def _quickstart(options, bindings):
  del bindings
  _leave_devices_to_runs()
  from mowe.comparison import quickstart

  quickstart.quickstart(
    options.output,
    data_dir=options.data_dir,
    documents=options.documents,
    recipe=options.recipe,
    vocabulary=options.vocabulary,
    vocabulary_size=options.vocabulary_size,
    num_experts=options.num_experts,
    names_files=options.names_files,
    num_seeds=options.num_seeds,
    with_longer_t5=options.with_longer_t5,
    with_larger_t5=options.with_larger_t5,
    with_moe=options.with_moe,
    steps=options.steps,
    finetune_steps=options.finetune_steps,
  )


def _leave_devices_to_runs():
  """Keeps this process off the accelerators.

  Every run is a process of its own and needs them. This process only computes
  shapes.
  """
  import jax

  jax.config.update('jax_platforms', 'cpu')
