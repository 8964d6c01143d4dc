"""Colours of models must be seen, and told apart, by all readers."""

import itertools

import numpy as np
import pytest

from mowe.comparison.report import figure_colors

# How those see linear RGB who lack the cones for red or for green (Machado,
# Oliveira and Fernandes 2009, severity 1).
_SEEN = {
  'all cones': np.eye(3),
  'no red': np.array(
    [
      [0.152286, 1.052583, -0.204868],
      [0.114503, 0.786281, 0.099216],
      [-0.003882, -0.048116, 1.051998],
    ]
  ),
  'no green': np.array(
    [
      [0.367322, 0.860646, -0.227968],
      [0.280085, 0.672501, 0.047413],
      [-0.011820, 0.042940, 0.968881],
    ]
  ),
}
_TO_XYZ = np.array(
  [
    [0.4124, 0.3576, 0.1805],
    [0.2126, 0.7152, 0.0722],
    [0.0193, 0.1192, 0.9505],
  ]
)


def _linear(color):
  rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _contrast(first, second):
  low, high = sorted(_TO_XYZ[1] @ _linear(one) for one in (first, second))
  return (high + 0.05) / (low + 0.05)


def _lab(linear):
  xyz = _TO_XYZ @ np.clip(linear, 0, 1) / _TO_XYZ.sum(axis=1)
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize('theme', [figure_colors.LIGHT, figure_colors.DARK])
def test_models_stand_out_from_the_page_and_from_each_other(theme):
  for color in (*theme.models, theme.text, theme.faint):
    assert _contrast(color, theme.page) >= 4.5, color
    assert _contrast(color, theme.card) >= 4.5, color
  for seen, matrix in _SEEN.items():
    for one, two in itertools.combinations(theme.models, 2):
      distance = np.linalg.norm(
        _lab(matrix @ _linear(one)) - _lab(matrix @ _linear(two))
      )
      assert distance > 12, (seen, one, two, distance)


def test_colors_have_names_of_their_own():
  for theme in (figure_colors.LIGHT, figure_colors.DARK):
    values = list(theme.variables().values())
    assert len(set(values)) == len(values)
  names = [
    theme.variables().keys()
    for theme in (figure_colors.LIGHT, figure_colors.DARK)
  ]
  assert names[0] == names[1]
