"""Adds verbs whose help has a description and an example."""

import argparse
import textwrap

# Columns of the help, as argparse takes them on a terminal of 80 columns.
_WIDTH = 78

# What the verbs that read gin files say of macros.
MACROS = (
  'Settings are macros of the gin files: MODEL_DIR, TRAIN_STEPS, BATCH_SIZE and '
  'so on, set by --gin.NAME=VALUE. The first lines of a file say which it needs '
  'and which it provides; docs/gin.md explains them all.'
)


def add(
  verbs, name: str, *, does: str, description: str, example: str
) -> argparse.ArgumentParser:
  """Adds a verb to the subparsers of `mowe`.

  Args:
    verbs: the subparsers.
    name: the verb.
    does: what it does, in the list of verbs.
    description: what it does, in its own help.
    example: a command as it is typed; it may have several lines.

  Returns:
    The parser of the verb, without options.
  """
  return verbs.add_parser(
    name,
    help=does,
    description=textwrap.fill(description, _WIDTH),
    epilog='example:\n' + textwrap.indent(example, '  '),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
