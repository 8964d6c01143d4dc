"""Reads gin files and bindings for all verbs."""

import copy
import difflib
import importlib.resources
import inspect
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import gin

from mowe.commands.gin_files import gin_types

_MACRO = re.compile(r'([A-Z][A-Z0-9_]*)\s*=')
_REQUIRED = '%gin.REQUIRED'


class GinError(ValueError):
  """A gin file or binding that cannot be used."""


def search_paths(extra: Sequence[str] = ()) -> list[str]:
  """Folders in which `gin_configs/...` and other gin files are looked up.

  First come the folders in `extra`, then the files that are installed with this
  package (or stand beside it in a checkout), then the working folder. A gin
  file is a program: files of a folder in which somebody happens to work must
  not take the place of those that the package names.
  """
  package = pathlib.Path(str(importlib.resources.files('mowe')))
  return [*extra, str(package), str(package.parent), '.']


def parse(
  files: Sequence[str],
  bindings: Sequence[str] = (),
  paths: Sequence[str] = (),
) -> None:
  """Reads gin files in their order, then bindings such as 'BATCH_SIZE = 8'.

  Raises:
    GinError: a file is missing or a name in it is unknown (with file and
      line), or a binding sets a macro that no file knows.
    UnfitValueError: a value is not of the type of its field.
  """
  gin.clear_config()
  # Gin's second reader looks for the file in a Python package. It fails if the
  # folder gin_configs can be imported, and warns about every other folder.
  del gin.config._FILE_READERS[1:]
  # Gin's own list begins with the working folder.
  gin.config._LOCATION_PREFIXES[:] = search_paths(paths)
  try:
    for file in files:
      gin.parse_config_file(file)
  except OSError as error:
    raise GinError(missing_file(files, paths, error)) from error
  # Gin raises nearly every kind of error, so all of them are caught. Their
  # texts name the file and the line.
  except Exception as error:
    advice = 'Correct the name or value in the file and line named above.'
    if isinstance(error, ImportError):
      advice = (
        'Correct the import in the file and line named above, or install what '
        'it needs.'
      )
    raise GinError(
      f'The gin configuration cannot be read: {error}\n{advice}'
    ) from error
  _check_macros(bindings)
  for binding in bindings:
    try:
      gin.parse_config(binding)
    except Exception as error:
      raise GinError(_bad_binding(binding, error)) from error
  gin_types.check()


def call(function: Callable[..., Any], **arguments: Any) -> Any:
  """Calls a function with the arguments that gin files gave it.

  Raises:
    GinError: a value that must be given is missing.
  """
  try:
    configured = gin.get_configurable(function)
  except ValueError as error:
    raise GinError(
      f'A gin file must configure {function.__module__}.{function.__name__}, '
      f'but none did. Add --gin_file=gin_configs/runs/'
      f'{_run_file(function)}.gin.'
    ) from error
  _check_all_given()
  return configured(**arguments)


def macro(name: str) -> Any:
  """The value of a macro in what was parsed last."""
  return gin.query_parameter(f'%{name}')


def has_macro(name: str) -> bool:
  """Whether what was parsed last defines or reads a macro."""
  return name in _known_macros()


def required_macros() -> list[str]:
  """The macros that must still be given a value."""
  given = _given_macros(gin.config_str(max_line_length=10_000))
  return [name for name, value in given.items() if value == _REQUIRED]


def made(name: str) -> Any:
  """The value of a macro, with every reference in it (`@name()`) called."""
  # Gin calls a reference when it is deep-copied.
  return copy.deepcopy(macro(name))


def configures(function: Callable[..., Any]) -> bool:
  """Whether what was parsed last sets an argument of a function or class."""
  try:
    # clear_config forgets the values of earlier files, but the function stays
    # registered. So only its bindings tell whether it is configured now.
    return bool(gin.get_bindings(function, resolve_references=False))
  except ValueError:
    return False


def given_values() -> list[str]:
  """All values that were parsed last, each as a line such as 'STEPS = 8'."""
  text = gin.config_str(max_line_length=10_000)
  lines = [line for line in text.splitlines() if ' = ' in line]
  return [line for line in lines if not line.startswith('#')]


def operative_config() -> str:
  """The text of one gin file with all values that were used so far."""
  return gin.operative_config_str()


def _run_file(function):
  """Name of the file in gin_configs/runs that configures a function."""
  return {'Training': 'pretrain', 'usage': 'modules_usage'}.get(
    function.__name__, function.__name__
  )


