"""Removes modules from a model: chooses those to keep, and adapts the gates."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mowe.layers.routers import added_modules, pruned_modules, tokens_choose
from mowe.models import model_config
from mowe.models.surgery import module_surgery, modules_edits

# From the place of a layer to the numbers of the modules left, in their order.
Kept = Mapping[str, tuple[int, ...]]


class Gates(Protocol):
  """How the gates of the remaining modules are computed after pruning."""

  def fields(
    self, one: module_surgery.ModuleLayer, kept: tuple[int, ...]
  ) -> Any:
    """Returns the fields that change in the smaller layer.

    Args:
      one: the layer before pruning.
      kept: numbers of the modules that are left, in their order.
    """

  def takes_columns(self, one: module_surgery.ModuleLayer) -> bool:
    """Whether the router's columns of removed modules are removed too."""


@dataclasses.dataclass(frozen=True)
class Renormalise:
  """The softmax of the router is over the modules that are left.

  Gates grow by the factor 1 / (1 - p), where p is the probability that the
  removed modules had.
  """

  def fields(
    self, one: module_surgery.ModuleLayer, kept: tuple[int, ...]
  ) -> dict[str, Any]:
    """See `Gates`."""
    return {
      'num_experts': len(kept),
      'routing': _smaller(one.layer.routing, kept),
      'losses': module_surgery.plain_losses(one.layer.losses),
    }

  def takes_columns(self, one: module_surgery.ModuleLayer) -> bool:
    """See `Gates`."""
    del one
    return True


@dataclasses.dataclass(frozen=True)
class KeepGates:
  """Gates stay what they were: removed modules are masked after the softmax.

  The router keeps their columns. A token that never chose a removed module has
  the same outputs.
  """

  def fields(
    self, one: module_surgery.ModuleLayer, kept: tuple[int, ...]
  ) -> dict[str, Any]:
    """See `Gates`."""
    if self.takes_columns(one):
      return Renormalise().fields(one, kept)
    layer = one.layer
    router, logits = layer.routing, layer.logits
    losses = module_surgery.plain_losses(layer.losses)
    columns, num_columns = kept, one.num_columns
    if isinstance(router, pruned_modules.KeptChoose):
      columns = tuple(router.kept[number] for number in kept)
      router, logits, losses = router.router, logits.logits, losses.losses
    return {
      'num_experts': len(kept),
      'routing': pruned_modules.KeptChoose(router, columns, num_columns),
      'logits': pruned_modules.KeptLogits(logits, num_columns - len(kept)),
      'losses': pruned_modules.KeptLosses(losses, columns, num_columns),
    }

  def takes_columns(self, one: module_surgery.ModuleLayer) -> bool:
    """True if the gates of chosen modules do not depend on other modules."""
    router = one.layer.routing
    return isinstance(router, tokens_choose.TokensChoose) and (
      router.sigmoid or router.renormalize
    )


def prune(
  config: model_config.ModelConfig, kept: Kept, gates: Gates
) -> tuple[model_config.ModelConfig, modules_edits.Edits]:
  """Removes modules from some layers of a model.

  Args:
    config: the config of the trained model.
    kept: numbers of the modules that are left, by the place of each layer that
      changes.
    gates: how gates are computed afterwards, `Renormalise()` or `KeepGates()`.

  Returns:
    The config of the smaller model, and the edits that make its parameters.

  Raises:
    ValueError: no such layer or module, a layer that would have fewer modules
      than a token meets, or one that cannot be pruned in this way.
  """
  layers = {one.place: one for one in module_surgery.module_layers(config)}
  if not layers:
    raise ValueError(
      'The model must have layers of modules (a router, and parameters with '
      'the axis `expert`), but has none. There is nothing to prune.'
    )
  _check_places(layers, kept)
  changes, edits = {}, {}
  for place, numbers in kept.items():
    one = layers[place]
    check_kept(one, numbers)
    changes[place] = gates.fields(one, numbers)
    taken = dict(one.slabs)
    taken |= {
      path: axis
      for path, axis in one.columns.items()
      if gates.takes_columns(one) or path[-1] == 'selection_bias'
    }
    for path, axis in taken.items():
      edits[path] = modules_edits.Take(axis, numbers)
  return module_surgery.with_layers(config, changes), edits


