"""`mowe convert` from a checkout."""

import sys

from mowe.cli import main

if __name__ == '__main__':
  sys.exit(main.main(['convert', *sys.argv[1:]]))
