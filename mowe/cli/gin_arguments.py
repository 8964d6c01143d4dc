"""The options of gin, which several verbs share, and how they are read."""

import os
import re

import shtab

# What begins with one of these is gin's own: a reference, a macro, a text in
# quotes, or a list, tuple or dict.
_OF_GIN = tuple('@%\'"([{')
# Gin reads the first three. Somebody who writes one of the others means them,
# and gin refuses it.
_CONSTANTS = ('True', 'False', 'None', 'true', 'false', 'none', 'null')
_NUMBER = re.compile(r'-?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?')
_BINDING = re.compile(r'([\w./]+)\s*=\s*(.*)', re.DOTALL)


def add_to(parser) -> None:
  """Adds --gin_file, --gin_search_paths and --gin_bindings to a verb."""
  file = parser.add_argument(
    '--gin_file',
    action='append',
    default=[],
    help='a gin file; may be repeated, and files are read in their order',
  )
  # Shells complete the names of files here.
  file.complete = shtab.FILE
  add_search_paths(parser)
  parser.add_argument(
    '--gin_bindings',
    action='append',
    default=[],
    help='a binding such as "NAME = VALUE"; may be repeated',
  )


def add_search_paths(parser) -> None:
  """Adds --gin_search_paths to a verb; see `search_paths`."""
  parser.add_argument(
    '--gin_search_paths',
    default='',
    help='more folders with gin files, separated by commas',
  )


def search_paths(options) -> list[str]:
  """The folders that --gin_search_paths names."""
  return [path for path in options.gin_search_paths.split(',') if path]


def take_bindings(rest: list[str]) -> list[str]:
  """Removes all `--gin.NAME=VALUE` from `rest`, and returns them as bindings.

  A text among the values may stand without quotes.

  Raises:
    SystemExit: an argument has no `=`.
  """
  bindings = []
  for argument in [a for a in rest if a.startswith('--gin.')]:
    name, equals, value = argument.removeprefix('--gin.').partition('=')
    if not equals:
      raise SystemExit(
        f'mowe: {argument} must be --gin.NAME=VALUE. Put no blank around =.'
      )
    bindings.append(f'{name} = {_as_gin(value)}')
    rest.remove(argument)
  return bindings


def _as_gin(value: str) -> str:
  """A value of the command line as gin reads it.

  A text needs no quotes there: what is neither a number nor anything else that
  gin reads becomes a text, so `--gin.MODEL_DIR=runs/a` is enough. The shell
  replaces ~ by the home folder only where a word begins, so it is done here.
  """
  bare = value.strip()
  if (
    not bare
    or bare.startswith(_OF_GIN)
    or bare in _CONSTANTS
    or _NUMBER.fullmatch(bare)
  ):
    return value
  return repr(os.path.expanduser(bare))


def _read_leniently(binding: str) -> str:
  """A binding such as 'NAME = VALUE', whose text may stand without quotes."""
  found = _BINDING.fullmatch(binding.strip())
  return f'{found[1]} = {_as_gin(found[2])}' if found else binding


def parse(options, bindings: list[str]):
  """Reads the gin files and bindings of a verb.

  Returns:
    The module `gin_config`, which is imported only here.
  """
  from mowe.commands.gin_files import gin_config

  gin_config.parse(
    options.gin_file, all_bindings(options, bindings), search_paths(options)
  )
  say_what_is_lost(options.gin_file, search_paths(options))
  return gin_config


def all_bindings(options, bindings: list[str]) -> list[str]:
  """The bindings of --gin_bindings, and then those of `take_bindings`."""
  return [*map(_read_leniently, options.gin_bindings), *bindings]


def say_what_is_lost(files: list[str], paths: list[str]) -> None:
  """Prints which settings of these files have no effect."""
  from mowe.commands.gin_files import gin_order

  for sentence in gin_order.taken_back(files, paths):
    print(sentence)
