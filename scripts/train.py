"""`mowe train` from a checkout."""

import sys

from mowe.cli import main

if __name__ == '__main__':
  sys.exit(main.main(['train', *sys.argv[1:]]))