def check_kept(one: module_surgery.ModuleLayer, kept: tuple[int, ...]) -> None:
  """Raises ValueError if a layer cannot work with these modules alone."""
  module_surgery.check_router(one)
  in_order = all(a < b for a, b in zip(kept, kept[1:], strict=False))
  if kept and not (0 <= kept[0] and kept[-1] < one.num_modules and in_order):
    raise ValueError(
      f'Modules of {one.place} must be numbers from 0 to '
      f'{one.num_modules - 1} in increasing order, but are {kept}. Name each '
      'one that is left once.'
    )
  for numbers, k in module_surgery.fewest(one.layer.routing, one.num_modules):
    left = sum(number in numbers for number in kept)
    if left < k:
      which = f'modules {numbers[0]} to {numbers[-1]} of {one.place}'
      raise ValueError(
        f'Each token meets {k} of {which}, so at least {k} must be left, but '
        f'{left} would be. Keep more: a larger fraction, or a lower threshold.'
      )


def most_used(
  one: module_surgery.ModuleLayer, counts: Sequence[int], fraction: float
) -> tuple[int, ...]:
  """Returns the modules of a layer that were chosen most often.

  Of modules with equal counts the first are taken. If the layer has old and
  added modules, of each kind at least as many are left as a token chooses.

  Args:
    one: the layer of modules.
    counts: how often each module of the layer was chosen.
    fraction: share of the modules that are left, above 0 and at most 1; their
      number is rounded.

  Raises:
    ValueError: too few would be left.
  """
  if not 0 < fraction <= 1:
    raise ValueError(
      'The fraction of modules that are left must be above 0 and at most 1, '
      f'but is {fraction}. Give a larger fraction: a layer cannot be left '
      'without modules.'
    )
  number = math.floor(fraction * one.num_modules + 0.5)
  needed = sum(
    k for _, k in module_surgery.fewest(one.layer.routing, one.num_modules)
  )
  if number < needed:
    raise ValueError(
      f'Each token meets {needed} modules of {one.place}, so at least {needed} '
      f'must be left, but {fraction:g} of {one.num_modules} are {number}. Take '
      'a larger fraction.'
    )
  return _best(one, counts, number)


def above_threshold(
  one: module_surgery.ModuleLayer,
  counts: Sequence[int],
  threshold: float,
  multiple: int = 1,
) -> tuple[int, ...]:
  """Returns the modules that were chosen often enough.

  At least as many are left as each token chooses.

  Args:
    one: the layer of modules.
    counts: how often each module of the layer was chosen.
    threshold: the least count, as a multiple of the mean count of the layer.
    multiple: the number of modules left is rounded up to a multiple of this.
  """
  if threshold < 0:
    raise ValueError(
      f'The threshold must not be negative, but is {threshold}. Give it as a '
      'multiple of the mean count of the modules of a layer.'
    )
  least = threshold * np.mean(counts)
  number = sum(count >= least for count in counts)
  for _, k in module_surgery.fewest(one.layer.routing, one.num_modules):
    number = max(number, k)
  number = min(-(-number // multiple) * multiple, one.num_modules)
  needed = sum(
    k for _, k in module_surgery.fewest(one.layer.routing, one.num_modules)
  )
  return _best(one, counts, max(number, needed))


def _best(one, counts, number):
  """Returns the `number` most used modules, with the fewest of each range."""
  if len(counts) != one.num_modules:
    raise ValueError(
      f'There must be a count for each of the {one.num_modules} modules of '
      f'{one.place}, but there are {len(counts)}. Measure this very model: '
      '`mowe modules usage`.'
    )
  order = sorted(range(one.num_modules), key=lambda m: (-counts[m], m))
  kept = []
  for numbers, k in module_surgery.fewest(one.layer.routing, one.num_modules):
    kept += [m for m in order if m in numbers][:k]
  kept += [m for m in order if m not in kept][: number - len(kept)]
  return tuple(sorted(kept))


def _smaller(router, kept):
  """Returns the router for the modules that are left."""
  if isinstance(router, added_modules.AddedChoose):
    old = tuple(m for m in kept if m < router.num_old)
    return dataclasses.replace(
      router, router=_smaller(router.router, old), num_old=len(old)
    )
  if isinstance(router, pruned_modules.KeptChoose):
    raise ValueError(
      'A layer that was pruned with its gates kept can only be pruned in the '
      'same way again, but gates were to be renormalised. Leave --gates out, '
      'or prune the model from which it came.'
    )
  return router


def _check_places(layers, kept):
  unknown = sorted(set(kept) - set(layers))
  if unknown:
    raise ValueError(
      f'Only layers of modules can be pruned, which are {sorted(layers)}, but '
      f'{unknown} were to be pruned. Measure this very model: `mowe modules '
      'usage`.'
    )