def missing_file(
  files: Sequence[str], paths: Sequence[str], error: OSError | None = None
) -> str:
  """The message for a gin file, or one that it includes, that is not there.

  Args:
    files: the files that were asked for.
    paths: folders that come before those of `search_paths`.
    error: what was raised for an included file, if all of `files` are there.
  """
  folders = [*dict.fromkeys(map(os.path.abspath, search_paths(paths)))]
  absent = [
    file
    for file in files
    if not any(os.path.exists(os.path.join(path, file)) for path in folders)
  ]
  if not absent:
    return (
      f'All files that a gin file includes must exist, but {error}. Correct '
      f'the line, or add a folder to {folders} with --gin_search_paths.'
    )
  shipped = [
    path.relative_to(folder).as_posix()
    for folder in folders
    for path in pathlib.Path(folder).glob('gin_configs/**/*.gin')
  ]
  close = difflib.get_close_matches(absent[0], shipped, 1)
  hint = f'Did you mean {close[0]}? ' if close else ''
  return (
    f'A gin file must exist, but there is no {absent[0]} in {folders}. {hint}'
    'Correct the name, or add a folder with --gin_search_paths.'
  )


def _bad_binding(binding, error) -> str:
  """The message for a binding of the command line that gin refuses."""
  name, _, value = map(str.strip, binding.partition('='))
  if isinstance(error, SyntaxError):
    return (
      f'--gin.{name} must have a value that gin can read, but {value} led to: '
      f"{error}\nCorrect it. Python's constants are True, False and None, and "
      "texts stand in quotes: --gin.NAMES=\"['a', 'b']\"."
    )
  return (
    f'--gin.{name} must set a macro, or a field of a class that a gin file '
    f'imports, but it led to: {error}\n{_near_field(name)}Correct the name.'
  )


def _near_field(name: str) -> str:
  """A hint if the name is nearly that of a field: `T5Config.emb_dimm`."""
  selector, _, field = name.rpartition('.')
  try:
    configurable = gin.get_configurable(selector)
  except ValueError:
    return ''
  # Gin hands out a subclass of a class, or a wrapper of a function.
  own = getattr(configurable, '__base__', None) or inspect.unwrap(configurable)
  fields = inspect.signature(own).parameters
  close = difflib.get_close_matches(field, fields, 1)
  return f'Did you mean {selector}.{close[0]}? ' if close else ''


def _check_macros(bindings):
  """Raises GinError if a binding sets a macro that nothing reads: a typo."""
  known = _known_macros()
  for binding in bindings:
    found = _MACRO.match(binding)
    if not found or found.group(1) in known:
      continue
    name = found.group(1)
    close = difflib.get_close_matches(name, known, 1)
    hint = f' Did you mean {close[0]}?' if close else ''
    raise GinError(
      f'--gin.{name} must set a macro that a gin file reads, but none reads '
      f'{name}.{hint} Known macros are {", ".join(sorted(known))}.'
    )


def _known_macros() -> set[str]:
  text = gin.config_str(max_line_length=10_000)
  return set(re.findall(r'^([A-Z][A-Z0-9_]*) =', text, re.MULTILINE)) | set(
    _read_macros(text)
  )


def _given_macros(text: str) -> dict[str, str]:
  """The values of all macros, as gin writes them."""
  return dict(re.findall(r'^([A-Z][A-Z0-9_]*) = (.*)$', text, re.MULTILINE))


def _read_macros(text: str) -> list[str]:
  """Names of macros that values refer to; what stands in quotes is a text."""
  without = re.sub(r"""'[^'\n]*'|"[^"\n]*\"""", "''", text)
  return re.findall(r'%([A-Z][A-Z0-9_]*)', without)


def _check_all_given():
  """Raises GinError if a value is missing.

  Gin itself would pass on a placeholder, or fail deep inside a call.
  """
  text = gin.config_str(max_line_length=10_000)
  given = _given_macros(text)
  if required := required_macros():
    raise GinError(
      f'These macros must be given, but are not: {", ".join(required)}. Add '
      f'each to the command, as --gin.{required[0]}=VALUE.'
    )
  missing = set(_read_macros(text)) - set(given)
  if missing:
    raise GinError(
      f'A gin file must provide {", ".join(sorted(missing))}, but none of '
      'those that were read does. MODEL and VOCABULARY are in gin_configs/'
      'models/, OPTIMIZER and ROW_OPTIMIZER in gin_configs/optimizers/. Put '
      'a --gin_file from these folders before that of the run.'
    )
