"""Adds modules to a trained model without changing its outputs at first.

See `mowe/layers/routers/added_modules.py` for the rule by which tokens choose
the new modules.
"""

from collections.abc import Mapping

import flax
import jax
import numpy as np

from mowe.layers.routers import added_modules
from mowe.models import initialization, model_config, threefry
from mowe.models.families import families
from mowe.models.surgery import module_surgery, modules_edits


def add(
  config: model_config.ModelConfig,
  numbers: Mapping[str, int],
  *,
  k: int = 1,
  seed: int = 0,
) -> tuple[model_config.ModelConfig, modules_edits.Edits]:
  """Adds modules to every layer of modules of some kinds.

  New slabs and router columns are drawn as those of a fresh model, but output
  kernels are zero: the model's outputs stay what they are.

  Args:
    config: the config of the trained model.
    numbers: from a kind of layer, 'mlp' or 'attention', to the number of new
      modules in each layer of that kind.
    k: number of new modules that each token chooses.
    seed: seed of the new slabs and router columns.

  Returns:
    The config of the larger model, and the edits that make its parameters.

  Raises:
    ValueError: no such layers, layers with another kind of router, or fewer
      new modules than k.
  """
  layers = module_surgery.module_layers(config)
  check_kinds(layers, numbers)
  numbers = {kind: number for kind, number in numbers.items() if number}
  changes, chosen = {}, []
  for one in layers:
    if one.kind not in numbers:
      continue
    module_surgery.check_router(one)
    if k > numbers[one.kind]:
      raise ValueError(
        'k must be at most the number of new modules, which is '
        f'{numbers[one.kind]} in {one.place}, but is {k}. Add more modules, or '
        'lower --k.'
      )
    chosen.append(one)
    changes[one.place] = {
      'num_experts': one.num_modules + numbers[one.kind],
      'routing': added_modules.AddedChoose(
        one.layer.routing, one.num_modules, k
      ),
      'losses': added_modules.AddedLosses(
        module_surgery.plain_losses(one.layer.losses), numbers[one.kind]
      ),
    }
  larger = module_surgery.with_layers(config, changes)
  return larger, _drawn(larger, chosen, seed)


def check_kinds(
  layers: tuple[module_surgery.ModuleLayer, ...], numbers: Mapping[str, int]
) -> None:
  """Raises ValueError unless there are layers of all kinds that are named."""
  kinds = sorted({one.kind for one in layers})
  if not layers:
    raise ValueError(
      'The model must have layers of modules (a router, and parameters with '
      'the axis `expert`), but has none. Take a model that was trained with '
      'MoeLayer or with attention modules.'
    )
  absent = [kind for kind, n in numbers.items() if n and kind not in kinds]
  if absent:
    raise ValueError(
      'Modules can only be added to layers that the model has, which are of '
      f'the kinds {kinds}, but were to be added to {absent}. Leave '
      f'--{absent[0]} out.'
    )
  if not any(numbers.values()) or min(numbers.values()) < 0:
    raise ValueError(
      'At least one module must be added, but the numbers are '
      f'{dict(numbers)}. Give --mlp or --attention.'
    )


def _drawn(config, layers, seed):
  """Appends the last slabs and columns of a fresh, larger model."""
  model = families.build(config)
  wanted = {
    path: (one, axis)
    for one in layers
    for path, axis in (one.slabs | one.columns).items()
  }
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  fresh = initialization.initial_parameters(
    model,
    threefry.key(seed),
    flax.traverse_util.unflatten_dict(dict.fromkeys(wanted, device)),
  )
  edits = {}
  for path, array in flax.traverse_util.flatten_dict(fresh).items():
    one, axis = wanted[path]
    # A pruned layer that kept its gates has more columns than slabs.
    old = _size(path, one)
    # The last modules along the axis are the new ones.
    new = np.asarray(array).take(range(old, array.shape[axis]), axis=axis)
    if path in one.outputs:
      new = np.zeros_like(new)
    edits[path] = modules_edits.Append(axis, new)
  return edits


def _size(path, one):
  """Returns the number of modules that a parameter had before."""
  by_column = path in one.columns and path[-1] != 'selection_bias'
  return one.num_columns if by_column else one.num_modules


def new_parts(
  config: model_config.ModelConfig,
) -> dict[module_surgery.Path, tuple[int, int]]:
  """Returns where the modules lie that were added last, which are to be
  trained.

  Returns:
    For the path of every parameter with such modules, the axis that counts
    modules and the number of modules at its end that were added last.
  """
  parts = {}
  for one in module_surgery.module_layers(config):
    router = one.layer.routing
    if isinstance(router, added_modules.AddedChoose):
      number = one.num_modules - router.num_old
      for path, axis in (one.slabs | one.columns).items():
        parts[path] = axis, number
  return parts
