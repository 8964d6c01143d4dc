"""Translating names of another framework to ours and back, by a table of rules.

The functions that apply a table refuse a name that no rule matches, or more
than one, so that nothing of a checkpoint is lost without a message.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# How many names an error shows; a checkpoint may have thousands.
_SHOWN = 10

Path = tuple[str, ...]


class Rule(NamedTuple):
  """Says where the tensors of some names belong.

  Attributes:
    theirs: the whole names of tensors. `{layer}` stands for a number, and so
      does any other word in braces; `{expert}` is the position of the tensor in
      an array of all experts.
    ours: the path of our parameter, with the same numbers except `{expert}`;
      None for a tensor that is not needed.
    is_transposed: whether the tensor is the transpose of ours.
    is_copy: whether the tensor is a copy of the tensor of another rule. If both
      are there they must be equal, and if only the copy is there it is read in
      place of the other. Copies are not written.
  """

  theirs: str
  ours: str | None
  is_transposed: bool = False
  is_copy: bool = False


class Place(NamedTuple):
  """The place of one tensor among our parameters.

  Attributes:
    path: the path of our parameter; None if the tensor is not needed.
    expert: the position of the tensor on the first axis of the parameter; None
      if it is the whole parameter.
    rule: the rule that matches the name of the tensor.
  """

  path: Path | None
  expert: int | None
  rule: Rule


def places(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Place]:
  """Returns the place of every tensor by its name.

  Raises:
    ValueError: no rule matches a name, or more than one does.
  """
  found, unknown = {}, []
  for name in names:
    matches = [(_regex(rule.theirs).fullmatch(name), rule) for rule in rules]
    matches = [(match, rule) for match, rule in matches if match]
    if not matches:
      unknown.append(name)
      continue
    if len(matches) > 1:
      raise ValueError(
        f'Every tensor must match one rule, but {name} matches '
        f'{[rule.theirs for _, rule in matches]}. Remove one of them.'
      )
    match, rule = matches[0]
    numbers = match.groupdict()
    expert = numbers.get('expert')
    found[name] = Place(
      rule.ours and tuple(rule.ours.format(**numbers).split('/')),
      None if expert is None else int(expert),
      rule,
    )
  if unknown:
    raise ValueError(
      'Every tensor must match one rule, but no rule is for '
      f'{listed(unknown)}. Take a checkpoint of the architecture that the '
      'rules are for, or add a rule.'
    )
  return found


def without_copies(
  tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]
) -> dict[str, np.ndarray]:
  """Returns the tensors that are needed, each once, by the name of the
  original.

  Raises:
    ValueError: copies are not equal; and the errors of `places`.
  """
  kept, copies = {}, {}
  for name, place in places(tensors, rules).items():
    if place.rule.is_copy:
      copies[name] = place.path
    elif place.path is not None:
      kept[name] = tensors[name]
  for name, path in copies.items():
    original = _names(path, rules)[0].theirs
    if original not in kept:
      kept[original] = tensors[name]
    elif not _same(kept[original], tensors[name]):
      raise ValueError(
        f'{name} must equal {original}, as the model of config.json has one '
        'parameter for both, but differs. A model with two of them cannot be '
        'read.'
      )
  return kept


def check_names(
  given: Mapping[str, Any],
  wanted: Mapping[str, Any],
  source: str = 'config.json',
) -> None:
  """Raises ValueError unless names and shapes are those that are wanted.

  Args:
    given: name -> what was found, with a shape.
    wanted: name -> what the model has, with a shape.
    source: what describes the model, for the error.
  """
  missing = sorted(set(wanted) - set(given))
  surplus = sorted(set(given) - set(wanted))
  other = [
    f'{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}'
    for name in sorted(set(wanted) & set(given))
    if given[name].shape != wanted[name].shape
  ]
  found = [
    f'{what}: {listed(names)}'
    for what, names in (
      ('missing', missing),
      ('too many', surplus),
      ('of another shape', other),
    )
    if names
  ]
  if found:
    raise ValueError(
      f'The tensors must be those of the model in {source}, but are '
      f'{"; ".join(found)}. Take both from the same checkpoint.'
    )


def to_ours(
  tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]
) -> dict[Path, np.ndarray]:
  """Returns float32 parameters by path; tensors of experts become one array.

  Every expert must be there, which `check_names` makes sure of.
  """
  shapes: dict[Path, tuple[int, ...]] = {}
  found = places(tensors, rules)
  for name, place in found.items():
    shape = _moved(tensors[name], place.rule).shape
    if place.expert is not None:
      most = max(place.expert + 1, shapes.get(place.path, (0,))[0])
      shape = (most, *shape)
    shapes[place.path] = shape
  params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
  for name, place in found.items():
    where = ... if place.expert is None else place.expert
    params[place.path][where] = _moved(tensors[name], place.rule)
  return params


def to_theirs(
  params: Mapping[Path, np.ndarray], rules: Sequence[Rule]
) -> dict[str, np.ndarray]:
  """Returns tensors by name, as views of the parameters; inverse of `to_ours`.

  Raises:
    ValueError: no rule matches a parameter, or more than one does.
  """
  tensors = {}
  for path, value in params.items():
    matches = _names(path, rules)
    if len(matches) != 1:
      raise ValueError(
        f'Every parameter must match one rule, but {"/".join(path)} matches '
        f'{[rule.theirs for rule in matches] or "none"}. The other framework '
        'has no such model.'
      )
    rule = matches[0]
    numbers = _regex(rule.ours).fullmatch('/'.join(path)).groupdict()
    if '{expert}' not in rule.theirs:
      tensors[rule.theirs.format(**numbers)] = _moved(value, rule)
      continue
    for expert, kernel in enumerate(value):
      name = rule.theirs.format(**numbers, expert=expert)
      tensors[name] = _moved(kernel, rule)
  return tensors


def listed(names: Sequence[str]) -> str:
  """Returns the first names as text, and how many more there are."""
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + more


def _names(path, rules):
  """Returns the rules by which a parameter is written."""
  return [
    rule
    for rule in rules
    if rule.ours is not None
    and not rule.is_copy
    and _regex(rule.ours).fullmatch('/'.join(path))
  ]


@functools.lru_cache(maxsize=1024)
def _regex(template):
  """Returns the regular expression of the names that a rule matches.

  Numbers have no leading zeros, so that no two names stand for one tensor.
  """
  parts = re.split(r'\{(\w+)\}', template)
  return re.compile(
    ''.join(
      rf'(?P<{part}>0|[1-9]\d*)' if i % 2 else re.escape(part)
      for i, part in enumerate(parts)
    ),
    re.ASCII,
  )


def _moved(tensor, rule):
  return tensor.T if rule.is_transposed else tensor


def _same(a, b):
  return (
    a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
  )
