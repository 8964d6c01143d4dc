"""Options of gin, which several verbs have, and what they say."""


def add_to(parser) -> None:
  """Adds --gin_file and the like to a verb."""
  parser.add_argument(
    '--gin_file', action='append', default=[], help='read in order'
  )
  parser.add_argument(
    '--gin_search_paths', default='', help='folders, joined by commas'
  )
  parser.add_argument(
    '--gin_bindings', action='append', default=[], help='"NAME = VALUE"'
  )


def take_bindings(rest: list[str]) -> list[str]:
  """Removes `--gin.NAME=VALUE` from `rest`; returns them as bindings."""
  bindings = []
  for argument in [a for a in rest if a.startswith('--gin.')]:
    name, equals, value = argument.removeprefix('--gin.').partition('=')
    if not equals:
      raise SystemExit(
        f'mowe: {argument} must be --gin.NAME=VALUE. Put no blank around =.'
      )
    bindings.append(f'{name} = {value}')
    rest.remove(argument)
  return bindings


def parse(options, bindings: list[str]):
  """Reads the gin files of a verb; returns the module `gin_config`."""
  from mowe.commands import gin_config

  paths = [path for path in options.gin_search_paths.split(',') if path]
  gin_config.parse(options.gin_file, [*options.gin_bindings, *bindings], paths)
  return gin_config
