"""Mocks what TFDS gives for tasks of GLUE and SuperGLUE."""

import contextlib

import pytest

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

_LENGTHS = {'inputs': 400, 'targets': 40}


def read(name, split, raw, most=None):
  """Reads the examples of a task or mixture whose data set holds `raw`.

  Args:
    name: name of the task or mixture.
    split: the split to read.
    raw: fields with lists of their values; or a function that returns them for
      the name of the builder's config.
    most: number of examples to read, where the data repeat; None reads each
      example once.
  """
  # TFDS does not mock the count of examples that caching in memory needs.
  with mocked(raw):
    dataset = seqio.get_mixture_or_task(name).get_dataset(
      _LENGTHS,
      split,
      shuffle=False,
      num_epochs=None if most else 1,
      try_in_mem_cache=False,
    )
    return list(dataset.take(most or -1).as_numpy_iterator())


@contextlib.contextmanager
def mocked(raw):
  """Makes TFDS give these raw examples for whatever it is asked."""
  import tensorflow as tf

  def give(self, *args, **kwargs):
    del args, kwargs
    config = self.builder_config
    fields = raw(config.name if config else self.name) if callable(raw) else raw
    return tf.data.Dataset.from_tensor_slices(fields)

  with tfds.testing.mock_data(num_examples=1, as_dataset_fn=give):
    yield


@contextlib.contextmanager
def registered(module):
  """Registers the tasks of a module, and restores the registry at the end."""
  kinds = (seqio.MixtureRegistry, seqio.TaskRegistry)
  before = {kind: set(kind.names()) for kind in kinds}
  names = module.register_tfds_tasks('bytes')
  # Registering a second time must change nothing.
  assert names == module.register_tfds_tasks('bytes')
  try:
    yield names
  finally:
    for kind in kinds:
      for name in set(kind.names()) - before[kind]:
        kind.remove(name)


def scores(name, examples, predictions):
  """The scores of predictions that seqio computes with the metric of a task."""
  task = seqio.get_mixture_or_task(name)
  (metric,) = task.metric_fns
  targets = [
    task.postprocess_fn('', example=one, is_target=True) for one in examples
  ]
  found = [
    task.postprocess_fn(text, example=one, is_target=False)
    for text, one in zip(predictions, examples, strict=True)
  ]
  return metric(targets, found)
