"""Makes sure that all processes of a run are of one run."""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils


class ProcessesDifferError(ValueError):
  """A process of a run has other settings, code or data than the others."""


def check_same(parts: Mapping[str, str]) -> None:
  """Compares some texts with those of all other processes.

  Every process must call it at the same point.

  Args:
    parts: name of a part, such as 'settings' -> text that must be equal.

  Raises:
    ProcessesDifferError: in every process, if one differs; the message names
      the part and the processes.
  """
  if jax.process_count() == 1:
    return
  names = sorted(parts)
  own = np.stack(
    [
      np.frombuffer(hashlib.sha256(parts[name].encode()).digest(), np.uint8)
      for name in names
    ]
  )
  # [processes, parts, bytes]
  found = np.asarray(multihost_utils.process_allgather(own))
  problems = [
    f'{name} of {_listed(odd)}'
    for number, name in enumerate(names)
    if (odd := _odd_ones(found[:, number]))
  ]
  if problems:
    raise ProcessesDifferError(
      'All processes of a run must have the same settings, code and data, but '
      f'the {" and the ".join(problems)} differ from those of the others. '
      'Start all of them with the same command, files and version.'
    )


def _odd_ones(digests: np.ndarray) -> list[int]:
  """The processes whose digest most others do not have; of two, the second."""
  values = [row.tobytes() for row in digests]
  # Of equally frequent ones the first counts as that of most.
  usual = max(values, key=values.count)
  return [number for number, value in enumerate(values) if value != usual]


def _listed(processes) -> str:
  many = 'es' if len(processes) > 1 else ''
  return f'process{many} {", ".join(map(str, processes))}'
