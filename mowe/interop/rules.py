"""Names of another framework to ours, as a table of rules.

A table is applied by one function, which refuses a name that no rule or more
than one rule matches: nothing of a checkpoint is lost without a word.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
  """Where the tensors of some names belong.

  Attributes:
    pattern: matches whole names. A group called `expert` is the position of the
      tensor in an array of all experts.
    path: of our parameter, with the pattern's groups in it as in `re.sub`; None
      for a tensor that is not needed.
    move: what is done to the tensor, such as `np.transpose`.
  """

  pattern: str
  path: str | None
  move: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor


class Place(NamedTuple):
  """Where one tensor belongs.

  Attributes:
    path: of our parameter; None: nowhere.
    expert: position on its first axis; None: the tensor is all of it.
    move: what is done to the tensor.
  """

  path: tuple[str, ...] | None
  expert: int | None
  move: Callable[[np.ndarray], np.ndarray]


def places(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Place]:
  """The place of every name.

  Raises:
    ValueError: a name that no rule matches, or two do.
  """
  found = {}
  for name in names:
    matches = [(re.fullmatch(rule.pattern, name), rule) for rule in rules]
    matches = [(match, rule) for match, rule in matches if match]
    if len(matches) != 1:
      patterns = [rule.pattern for _, rule in matches]
      raise ValueError(
        f'Every tensor must match one rule, but {name} matches '
        f'{patterns or "none"}. Take a checkpoint of the architecture that the '
        'rules are for, or add a rule.'
      )
    match, rule = matches[0]
    expert = match.groupdict().get('expert')
    found[name] = Place(
      rule.path and tuple(match.expand(rule.path).split('/')),
      None if expert is None else int(expert),
      rule.move,
    )
  return found


def translate(
  tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]
) -> dict[tuple[str, ...], np.ndarray]:
  """Parameters by path; those of experts [expert, ...] are put together.

  Raises:
    ValueError: the errors of `places`; two tensors for one parameter that are
      not equal; or experts that are missing.
  """
  whole: dict[tuple[str, ...], np.ndarray] = {}
  parts: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
  for name, place in places(tensors, rules).items():
    if place.path is None:
      continue
    value = place.move(tensors[name])
    if place.expert is not None:
      parts.setdefault(place.path, {})[place.expert] = value
    elif place.path not in whole:
      whole[place.path] = value
    elif not np.array_equal(whole[place.path], value):
      raise ValueError(
        f'{"/".join(place.path)} is one parameter here, but {name} differs '
        'from another tensor for it. A model with two of them cannot be read.'
      )
  for path, experts in parts.items():
    if sorted(experts) != list(range(len(experts))):
      raise ValueError(
        f'{"/".join(path)} must have experts from 0 on without a gap, but has '
        f'{sorted(experts)}. Read all files of the checkpoint.'
      )
    whole[path] = np.stack([experts[e] for e in range(len(experts))])
  return whole
