"""Devices that are not there, for which programs can be compiled nevertheless.

The compiler of an accelerator runs on a machine without one. It tells whether a
program compiles, what memory it needs, and which collectives it has.
"""

import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

# libtpu looks for a TPU and its neighbors, unless these say that there are
# none. Tests and benchmarks may load it in several processes at a time.
_NO_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def tpu_devices(topology: str) -> Sequence[jax.Device]:
  """Returns the devices of a TPU slice that is not there.

  Arrays cannot be put on them. `jax.jit(...).lower(...).compile()` compiles for
  them if its arguments are `jax.ShapeDtypeStruct` with shardings on them.

  Args:
    topology: the chip and the shape of the slice, such as 'v5p:2x2x1', 'v5e:2x4'
      or 'v4:2x2x2'.

  Raises:
    ModuleNotFoundError: libtpu, which has the compiler, is not installed.
  """
  try:
    import libtpu  # noqa: F401
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'Compiling for a TPU needs its compiler, but the package libtpu is not '
      'installed. Install the version that jax names: pip install "jax[tpu]" '
      '(Linux on x86-64).'
    ) from error
  for name, value in _NO_TPU.items():
    os.environ.setdefault(name, value)
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
