"""Finds settings of gin files that a later include takes back.

Gin reads a file from top to bottom, and the last value of a name counts. So a
setting above an include is lost without a word if the included file sets the
same name.
"""

from collections.abc import Sequence
from typing import NamedTuple

from gin import config_parser

from mowe.commands.gin_files import gin_check

# The scope, the class or function, and its argument; of a macro the last is ''.
_Name = tuple[str, str, str]


class _Setting(NamedTuple):
  """A value that a file gives to a name.

  Attributes:
    place: file and line.
    value: the value, with references by their names.
  """

  place: str
  value: object


class _Reference(NamedTuple):
  """A reference or a macro as gin writes it, by which values are compared."""

  text: str

  def __repr__(self) -> str:
    return self.text


class _Names(config_parser.ParserDelegate):
  """Keeps references and macros as they are written."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return _Reference(f'@{scoped_configurable_name}{"()" if evaluate else ""}')

  def macro(self, macro_name):
    return _Reference(f'%{macro_name}')


def taken_back(
  files: Sequence[str], paths: Sequence[str] = ()
) -> tuple[str, ...]:
  """Returns a sentence for each setting that has no effect.

  Args:
    files: the files, which must be there and be readable.
    paths: folders that come before those of `gin_config.search_paths`.
  """
  lost: dict[str, None] = {}
  for file in files:
    _settings(file, paths, (), lost)
  return tuple(lost)


def _settings(file, paths, outer, lost) -> dict[_Name, _Setting]:
  """What a file sets in the end; what it loses is added to `lost`."""
  path = gin_check.find(file, paths, outer)
  own: dict[_Name, _Setting] = {}
  whole: dict[_Name, _Setting] = {}
  modules: dict[str, str] = {}
  for statement in gin_check.statements(path, _Names()):
    match statement:
      case config_parser.IncludeStatement(filename=name):
        included = _settings(name, paths, (*outer, path), lost)
        for key in [key for key in own if key in included]:
          mine, theirs = own.pop(key), included[key]
          if mine.value != theirs.value:
            lost[_sentence(key, mine, theirs, statement, path)] = None
        whole |= included
      case config_parser.ImportStatement(module=module):
        bound = statement.bound_name()
        whole_name = statement.is_from or statement.alias
        modules[bound] = module if whole_name else bound
      case config_parser.BindingStatement(
        scope=scope, selector=selector, arg_name=argument, value=value
      ):
        # Files may import the same class by other names.
        first, dot, rest = selector.partition('.')
        key = scope, f'{modules.get(first, first)}{dot}{rest}', argument
        place = f'{path}:{statement.location.line_num}'
        own[key] = whole[key] = _Setting(place, value)
  return whole


def _sentence(key, mine, theirs, include, path) -> str:
  scope, selector, argument = key
  name = '.'.join(filter(None, (selector, argument)))
  if scope:
    name = f'{scope}/{name}'
  return (
    f'{mine.place}: {name} = {mine.value!r} has no effect, because '
    f'{include.filename}, which is included below it in line '
    f'{include.location.line_num}, sets it to {theirs.value!r}. Put it below '
    'the include.'
  )
