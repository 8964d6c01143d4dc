"""Names of another framework to ours and back, as a table of rules.

A table is applied by functions that refuse a name that no rule or more than one
rule matches: nothing of a checkpoint is lost without a word.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Names in an error; a checkpoint may have thousands.
_SHOWN = 10

Path = tuple[str, ...]


class Rule(NamedTuple):
  """Where the tensors of some names belong.

  Attributes:
    theirs: whole names of tensors. `{layer}` stands for a number, and so does
      any other word in braces; `{expert}` is the position of the tensor in an
      array of all experts.
    ours: path of our parameter, with the same numbers but `{expert}`; None for
      a tensor that is not needed.
    is_transposed: the tensor is the transpose of ours.
    is_copy: the tensor holds once more what another rule's does. It is read in
      place of that one, or must equal it, and is not written.
  """

  theirs: str
  ours: str | None
  is_transposed: bool = False
  is_copy: bool = False


class Place(NamedTuple):
  """Where one tensor belongs.

  Attributes:
    path: of our parameter; None: nowhere.
    expert: position on its first axis; None: the tensor is all of it.
    rule: the rule that says so.
  """

  path: Path | None
  expert: int | None
  rule: Rule


def places(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Place]:
  """The place of every name.

  Raises:
    ValueError: names that no rule matches, or two do.
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
  """The tensors that are needed, each once, under the name that is written.

  Raises:
    ValueError: the errors of `places`, or copies that are not equal.
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
    given: name to something with a shape.
    wanted: likewise.
    source: what describes the model.
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
  """Float32 parameters by path; those of experts are put together.

  Takes what `check_names` let pass: each expert must be there.
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
  """Inverse of `to_ours`: tensors by name, as views of the parameters.

  Raises:
    ValueError: parameters that no rule or two rules are for.
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
  """The first names, and how many more there are."""
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return ', '.join(names[:_SHOWN]) + more


def _names(path, rules):
  """The rules by which a parameter is written."""
  return [
    rule
    for rule in rules
    if rule.ours is not None
    and not rule.is_copy
    and _regex(rule.ours).fullmatch('/'.join(path))
  ]


@functools.lru_cache(maxsize=1024)
def _regex(template):
  """Numbers are written without zeros in front, so that names are unique."""
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
