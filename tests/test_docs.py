"""The documentation may name only files, verbs and options that exist."""

import functools
import pathlib
import re
import subprocess
import sys

import pytest

import mowe
from mowe.cli import main

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGES = sorted(
  [_ROOT / 'README.md', _ROOT / 'CONTRIBUTING.md', _ROOT / 'CHANGELOG.md']
  + list((_ROOT / 'docs').rglob('*.md'))
)
_IDS = [str(page.relative_to(_ROOT)) for page in _PAGES]

_FENCE = re.compile(r'^```(\w*)[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'\]\(([^)\s]+)\)')
# Matches files of the repository that are named, also without a link.
_PATH = re.compile(
  r'(?<![\w/.-])(?:mowe|gin_configs|scripts|tests|tasks|benchmarks)/'
  r'[\w./{},-]+\.(?:py|gin|sh)'
)


def _without_code(text):
  return _FENCE.sub('', text)


def _expanded(path):
  """Expands `a_{b,c}.gin` to both names, as a shell does."""
  match = re.search(r'\{([^{}]*)\}', path)
  if match is None:
    return [path]
  return [
    name
    for one in match[1].split(',')
    for name in _expanded(path[: match.start()] + one + path[match.end() :])
  ]


def _anchors(page):
  """The anchors of a page's headings, as Markdown renderers make them."""
  found = set()
  for heading in re.findall(
    r'^#+ (.*)$', _without_code(page.read_text()), re.MULTILINE
  ):
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).lower()
    found.add(re.sub(r'[^\w\- ]', '', text).strip().replace(' ', '-'))
  return found


@pytest.mark.parametrize('page', _PAGES, ids=_IDS)
def test_links_lead_somewhere(page):
  for link in _LINK.findall(_without_code(page.read_text(encoding='utf-8'))):
    if re.match(r'\w+:', link):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), f'{link}: there is no {target}'
    if anchor and target.suffix == '.md':
      assert anchor in _anchors(target), f'{link}: no such section'


@pytest.mark.parametrize('page', _PAGES, ids=_IDS)
def test_named_files_exist(page):
  text = page.read_text(encoding='utf-8')
  written = _PATH.findall(text)
  # A call such as `python -m benchmarks.lookup` names a file as well.
  written += [
    f'benchmarks/{name}.py'
    for name in re.findall(r'-m benchmarks\.(\w+)', text)
  ]
  for path in written:
    for name in _expanded(path):
      assert (_ROOT / name).is_file(), f'there is no {name}'


@pytest.mark.parametrize('page', _PAGES, ids=_IDS)
def test_lines_fit_a_screen(page):
  text = _without_code(page.read_text(encoding='utf-8'))
  for line in text.splitlines():
    # A row of a table and a single long word cannot be broken.
    is_fixed = line.startswith('|') or ' ' not in line.strip()
    assert is_fixed or len(line) <= 120, line


def test_the_readme_fits_few_screens():
  lines = (_ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
  assert len(lines) <= 120


def _commands():
  """Yields (page, words) for every call of `mowe` in a block of code."""
  for page in _PAGES:
    for language, code in _FENCE.findall(page.read_text(encoding='utf-8')):
      if language != 'bash':
        continue
      for line in code.replace('\\\n', ' ').splitlines():
        line = re.sub(r'(^|\s)#.*$', '', line).strip()
        line = re.sub(r'^(\w+=\S+ )+', '', line)
        if line.startswith('mowe '):
          yield page.relative_to(_ROOT), line.split()[1:]


@functools.cache
def _help(*words):
  """What `mowe WORDS --help` prints; None if there is no such command."""
  import contextlib
  import io

  printed = io.StringIO()
  with (
    contextlib.redirect_stdout(printed),
    contextlib.redirect_stderr(io.StringIO()),
    pytest.raises(SystemExit) as left,
  ):
    main.main([*words, '--help'])
  return None if left.value.code else printed.getvalue()


def test_commands_have_the_verbs_and_options_they_are_shown_with():
  commands = list(_commands())
  # If blocks of code were no longer found, this test would test nothing.
  assert len(commands) > 30
  for page, words in commands:
    verb = words[: 1 + (words[0] == 'modules')]
    if verb[0].startswith('-'):
      continue
    text = _help(*verb)
    assert text is not None, f'{page}: no command mowe {" ".join(verb)}'
    for option in re.findall(r'(?<!\S)--[a-z_]+', ' '.join(words)):
      # A gin binding is --gin.NAME=VALUE, so the option ends at the point.
      if option != '--gin':
        assert option in text, f'{page}: mowe {verb[0]} has no {option}'


def test_all_verbs_are_documented():
  listed = re.findall(r'^    ([a-z][\w-]*) ', _help(), re.MULTILINE)
  assert 'train' in listed
  used = {words[0] for _, words in _commands()}
  assert set(listed) <= used


def test_every_page_is_in_the_navigation():
  navigation = (_ROOT / 'mkdocs.yml').read_text(encoding='utf-8')
  for page in _PAGES:
    if page.is_relative_to(_ROOT / 'docs'):
      name = page.relative_to(_ROOT / 'docs').as_posix()
      assert re.search(rf' {re.escape(name)}$', navigation, re.MULTILINE), name


def test_all_public_names_are_on_the_api_page():
  text = (_ROOT / 'docs' / 'api.md').read_text(encoding='utf-8')
  assert {
    name for name in mowe.__all__ if f'`mowe.{name}`' not in text
  } == set()


def test_modules_of_the_api_page_exist():
  text = (_ROOT / 'docs' / 'api.md').read_text(encoding='utf-8')
  names = re.findall(r'^::: ([\w.]+)$', text, re.MULTILINE)
  assert names
  for name in names:
    path = _ROOT.joinpath(*name.split('.'))
    assert path.with_suffix('.py').is_file() or path.is_dir(), name


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
  pytest.importorskip('mkdocs', reason='needs pip install .[docs]')
  done = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', tmp_path],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'api.html').exists()
