"""Where the golden arrays of reference implementations are."""

import pathlib


def pytest_configure(config):
  config.parity_dir = pathlib.Path(config.getoption('--golden_dir'))
