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
  of_device = device_peak()
  if of_device is None:
    return PeakMemory(process_peak(), 'process')
  return PeakMemory(of_device, 'device')


def device_peak() -> int | None:
  """The bytes of the fullest device of this process; None if none tells."""
  told = [one.memory_stats() or {} for one in jax.local_devices()]
  peaks = [
    one['peak_bytes_in_use'] for one in told if 'peak_bytes_in_use' in one
  ]
  return int(max(peaks)) if peaks else None


def process_peak() -> int:
  """The bytes of this process in main memory."""
  try:
    # On Linux, ru_maxrss of a process begins with the peak of the process that
    # started it. VmHWM does not.
    status = pathlib.Path('/proc/self/status').read_text()
    (used,) = re.findall(r'^VmHWM:\s*(\d+) kB$', status, re.MULTILINE)
    return int(used) * 1024
  except (OSError, ValueError):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # ru_maxrss counts kilobytes, but bytes on macOS.
  unit = 1 if sys.platform == 'darwin' else 1024
  return used * unit
