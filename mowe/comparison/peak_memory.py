"""Measures the most memory that this process has had."""

import dataclasses
import pathlib
import re
import resource
import sys

import jax


@dataclasses.dataclass(frozen=True)
class PeakMemory:
  """The most memory that was used at a time.

  Attributes:
    bytes: number of bytes.
    place: 'device' for memory of the accelerator, 'process' for that of the
      whole process if the device is the CPU.
  """

  bytes: int
  place: str


def peak() -> PeakMemory:
  """Returns the peak of the accelerator; on CPU that of the whole process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return PeakMemory(int(stats['peak_bytes_in_use']), 'device')
  try:
    # On Linux, ru_maxrss of a process begins with the peak of the process that
    # started it. VmHWM does not.
    status = pathlib.Path('/proc/self/status').read_text()
    (used,) = re.findall(r'^VmHWM:\s*(\d+) kB$', status, re.MULTILINE)
    return PeakMemory(int(used) * 1024, 'process')
  except (OSError, ValueError):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # ru_maxrss counts kilobytes, but bytes on macOS.
  unit = 1 if sys.platform == 'darwin' else 1024
  return PeakMemory(used * unit, 'process')
