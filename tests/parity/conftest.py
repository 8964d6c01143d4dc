"""The folder of golden arrays of reference implementations."""

import pathlib


def pytest_configure(config):
  config.parity_dir = pathlib.Path(config.getoption('--golden_dir'))
