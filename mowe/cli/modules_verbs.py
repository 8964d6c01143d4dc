"""`mowe modules`: the options of its actions, and what they call."""

from mowe.cli import gin_arguments, verb_parsers


def add_to(verbs) -> None:
  """Adds the verb `modules` to the subparsers of `mowe`."""
  parser = verb_parsers.add(
    verbs,
    'modules',
    does='add, prune or measure modules',
    description='Reads a model of modules, and writes one with more or fewer of '
    'them, or how often a task uses each.',
    example='mowe modules add runs/modules runs/modules_more --mlp 4',
  )
  actions = parser.add_subparsers(dest='action', required=True)
  add = actions.add_parser('add', help='write a model with more modules')
  prune = actions.add_parser('prune', help='write a model with fewer modules')
  for action in (add, prune):
    action.add_argument('source', help='a model folder, or a checkpoint in it')
    action.add_argument('target', help='the model folder to write')
    action.add_argument(
      '--expert_parts',
      type=int,
      default=1,
      help='size of the mesh axis expert, over which modules will be split',
    )
  add.add_argument(
    '--mlp',
    type=int,
    default=0,
    help='number of new modules in each layer of MLP modules',
  )
  add.add_argument(
    '--attention',
    type=int,
    default=0,
    help='number of new modules in each layer of attention modules',
  )
  add.add_argument(
    '--k',
    type=int,
    default=1,
    help='number of new modules that each token meets',
  )
  add.add_argument(
    '--seed', type=int, default=0, help='seed of the new modules (default: 0)'
  )
  add.set_defaults(run=_modules_add)
  prune.add_argument(
    '--usage', required=True, help='usage.json of `mowe modules usage`'
  )
  prune.add_argument('--fraction', type=float, help='share of modules to keep')
  prune.add_argument(
    '--threshold',
    type=float,
    help='keep modules used at least this much, relative to the mean',
  )
  prune.add_argument(
    '--gates',
    choices=('keep', 'renormalise'),
    default='keep',
    help='whether the gates of kept modules stay as they are, or grow by what '
    'the removed ones had',
  )
  prune.set_defaults(run=_modules_prune)
  usage = actions.add_parser('usage', help='count the modules a task uses')
  gin_arguments.add_to(usage)
  usage.set_defaults(run=_modules_usage)


def _modules_add(options, bindings):
  del bindings
  from mowe.commands import modules

  modules.add(
    options.source,
    options.target,
    mlp=options.mlp,
    attention=options.attention,
    k=options.k,
    seed=options.seed,
    expert_parts=options.expert_parts,
  )


def _modules_prune(options, bindings):
  del bindings
  from mowe.commands import modules

  modules.prune(
    options.source,
    options.target,
    usage=options.usage,
    fraction=options.fraction,
    threshold=options.threshold,
    gates=options.gates,
    expert_parts=options.expert_parts,
  )


def _modules_usage(options, bindings):
  gin_config = gin_arguments.parse(options, bindings)
  from mowe.commands import modules

  gin_config.call(modules.usage)
