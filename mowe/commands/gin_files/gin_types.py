"""Compares the values in gin files and bindings with the types of fields.

Gin passes on whatever stands there. A text in place of a number would fail deep
inside of a run, with an error that names neither the field nor the macro.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import gin
import typeguard

_MACRO = 'gin.macro'


class UnfitValueError(ValueError):
  """A value in a gin file or binding is not of the type of its field."""


def check() -> None:
  """Checks all values that gin has parsed.

  Only functions and classes of mowe are looked at: those of others may take
  more than their annotations say. A value that gin makes by a call (`@name()`)
  is not known before the call, and is not checked, nor is None, which files give
  to parts that are not used. A list may stand for a tuple.

  Raises:
    UnfitValueError: a value does not have the type of its field or argument,
      or macros stand for each other.
  """
  for (_, selector), values in list(gin.config._CONFIG.items()):
    if not selector.startswith('mowe.'):
      continue
    hints = _hints(gin.config._REGISTRY.get_match(selector).wrapped)
    for name, value in values.items():
      macro, value = _resolved(value)
      if value is None or name not in hints or _has_reference(value):
        continue
      if not _fits(value, hints[name]):
        field = f'{selector.rpartition(".")[2]}.{name}'
        raise UnfitValueError(_message(macro, field, hints[name], value))


def _resolved(value: Any) -> tuple[str | None, Any]:
  """The macro in which a value stands in the end, if any, and the value."""
  seen: list[str] = []
  while isinstance(value, gin.config.ConfigurableReference):
    name, selector = value.config_key
    given = gin.config._CONFIG.get((name, selector), {})
    if selector != _MACRO or 'value' not in given:
      break
    if name in seen:
      raise UnfitValueError(
        f'A macro must stand for a value, but {" = %".join((*seen, name))} goes '
        f'round. Give a value with --gin.{name}=VALUE.'
      )
    seen.append(name)
    value = given['value']
  return (seen[-1] if seen else None), value


def _has_reference(value: Any) -> bool:
  if isinstance(value, gin.config.ConfigurableReference):
    return True
  if isinstance(value, Mapping):
    return any(map(_has_reference, [*value, *value.values()]))
  if isinstance(value, list | tuple):
    return any(map(_has_reference, value))
  return False


@functools.cache
def _hints(configured: Callable[..., Any]) -> dict[str, Any]:
  """The types of the arguments of a function, or of the fields of a class."""
  own = configured
  if inspect.isclass(own) and not dataclasses.is_dataclass(own):
    own = own.__init__
  try:
    return typing.get_type_hints(own)
  except (NameError, TypeError, AttributeError):
    # A type that is imported for type checkers only has no value here.
    return {}


def _fits(value: Any, hint: Any) -> bool:
  for candidate in (value, _with_tuples(value)):
    try:
      typeguard.check_type(
        candidate,
        hint,
        collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
        forward_ref_policy=typeguard.ForwardRefPolicy.IGNORE,
      )
    except typeguard.TypeCheckError:
      continue
    return True
  return False


def _with_tuples(value: Any) -> Any:
  """The value with tuples in place of its lists, at any depth."""
  if isinstance(value, dict):
    return {key: _with_tuples(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return tuple(map(_with_tuples, value))
  return value


def _message(macro: str | None, field: str, hint: Any, value: Any) -> str:
  name = macro or field
  also = f', which is {field},' if macro else ''
  quoted = ''
  if isinstance(value, int | float) and _fits('', hint):
    quoted = ' A text that looks like a number stands in quotes of its own.'
  return (
    f'{name}{also} must be {_said(hint)}, but is {value!r}. Correct it in the gin '
    f'file, or give another value with --gin.{name}=VALUE.{quoted}'
  )


# The types that most values have, in words.
_WORDS = {
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
  bool: 'True or False',
  type(None): 'None',
}


def _said(hint: Any) -> str:
  if hint in _WORDS:
    return _WORDS[hint]
  options = typing.get_args(hint)
  is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  if is_union and all(option in _WORDS for option in options):
    return ' or '.join(map(_said, options))
  name = str(hint) if options or not isinstance(hint, type) else hint.__name__
  return f'of the type {name}'
