"""FEVER as a TFDS data set: claims that Wikipedia supports, refutes or neither.

TFDS itself has no builder for FEVER. Importing this module registers one with
the name 'fever'. Two files of JSON lines are downloaded when the data set is
prepared (`tfds.load('fever')`), and nothing before that.

Source: Thorne et al. 2018, https://fever.ai. The splits are 'train' and
'validation', the labelled development set of the shared task.
"""

import json
import sys
from typing import Any

import numpy as np

from mowe.data import seqio_stream

# This tells what to install, and TensorFlow must not take the accelerators.
seqio_stream.import_seqio()

import tensorflow_datasets as tfds  # noqa: E402

URLS = {
  'train': 'https://fever.ai/download/fever/train.jsonl',
  'validation': 'https://fever.ai/download/fever/shared_task_dev.jsonl',
}
# The texts of labels, in the order of their numbers.
LABELS = ('SUPPORTS', 'REFUTES', 'NOT ENOUGH INFO')
# This file has two names in a checkout, and TFDS takes a builder only once.
_NAMES = {'tasks.fever', 'mowe.tasks.fever'}


class Fever(
  tfds.core.GeneratorBasedBuilder,
  skip_registration=bool((_NAMES - {__name__}) & set(sys.modules)),
):
  """Builder of records with id <int64>, claim <string> and label, an index."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'The files of the shared task of 2018.'}
  # There are no checksums. To look for some, TFDS 4.9.10 would import
  # importlib_resources, which it does not require.
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description='Claims, checked against Wikipedia.',
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Scalar(np.int64),
          'claim': tfds.features.Text(),
          'label': tfds.features.ClassLabel(names=LABELS),
        }
      ),
      homepage='https://fever.ai',
      citation=(
        '@inproceedings{thorne2018fever, title={FEVER: a Large-scale Dataset '
        'for Fact Extraction and VERification}, author={Thorne, James and '
        'Vlachos, Andreas and Christodoulopoulos, Christos and Mittal, Arpit}, '
        'booktitle={NAACL-HLT}, year={2018}}'
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    paths = dl_manager.download(URLS)
    return {split: self._generate_examples(paths[split]) for split in URLS}

  def _generate_examples(self, path: Any):
    with tfds.core.Path(path).open(encoding='utf-8') as file:
      for number, line in enumerate(file):
        record = json.loads(line)
        # The key is not the id, because TFDS shuffles by keys, which must be
        # unique.
        yield (
          number,
          {name: record[name] for name in ('id', 'claim', 'label')},
        )
