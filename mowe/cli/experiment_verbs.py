"""Verbs that train and compare several models."""

from mowe.cli import gin_arguments

# Everything else is imported by the verb that needs it: `mowe --help` is fast.


def add_to(verbs) -> None:
  """Adds the verbs to the subparsers of `mowe`."""
  _add_compare(verbs)
  _add_quickstart(verbs)


def _add_compare(verbs):
  parser = verbs.add_parser(
    'compare', help='train and compare the models of an experiment'
  )
  parser.add_argument('experiment', help='gin_configs/experiments/*.gin')
  gin_arguments.add_to(parser)
  parser.add_argument(
    '--dry_run', action='store_true', help='size the models, and stop'
  )
  parser.add_argument(
    '--add',
    action='append',
    default=[],
    metavar='NAME=FOLDER',
    help='a finetuned model from elsewhere',
  )
  parser.set_defaults(run=_compare)


def _compare(options, bindings):
  _leave_devices_to_runs()
  from mowe.comparison import compare, experiments

  experiment = experiments.load(
    [options.experiment, *options.gin_file],
    [*options.gin_bindings, *bindings],
    [path for path in options.gin_search_paths.split(',') if path],
  )
  for added in options.add:
    experiment = experiments.with_folder(experiment, added)
  compared = compare.compare(experiment, dry_run=options.dry_run)
  if compared is not None:
    compare.show(compared)


def _add_quickstart(verbs):
  parser = verbs.add_parser(
    'quickstart', help='T5 and MoWE of equal FLOPs, from text to answers'
  )
  parser.add_argument('--output', default='quickstart_output')
  parser.add_argument(
    '--data_dir', help='documents, qa_train, qa_validation .jsonl of your own'
  )
  parser.add_argument(
    '--documents', help='text for a data_dir that has questions alone'
  )
  parser.add_argument(
    '--recipe', default='world', help='gin_configs/examples/<recipe>_*.gin'
  )
  parser.add_argument('--vocabulary', help='default: trained on the text')
  parser.add_argument('--vocabulary_size', type=int, default=1000)
  parser.add_argument('--num_experts', type=int, default=2048)
  parser.add_argument('--names_files', nargs='*', default=())
  parser.add_argument('--num_seeds', type=int, default=1)
  parser.add_argument(
    '--with_longer_t5', action='store_true', help='a T5 trained 3x as long'
  )
  parser.add_argument(
    '--with_larger_t5',
    action='store_true',
    help='a T5 with as many parameters in all (hours on a CPU)',
  )
  parser.add_argument(
    '--with_moe',
    nargs='+',
    default=(),
    choices=('switch', 'top2', 'expert_choice', 'hash'),
    help='also mixtures of experts',
  )
  parser.add_argument('--steps', type=int, help='of pretraining')
  parser.add_argument('--finetune_steps', type=int)
  parser.set_defaults(run=_quickstart)


def _quickstart(options, bindings):
  del bindings
  _leave_devices_to_runs()
  from mowe.comparison import quickstart

  settings = vars(options)
  for name in ('verb', 'run'):
    del settings[name]
  quickstart.quickstart(settings.pop('output'), **settings)


def _leave_devices_to_runs():
  """Runs are processes of their own; this one only looks at shapes."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
