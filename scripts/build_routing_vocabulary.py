"""`mowe build-routing-vocabulary` from a checkout."""

import sys

from mowe.cli import main

if __name__ == '__main__':
  sys.exit(main.main(['build-routing-vocabulary', *sys.argv[1:]]))
