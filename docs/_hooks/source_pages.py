"""MkDocs hook: links from pages to files of the repository work on the site.

Pages link to source files by relative paths, `../mowe/words/lookup.py`, which
work wherever the repository is read. The site has no such files, so this hook
makes a page of code for each file that is linked to, and points the link there.
A link to a folder of the repository becomes plain text.
"""

import pathlib
import posixpath
import re

from mkdocs.structure import files as mkdocs_files

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# A relative link with ../ in it; images and links with a scheme do not match.
_LINK = re.compile(r'(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\./[^)\s#]*)\)')
_LANGUAGES = {'.py': 'python', '.sh': 'bash', '.gin': 'python', '.cff': 'yaml'}


def on_files(files, config):
  """Adds a page of code for every file of the repository that is linked to."""
  linked = set()
  for page in files.documentation_pages():
    text = pathlib.Path(page.abs_src_path).read_text(encoding='utf-8')
    for match in _LINK.finditer(text):
      path = _repository_path(page.src_uri, match[2])
      if path is not None and (_ROOT / path).is_file():
        linked.add(path)
  for path in sorted(linked):
    files.append(
      mkdocs_files.File.generated(
        config, f'source/{path}.md', content=_page(path)
      )
    )
  return files


def on_page_markdown(markdown, page, config, files):
  """Points links to files of the repository at their pages of code."""
  del config, files
  source = page.file.src_uri

  def replaced(match):
    path = _repository_path(source, match[2])
    if path is None:
      return match[0]
    if not (_ROOT / path).is_file():
      # MkDocs itself reports what is neither a file nor a folder.
      return match[1] if (_ROOT / path).is_dir() else match[0]
    target = posixpath.relpath(f'source/{path}.md', posixpath.dirname(source))
    return f'[{match[1]}]({target})'

  return _LINK.sub(replaced, markdown)


def _repository_path(source, link):
  """The path below the repository, or None for a link within docs/."""
  path = posixpath.normpath(
    posixpath.join('docs', posixpath.dirname(source), link)
  )
  is_outside = path.startswith('..')
  return None if is_outside or path.startswith('docs/') else path


def _page(path):
  code = (_ROOT / path).read_text(encoding='utf-8')
  # The fence is longer than any that the file may hold.
  fence = '`' * 6
  language = _LANGUAGES.get(pathlib.Path(path).suffix, 'text')
  return (
    '---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n'
    f'# `{path}`\n\n{fence}{language} linenums="1"\n{code}\n{fence}\n'
  )
