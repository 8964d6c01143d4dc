"""The most memory that this process has had."""

import dataclasses
import pathlib
import re
import resource
import sys

import jax


@dataclasses.dataclass(frozen=True)
class PeakMemory:
  """The most that was used at a time.

  Attributes:
    bytes: how much.
    place: 'device', or 'process' where the device is the CPU.
  """

  bytes: int
  place: str


def peak() -> PeakMemory:
  """Of the accelerator; on CPU of the whole process, Python and data in it."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return PeakMemory(int(stats['peak_bytes_in_use']), 'device')
  try:
    # Linux hands the peak of the process that starts another one to it in
    # ru_maxrss, but not here.
    status = pathlib.Path('/proc/self/status').read_text()
    (used,) = re.findall(r'^VmHWM:\s*(\d+) kB$', status, re.MULTILINE)
    return PeakMemory(int(used) * 1024, 'process')
  except (OSError, ValueError):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In kilobytes, but for macOS.
  unit = 1 if sys.platform == 'darwin' else 1024
  return PeakMemory(used * unit, 'process')
