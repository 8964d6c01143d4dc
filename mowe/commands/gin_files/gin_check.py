"""`mowe config check`: what gin files would run, found without running them."""

import ast
import dataclasses
import functools
import importlib.util
import os
import pathlib
import tokenize
from collections.abc import Iterable, Iterator, Sequence

from gin import config_parser

from mowe.commands.gin_files import gin_config

# What gin itself brings for values. It calls nothing but what a file names.
_OF_GIN = ('gin.constant', 'gin.macro', 'gin.singleton')


@dataclasses.dataclass(frozen=True)
class Found:
  """Something that a gin file imports, names or includes.

  Attributes:
    name: its full name, such as 'mowe.models.t5.t5_config.T5Config'.
    place: file and line.
    is_ours: whether it is a module of mowe, or defined in one, or gin's own.
  """

  name: str
  place: str
  is_ours: bool


@dataclasses.dataclass(frozen=True)
class Checked:
  """What gin files would do if they were read.

  Attributes:
    files: the files, each after those that it includes.
    imports: the modules that would be imported, which runs their code.
    configured: classes and functions whose arguments are set, or which are
      handed on (`@name`).
    called: classes and functions that a value calls (`@name()`).
  """

  files: tuple[str, ...]
  imports: tuple[Found, ...]
  configured: tuple[Found, ...]
  called: tuple[Found, ...]

  def outside(self) -> list[Found]:
    """All that is not in the package mowe, each once."""
    found = (*self.imports, *self.configured, *self.called)
    return _once(one for one in found if not one.is_ours)


def check(files: Sequence[str], paths: Sequence[str] = ()) -> Checked:
  """Finds what gin files import and call; nothing of it is imported or called.

  Args:
    files: the files, in the order in which they would be read.
    paths: folders that come before those of `gin_config.search_paths`.

  Raises:
    GinError: a file is missing, or is no gin file (with the line).
  """
  read: dict[str, Checked] = {}
  for file in files:
    _read_with_included(file, paths, (), read)
  return Checked(
    files=tuple(read),
    imports=tuple(one for file in read.values() for one in file.imports),
    configured=tuple(one for file in read.values() for one in file.configured),
    called=tuple(one for file in read.values() for one in file.called),
  )


def show(checked: Checked) -> None:
  """Prints what was found, and at last what is outside of mowe."""
  print('Files, in the order in which they are read:')
  for name in checked.files:
    print(f'  {name}')
  for title, found in (
    ('Modules that are imported, which runs their code', checked.imports),
    ('Called when a value is used', checked.called),
    ('Named: arguments are set, or it is handed on', checked.configured),
  ):
    print(f'{title}:')
    for one in _once(found):
      print(f'  {one.name}  ({one.place})')
  outside = checked.outside()
  if not outside:
    print('Nothing is from outside of mowe.')
    return
  print('Outside of mowe; read this code before you run these files:')
  for one in outside:
    print(f'  {one.name}  ({one.place})')


def _once(found: Iterable[Found]) -> list[Found]:
  """The first of each name."""
  first: dict[str, Found] = {}
  for one in found:
    first.setdefault(one.name, one)
  return list(first.values())


def _read_with_included(file, paths, outer, read):
  """Adds to `read` the files that a file includes, and then itself.

  Args:
    file: its name, as a command or another file gives it.
    paths: see `check`.
    outer: the paths of the files by way of which it is included.
    read: what was found in each file so far, by its path.
  """
  path = find(file, paths, outer)
  if path in outer:
    raise gin_config.GinError(
      f'A gin file must not include itself, but {path} does, by way of '
      f'{" and ".join(outer)}. Take one of the includes out.'
    )
  if path in read:
    return
  own, included = _read(path)
  for one in included:
    _read_with_included(one, paths, (*outer, path), read)
  read[path] = own


