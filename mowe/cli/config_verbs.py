"""`mowe config`: what can be asked about gin files."""

from mowe.cli import gin_arguments, verb_parsers


def add_to(verbs) -> None:
  """Adds the verb `config` to the subparsers of `mowe`."""
  parser = verb_parsers.add(
    verbs,
    'config',
    does='say what gin files would run',
    description='Answers questions about gin files, without running anything.',
    example='mowe config check gin_configs/examples/text_pretrain_mowe.gin',
  )
  actions = parser.add_subparsers(dest='action', required=True)
  check = actions.add_parser(
    'check',
    help='list what gin files import and call, without running anything',
    description='A gin file is a program: it imports modules and calls what '
    'they hold. This lists all of it, and what is outside of mowe, without '
    'running anything.',
  )
  check.add_argument('files', nargs='+', help='gin files, in their order')
  gin_arguments.add_search_paths(check)
  check.set_defaults(run=_check)


def _check(options, bindings):
  del bindings
  from mowe.commands.gin_files import gin_check

  paths = gin_arguments.search_paths(options)
  gin_check.show(gin_check.check(options.files, paths))
  gin_arguments.say_what_is_lost(options.files, paths)
