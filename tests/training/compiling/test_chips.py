"""Tests that devices of a machine are recognized by what JAX calls them."""

import types

import pytest

from mowe.training.compiling import chips


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('TPU v4', 'v4'),
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('NVIDIA A100-SXM4-80GB', 'a100'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'),
    ('cpu', None),
    ('TPU v3', None),
  ],
)
def test_a_device_is_known_by_its_kind(kind, name):
  found = chips.of_device(types.SimpleNamespace(device_kind=kind))
  assert found == chips.CHIPS.get(name)
