"""`mowe ask` from a checkout."""

import sys

from mowe.cli import main

if __name__ == '__main__':
  sys.exit(main.main(['ask', *sys.argv[1:]]))
