"""Which blocks of a stack have a sparse feed-forward."""


def every_nth(num_layers: int, n: int) -> tuple[int, ...]:
  """Returns the last of every n blocks: 1, 3, 5, ... for n = 2.

  This is flaxformer's mixed layout, and that of GShard; Hugging Face's Switch
  takes the second of every n blocks.

  Args:
    num_layers: number of blocks of the stack.
    n: one in n blocks is sparse.

  Raises:
    ValueError: no block would be sparse.
  """
  if not 1 <= n <= num_layers:
    raise ValueError(
      f'n must be at least 1 and at most the number of blocks, {num_layers}, '
      f'but is {n}. 1 makes all blocks sparse, 2 every second one.'
    )
  return tuple(range(n - 1, num_layers, n))
