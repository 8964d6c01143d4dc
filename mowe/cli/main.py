"""The `mowe` command; see README.md."""

import argparse
import errno
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence

import shtab

import mowe
from mowe.cli import (
  config_verbs,
  data_verbs,
  experiment_verbs,
  gin_arguments,
  model_verbs,
  modules_verbs,
  program_cache,
  text_verbs,
)
from mowe.training.performance import kept_memory
from mowe.words import terminal_text, terminations

# `mowe --help` shows the verbs in this order. Those of _OF_MODELS read model
# folders and run models, so they have the options of `_add_shared_options`.
_OF_MODELS = (text_verbs, model_verbs, modules_verbs)
_OTHERS = (data_verbs, experiment_verbs, config_verbs)
# Errors of a place without room, and of a user without more of it.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a verb, and returns the exit status.

  What it prints can steer no terminal (see `terminal_text`); Python itself
  prints the traces of errors that are raised again.

  Errors of input are shown as one paragraph without a trace, as they say what
  must hold, what was found and what to do. MOWE_TRACE=1 shows the trace.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  with terminal_text.harmless_output():
    return _run(arguments)


def _run(arguments: list[str]) -> int:
  parser = _make_parser()
  options, rest = parser.parse_known_args(arguments)
  bindings = gin_arguments.take_bindings(rest)
  if rest:
    parser.error(
      f'unknown arguments {rest}. Write a gin binding as --gin.NAME=VALUE.'
    )
  if bindings and not hasattr(options, 'gin_file'):
    parser.error(
      f'{options.verb} reads no gin files, but has {bindings}. Leave them out.'
    )
  options.command = shlex.join(['mowe', *arguments])
  if options.keep_programs:
    program_cache.use()
  if options.runs_models:
    kept_memory.keep_on_cpu()
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  try:
    if options.trust_module:
      from mowe.models.families import saved_config

      saved_config.trust(*options.trust_module)
    options.run(options, bindings)
  except (
    ValueError,
    OSError,
    FloatingPointError,
    ModuleNotFoundError,
  ) as error:
    if os.environ.get('MOWE_TRACE'):
      raise
    # Gin appends to every error the calls of its own that led there.
    text = re.sub(r'\n\s*In call to configurable .*', '', str(error))
    if isinstance(error, OSError) and error.errno in _FULL:
      text += (
        '. Make room there and run the same command again; what was finished '
        'is whole.'
      )
    print(f'mowe: {text}', file=sys.stderr)
    return 1
  except (RuntimeError, MemoryError) as error:
    from mowe.commands import out_of_memory

    # A compiled program reads experts of the host in a callback. JAX raises its
    # errors as RuntimeError and keeps only their text.
    damaged = re.search(r'DamagedCheckpointError: (.*)', str(error))
    text = damaged[1] if damaged else out_of_memory.explanation(error)
    if text is None or os.environ.get('MOWE_TRACE'):
      raise
    print(f'mowe: {text}', file=sys.stderr)
    return 1
  except KeyboardInterrupt as error:
    print(f'mowe: {str(error) or "stopped."}', file=sys.stderr)
    is_terminated = isinstance(error, terminations.Terminated)
    return 143 if is_terminated else 130
  return 0


def _make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mowe', description='Sparse T5-style language models in JAX.'
  )
  parser.add_argument(
    '--version',
    action='version',
    version=f'mowe {mowe.__version__}, Python {platform.python_version()}, '
    f'jax {importlib.metadata.version("jax")}',
    help='show the versions of mowe, Python and JAX',
  )
  shtab.add_argument_to(
    parser,
    '--print_completion',
    help='print a script that completes the names of verbs and options in a '
    'shell',
  )
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
  for group in _OF_MODELS:
    group.add_to(verbs)
  _add_shared_options(parser)
  for group in _OTHERS:
    group.add_to(verbs)
  # The other verbs compile little, or measure runs of their own, in which a
  # program that is found in the cache would not count.
  parser.set_defaults(trust_module=[], keep_programs=False, runs_models=False)
  return parser


def _add_shared_options(parser):
  """Adds options to all verbs so far, or to their subcommands."""
  below = [
    action
    for action in parser._actions
    if isinstance(action, argparse._SubParsersAction)
  ]
  for action in below:
    for verb in action.choices.values():
      _add_shared_options(verb)
  if not below:
    parser.add_argument(
      '--trust_module',
      action='append',
      default=[],
      metavar='MODULE',
      help='a Python module of your own whose layers a model folder may name; '
      'may be repeated. Reading the folder imports the module, which runs its '
      'code',
    )
    parser.add_argument(
      '--no_program_cache',
      dest='keep_programs',
      action='store_false',
      help='compile every program again, and keep none in the user cache folder',
    )
    parser.set_defaults(runs_models=True)


if __name__ == '__main__':
  sys.exit(main())
