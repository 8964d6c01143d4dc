"""`mowe evaluate` from a checkout."""

import sys

from mowe.cli import main

if __name__ == '__main__':
  sys.exit(main.main(['evaluate', *sys.argv[1:]]))
