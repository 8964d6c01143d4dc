"""T5X's checkpoints by Orbax, with the tree of the legacy layout in `state/`.

Source: t5x/checkpoints.py, OrbaxCheckpointManagerInterface.
"""

import pathlib
from collections.abc import Mapping

import flax
import numpy as np
import orbax.checkpoint as ocp

from mowe.interop import weights
from mowe.interop.t5x import orbax_arrays

Path = weights.Path

STATE = 'state'


def read(folder: pathlib.Path) -> dict[Path, weights.Array]:
  """Reads arrays by path, such as ('target', 'token_embedder', 'embedding').

  Raises:
    ValueError: the checkpoint is not whole, or names something outside of it.
  """
  return orbax_arrays.read(folder / STATE)


def write(folder: pathlib.Path, state: Mapping[Path, weights.Array]) -> None:
  """Writes a checkpoint to a new folder; all arrays are in memory at once."""
  tree = flax.traverse_util.unflatten_dict(
    {path: np.asarray(array[...]) for path, array in state.items()}
  )
  handler = ocp.CompositeCheckpointHandler(
    state=ocp.PyTreeCheckpointHandler(use_ocdbt=True)
  )
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(
      folder.absolute(),
      args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)),
    )