def find(file: str, paths: Sequence[str], outer: Sequence[str] = ()) -> str:
  """Returns the path of a file in the folders in which gin would look for it.

  Args:
    file: its name, as a command or another file gives it.
    paths: see `check`.
    outer: the paths of the files by way of which it is included.

  Raises:
    GinError: it is not there.
  """
  for folder in gin_config.search_paths(paths):
    path = os.path.normpath(os.path.join(folder, file))
    if os.path.isfile(path):
      return path
  included = f' {outer[-1]} includes it.' if outer else ''
  raise gin_config.GinError(gin_config.missing_file([file], paths) + included)


class _Names(config_parser.ParserDelegate):
  """Keeps the names of references in place of what they refer to."""

  def __init__(self):
    self.references: list[tuple[str, bool]] = []

  def configurable_reference(self, scoped_configurable_name, evaluate):
    self.references.append((scoped_configurable_name, evaluate))

  def macro(self, macro_name):
    del macro_name


def statements(
  path: str, names: config_parser.ParserDelegate
) -> Iterator[tuple]:
  """Yields the statements of a file, of classes of `gin.config_parser`.

  Args:
    path: the file.
    names: makes values of the references in it.

  Raises:
    GinError: it is no gin file.
  """
  try:
    with open(path, encoding='utf-8') as file:
      yield from config_parser.ConfigParser(file, names)
  except (SyntaxError, ValueError, tokenize.TokenError) as error:
    raise gin_config.GinError(
      f'A gin file must be one that gin can read, but {path} is not: {error}\n'
      'Correct the line.'
    ) from error


def _read(path: str) -> tuple[Checked, list[str]]:
  """What one file would do by itself, and the names of those it includes."""
  names, modules, included = _Names(), {}, []
  imports, configured, called = [], [], []
  shown = pathlib.Path(path).name
  for statement in statements(path, names):
    place = f'{shown}:{statement.location.line_num}'
    match statement:
      case config_parser.ImportStatement(module='__gin__.dynamic_registration'):
        # It makes names those of the modules that the file imports.
        continue
      case config_parser.ImportStatement(module=module):
        bound = statement.bound_name()
        whole = statement.is_from or statement.alias
        modules[bound] = module if whole else bound
        imports.append(Found(module, place, _is_ours(module)))
      case config_parser.IncludeStatement(filename=name):
        included.append(name)
      case config_parser.BlockDeclaration(selector=name):
        configured.append(_found(name, modules, place))
      case config_parser.BindingStatement(selector=name, arg_name=argument):
        # A macro has no argument.
        if argument:
          configured.append(_found(name, modules, place))
    for name, is_called in names.references:
      among = called if is_called else configured
      among.append(_found(name, modules, place))
    names.references.clear()
  checked = Checked((path,), tuple(imports), tuple(configured), tuple(called))
  return checked, included


def _found(name, modules, place):
  """A class or function by the name that a file has for it."""
  first, dot, rest = name.rpartition('/')[2].partition('.')
  full = f'{modules.get(first, first)}{dot}{rest}'
  return Found(full, place, _is_ours(full))


@functools.cache
def _is_ours(name: str) -> bool:
  """Whether a name is that of a module of mowe, or is defined in one.

  What a module of mowe has imported is not: `@train.os.system()` calls what is
  outside, whatever stands before it. Only packages of mowe are imported here.
  """
  parts = name.split('.')
  if parts[0] != 'mowe':
    return name in _OF_GIN
  spec = importlib.util.find_spec('mowe')
  for number in range(2, len(parts) + 1):
    if spec.submodule_search_locations is None:
      # All that is left must be one name of this module.
      return number == len(parts) and parts[-1] in _defined(spec.origin)
    spec = importlib.util.find_spec('.'.join(parts[:number]))
    if spec is None:
      return False
  return True


def _defined(file: str) -> set[str]:
  """Names of the classes and functions that a module defines itself."""
  tree = ast.parse(pathlib.Path(file).read_text('utf-8'))
  kinds = (ast.ClassDef, ast.FunctionDef)
  return {node.name for node in tree.body if isinstance(node, kinds)}
