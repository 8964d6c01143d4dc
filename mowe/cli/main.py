"""The `mowe` command; see README.md."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence

from mowe.cli import (
  data_verbs,
  experiment_verbs,
  gin_arguments,
  model_verbs,
  modules_verbs,
)

# In the order of `mowe --help`.
_GROUPS = (model_verbs, modules_verbs, data_verbs, experiment_verbs)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a verb; returns the exit status.

  Errors of input are shown as one paragraph, without a trace: they say what
  must hold, what was found and what to do. MOWE_TRACE=1 shows the trace.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  parser = _make_parser()
  options, rest = parser.parse_known_args(arguments)
  bindings = gin_arguments.take_bindings(rest)
  if rest:
    parser.error(
      f'unknown arguments {rest}. Options of gin are --gin.NAME=VALUE.'
    )
  if bindings and not hasattr(options, 'gin_file'):
    parser.error(f'{options.verb} reads no gin, but has {bindings}.')
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  try:
    options.run(options, bindings)
  except (ValueError, OSError, FloatingPointError) as error:
    if os.environ.get('MOWE_TRACE'):
      raise
    # Gin adds to every error through which of its calls it came.
    text = re.sub(r'\n\s*In call to configurable .*', '', str(error))
    print(f'mowe: {text}', file=sys.stderr)
    return 1
  except RuntimeError as error:
    # Of a callback, when a compiled program reads experts from the host: jax
    # keeps only the text.
    damaged = re.search(r'DamagedCheckpointError: (.*)', str(error))
    if not damaged or os.environ.get('MOWE_TRACE'):
      raise
    print(f'mowe: {damaged[1]}', file=sys.stderr)
    return 1
  except KeyboardInterrupt as error:
    print(f'mowe: {str(error) or "stopped."}', file=sys.stderr)
    return 130
  return 0


def _make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mowe', description='Sparse T5-style language models in JAX.'
  )
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
  for group in _GROUPS:
    group.add_to(verbs)
  return parser


if __name__ == '__main__':
  sys.exit(main())
