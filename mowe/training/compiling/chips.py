"""What the chips of accelerators can do, by the data sheets of their makers.

Sources: the pages of Google Cloud's documentation on TPU v4, v5e, v5p and v6e;
NVIDIA's data sheets of A100, H100 and H200 (SXM).
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, which is one device of JAX.

  Attributes:
    platform: 'tpu' or 'gpu'.
    memory_bytes: its high-bandwidth memory.
    flops: the most additions and multiplications in bfloat16 per second, dense.
    memory_speed: bytes per second that its memory reads and writes at most.
    link_speed: bytes per second that it sends to other chips of its slice or
      host at most, over all of its links in one direction.
  """

  platform: str
  memory_bytes: int
  flops: float
  memory_speed: float
  link_speed: float


# By their names in a topology.
CHIPS = {
  'v4': Chip('tpu', 32 * _GIB, 275e12, 1200e9, 300e9),
  'v5e': Chip('tpu', 16 * _GIB, 197e12, 819e9, 200e9),
  'v5p': Chip('tpu', 95 * _GIB, 459e12, 2765e9, 600e9),
  'v6e': Chip('tpu', 32 * _GIB, 918e12, 1640e9, 448e9),
  'a100': Chip('gpu', 80 * _GIB, 312e12, 2039e9, 300e9),
  'h100': Chip('gpu', 80 * _GIB, 989e12, 3352e9, 450e9),
  'h200': Chip('gpu', 141 * 10**9, 989e12, 4800e9, 450e9),
}
