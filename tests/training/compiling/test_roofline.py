"""Tests the least time of a step with numbers worked out by hand."""

from mowe.training.compiling import chips, program_facts, roofline

CHIP = chips.Chip(
  'tpu', (), 2**30, flops=1e12, memory_speed=1e9, link_speed=1e8
)


def make(**changes):
  values = {
    'num_chips': 4,
    'flops': 2e9,
    'memory_bytes': 3e6,
    'collectives': {},
  }
  return roofline.roofline(CHIP, **(values | changes))


def test_times_of_the_parts():
  exchanges = {
    # Every device sends and receives 3/4 twice, and then 3/4 once.
    'all-reduce': program_facts.Collectives(1, 4000),
    'all-gather': program_facts.Collectives(2, 8000),
    # Every device gets a quarter of a sum, and sends the other three.
    'reduce-scatter': program_facts.Collectives(1, 1000),
    'collective-permute': program_facts.Collectives(1, 500),
  }
  least = make(collectives=exchanges)
  assert least.compute == 2e-3
  assert least.memory == 3e-3
  assert least.links == (6000 + 6000 + 3000 + 500) / 1e8
  assert least.seconds == 3e-3
  assert least.cause == 'memory'


def test_what_takes_the_longest():
  assert make(flops=1e12).cause == 'compute'
  exchanges = {'all-to-all': program_facts.Collectives(1, 10**8)}
  assert make(collectives=exchanges).cause == 'links between chips'
  assert make(collectives=exchanges, num_chips=1).links == 0
