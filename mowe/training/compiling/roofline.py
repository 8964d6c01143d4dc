"""How long a step must take at least, by what its chips can do."""

from collections.abc import Mapping
from typing import NamedTuple

from mowe.training.compiling import chips, program_facts

# How many bytes a device sends at least for one byte of a result, with n
# devices in the exchange, where no byte is sent twice over the same link.
_SENT = {
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: n - 1,
  'all-to-all': lambda n: (n - 1) / n,
  'ragged-all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
}


class Roofline(NamedTuple):
  """Seconds that parts of a step take at least; they may go on at one time.

  Attributes:
    compute: the additions and multiplications.
    memory: reading and writing of the chip's memory.
    links: exchanges with other chips.
  """

  compute: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    """The time of the longest part."""
    return max(self)

  @property
  def cause(self) -> str:
    """What takes the longest."""
    names = ('compute', 'memory', 'links between chips')
    return max(zip(self, names, strict=True))[1]


def roofline(
  chip: chips.Chip,
  *,
  num_chips: int,
  flops: float,
  memory_bytes: float,
  collectives: Mapping[str, program_facts.Collectives],
) -> Roofline:
  """Returns the least time of a step.

  Args:
    chip: each of the chips.
    num_chips: how many chips there are. Exchanges are taken to be among all of
      them.
    flops: additions and multiplications of one chip.
    memory_bytes: bytes that one chip reads and writes.
    collectives: the exchanges of the step, by their kind.
  """
  sent = sum(
    _SENT[kind](num_chips) * one.result_bytes
    for kind, one in collectives.items()
  )
  return Roofline(
    compute=flops / chip.flops,
    memory=memory_bytes / chip.memory_speed,
    links=sent / chip.link_speed,
  )
