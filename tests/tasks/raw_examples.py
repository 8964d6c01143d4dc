"""What TFDS gives for tasks of GLUE and SuperGLUE, as one example each."""

import contextlib

import pytest

tfds = pytest.importorskip('tensorflow_datasets')
seqio = pytest.importorskip('seqio')

_LENGTHS = {'inputs': 400, 'targets': 40}


def read(name, split, raw, most=None):
  """The examples of a task, or of a mixture, whose data set holds `raw`.

  Args:
    name: of the task.
    split: of it.
    raw: lists of fields; or a function that gives them for the
      name of the builder's config.
    most: so many of the examples, begun again and again; None: each once.
  """
  # Counting examples, to cache few in memory, is not mocked by TFDS.
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
  """TFDS gives these raw examples, whatever it is asked for."""
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
  """The tasks of a module, and what stood in the registry after it."""
  kinds = (seqio.MixtureRegistry, seqio.TaskRegistry)
  before = {kind: set(kind.names()) for kind in kinds}
  names = module.register_tfds_tasks('bytes')
  # Once is enough.
  assert names == module.register_tfds_tasks('bytes')
  try:
    yield names
  finally:
    for kind in kinds:
      for name in set(kind.names()) - before[kind]:
        kind.remove(name)


def scores(name, examples, predictions):
  """What the metric of a task says of predictions, by the way of seqio."""
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
