"""Devices that are not there, for which programs can be compiled nevertheless.

The compiler of an accelerator runs on a machine without one. It tells whether a
program compiles, what memory it needs, and which collectives it has.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from mowe.training.compiling import chips

# libtpu looks for a TPU and its neighbors, unless these say that there are
# none. Tests and benchmarks may load it in several processes at a time.
_NO_TPU = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# How many numbers a shape has.
_NUM_AXES = {'tpu': (2, 3), 'gpu': (3,)}
_GPU_TARGETS = pathlib.Path(__file__).parent / 'gpu_targets'


@dataclasses.dataclass(frozen=True)
class Topology:
  """The shape of a slice of TPUs, or of hosts with GPUs.

  Attributes:
    name: as a user wrote it, such as 'v5p:2x2x1' or 'h100:1x1x8'.
    chip_name: the chip, a key of `chips.CHIPS`.
    shape: of a TPU, the numbers of chips along the axes of its slice; of GPUs,
      the numbers of slices, of hosts in a slice, and of GPUs in a host.
  """

  name: str
  chip_name: str
  shape: tuple[int, ...]

  @classmethod
  def parse(cls, name: str) -> 'Topology':
    """Reads a name; raises ValueError if it names no chips that are known."""
    found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
    chip_name, shape = found.groups() if found else (name, '')
    shape = tuple(map(int, filter(None, shape.split('x'))))
    chip = chips.CHIPS.get(chip_name)
    if chip is None or 0 in shape or len(shape) not in _NUM_AXES[chip.platform]:
      raise ValueError(
        'A topology must be a chip and the shape of its slice, such as '
        'v5e:2x4 or v5p:2x2x2, or for GPUs slices x hosts x GPUs of a host, '
        f'such as h100:1x1x8, but is {name!r}. The chips are '
        f'{", ".join(chips.CHIPS)}.'
      )
    return cls(name, chip_name, shape)

  @property
  def chip(self) -> chips.Chip:
    """What one of its chips can do."""
    return chips.CHIPS[self.chip_name]

  @property
  def compiler_options(self) -> dict[str, bool]:
    """Options with which a program can be compiled without the chip.

    XLA for GPU would time variants of products written in Triton on the GPU,
    and does not find one for every shape without. cuBLAS has them all.
    """
    is_gpu = self.chip.platform == 'gpu'
    return {'xla_gpu_enable_triton_gemm': False} if is_gpu else {}

  def devices(self) -> Sequence[jax.Device]:
    """Returns its devices, one for each chip.

    Arrays cannot be put on them. `jax.jit(...).lower(...).compile()` compiles
    for them if its arguments are `jax.ShapeDtypeStruct` with shardings on them.

    Raises:
      ModuleNotFoundError: the compiler for these chips is not installed.
      ValueError: there is no slice of this shape.
    """
    make = _tpu_devices if self.chip.platform == 'tpu' else _gpu_devices
    try:
      devices = make(self)
    except jax.errors.JaxRuntimeError as error:
      raise ValueError(
        'A topology must be one that the compiler knows, but it refuses '
        f'{self.name}: {error}. Hosts of TPUs have 2 x 2 chips, so that both '
        'first numbers are even; a single chip is 1x1.'
      ) from error
    assert len(devices) == math.prod(self.shape)
    return devices


def _tpu_devices(topology):
  _check_installed('libtpu', 'a TPU')
  for name, value in _NO_TPU.items():
    os.environ.setdefault(name, value)
  options = {}
  if topology.chip_name == 'v4':
    # Both cores of a chip are then one device.
    options['chip_config_name'] = 'megacore'
  if math.prod(topology.shape) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  return topologies.get_topology_desc(
    platform='tpu', topology_name=topology.name, **options
  ).devices


def _gpu_devices(topology):
  _check_installed('jax_cuda13_plugin', 'a GPU')
  target = _GPU_TARGETS / f'{topology.chip_name}.txtpb'
  return topologies.get_topology_desc(
    platform='cuda',
    target_config=target.read_text(encoding='utf-8'),
    topology='x'.join(map(str, topology.shape)),
  ).devices


def _check_installed(module: str, for_what: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise ModuleNotFoundError(
      f'Compiling for {for_what} needs its compiler, but the package '
      f'{module.replace("_", "-")} is not installed. Install the extra '
      "`compile`, on Linux on x86-64: pip install '.[compile]'"
    )
