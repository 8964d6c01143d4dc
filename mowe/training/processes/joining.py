"""Joins the processes of a run, on one host or on several."""

import os
import warnings

import jax

# JAX ends all processes of a run when one has said nothing for so long.
_HEARTBEAT_SECONDS = 30
_WAIT_SECONDS = 300


class CannotJoinError(ValueError):
  """A process does not find the others of its run."""


def join(
  address: str | None = None, count: int | None = None, index: int | None = None
) -> bool:
  """Connects this process with the others of its run, if there are others.

  It must be called before JAX is used. Without arguments JAX looks for the
  others where a launcher names them: on the hosts of a TPU slice, also in GKE,
  in tasks that `srun` starts on SLURM, and in Open MPI. Elsewhere the process
  is alone. On SLURM and in Open MPI every process has one GPU; a process whose
  arguments are all given has all GPUs of its host.

  Args:
    address: host:port of process 0; None leaves it to JAX.
    count: number of processes; None leaves it to JAX, 1 looks for no others.
    index: number of this process, from 0; None leaves it to JAX.

  Returns:
    Whether JAX was told of a run of several processes, or of a slice of TPUs,
    which may have one host; False if the process is alone.

  Raises:
    CannotJoinError: the arguments do not fit each other, or the others are not
      found in time.
  """
  if count == 1 and index in (None, 0):
    return False
  if jax.distributed.is_initialized():
    return True
  given = {
    '--coordinator_address': address,
    '--process_count': count,
    '--process_index': index,
  }
  _check(given)
  are_given = [value is not None for value in given.values()]
  with warnings.catch_warnings():
    if 'JOB_COMPLETION_INDEX' not in os.environ:
      # Such a pod of Kubernetes is alone and needs no package for joining.
      warnings.filterwarnings('ignore', '.*Kubernetes environment detected')
    try:
      jax.distributed.initialize(
        address,
        count,
        index,
        cluster_detection_method='deactivate' if all(are_given) else None,
        initialization_timeout=_WAIT_SECONDS,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      )
    except ValueError as error:
      if not any(are_given):
        # JAX found no launcher.
        if 'coordinator_address' in str(error):
          return False
        raise
      raise CannotJoinError(
        'A process of a run must know where the others are, but no launcher '
        f'that JAX knows started this one, and it has only {_listed(given)}. '
        'Give --coordinator_address, --process_count and --process_index.'
      ) from error
    except RuntimeError as error:
      # A program that has used JAX before, such as a notebook, is alone.
      is_late = 'must be called before' in str(error)
      if is_late and not any(are_given):
        return False
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
      where = f' at {address}' if address else ''
      raise CannotJoinError(
        f'All processes of a run must start within {_WAIT_SECONDS} seconds, '
        f'but this one did not find process 0{where}, or process 0 not all '
        'others. Start the same command on every host, and make sure that '
        'they can reach that address.'
      ) from error
  return True


def _check(given: dict[str, str | int | None]) -> None:
  """Raises CannotJoinError if arguments do not fit each other."""
  address, count, index = given.values()
  if address is not None:
    port = address.rpartition(':')[2]
    if ':' not in address or not port.isdecimal():
      raise CannotJoinError(
        f'--coordinator_address must be host:port, but is {address!r}. Name '
        'the host of process 0 and a free port, such as 10.0.0.1:8476.'
      )
  if count is not None and count < 1:
    raise CannotJoinError(
      f'--process_count must be at least 1, but is {count}. Give the number of '
      'processes that train together.'
    )
  if index is not None and not 0 <= index < (count or index + 1):
    raise CannotJoinError(
      '--process_index must be from 0 to --process_count - 1, but it is '
      f'{index} of {count or "a number that is not given"}. Number the '
      'processes from 0.'
    )


def _listed(given: dict[str, str | int | None]) -> str:
  return ' and '.join(
    f'{name} {value}' for name, value in given.items() if value is not None
  )
