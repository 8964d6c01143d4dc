"""What the chips of accelerators can do, by the data sheets of their makers.

Sources: the pages of Google Cloud's documentation on TPU v4, v5e, v5p and v6e;
NVIDIA's data sheets of A100, H100 and H200 (SXM).
"""

import dataclasses

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, which is one device of JAX.

  Attributes:
    platform: 'tpu' or 'gpu'.
    kinds: what `device_kind` of JAX's devices begins with, in small letters.
    memory_bytes: its high-bandwidth memory.
    flops: the most additions and multiplications in bfloat16 per second, dense.
    memory_speed: bytes per second that its memory reads and writes at most.
    link_speed: bytes per second that it sends to other chips of its slice or
      host at most, over all of its links in one direction.
  """

  platform: str
  kinds: tuple[str, ...]
  memory_bytes: int
  flops: float
  memory_speed: float
  link_speed: float


# By their names in a topology.
CHIPS = {
  'v4': Chip('tpu', ('tpu v4',), 32 * _GIB, 275e12, 1200e9, 300e9),
  'v5e': Chip(
    'tpu', ('tpu v5e', 'tpu v5 lite'), 16 * _GIB, 197e12, 819e9, 200e9
  ),
  'v5p': Chip('tpu', ('tpu v5p', 'tpu v5'), 95 * _GIB, 459e12, 2765e9, 600e9),
  'v6e': Chip(
    'tpu', ('tpu v6e', 'tpu v6 lite'), 32 * _GIB, 918e12, 1640e9, 448e9
  ),
  'a100': Chip('gpu', ('nvidia a100',), 80 * _GIB, 312e12, 2039e9, 300e9),
  'h100': Chip('gpu', ('nvidia h100',), 80 * _GIB, 989e12, 3352e9, 450e9),
  'h200': Chip('gpu', ('nvidia h200',), 141 * 10**9, 989e12, 4800e9, 450e9),
}


def of_device(device: jax.Device) -> Chip | None:
  """Returns what is known of a device of this machine; None if nothing is."""
  found = device.device_kind.lower()
  # 'tpu v5 lite' also begins with 'tpu v5', so the longest beginning counts.
  matches = [
    (len(kind), name)
    for name, chip in CHIPS.items()
    for kind in chip.kinds
    if found.startswith(kind)
  ]
  return CHIPS[max(matches)[1]] if matches else None
