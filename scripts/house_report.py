"""Prints figures of the code's structure, by which the house is judged.

They are sizes of folders, modules, functions and classes, nested closures,
import circles, public names that several modules define, and shares of comments
and tests:

  python scripts/house_report.py --package mowe --tests tests
"""

import argparse
import ast
import collections
import io
import pathlib
import tokenize
from collections.abc import Iterable, Iterator, Mapping

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_LONGEST_FUNCTION = 80
_DEEPEST_CLOSURE = 1


def _quantile(numbers: Iterable[int], share: float) -> int:
  """The number below which this share of the numbers lies; 0 without any."""
  ordered = sorted(numbers)
  return ordered[int(share * (len(ordered) - 1))] if ordered else 0


def _module_name(path: pathlib.Path, root: pathlib.Path) -> str:
  """Full name of a module: `mowe/cli/__init__.py` is `mowe.cli`."""
  parts = path.relative_to(root.parent).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _functions(
  node: ast.AST, name: str, depth: int = 0
) -> Iterator[tuple[str, ast.AST, int]]:
  """Yields (name, function, depth); depth counts the functions around it."""
  for child in ast.iter_child_nodes(node):
    if isinstance(child, _FUNCTIONS):
      own = f'{name}.{child.name}'
      yield own, child, depth
      yield from _functions(child, own, depth + 1)
    elif isinstance(child, ast.ClassDef):
      yield from _functions(child, f'{name}.{child.name}', depth)
    else:
      yield from _functions(child, name, depth)


def _fields(trees: Iterable[ast.AST]) -> list[int]:
  """The number of annotated fields of every class that has some."""
  numbers = (
    sum(isinstance(statement, ast.AnnAssign) for statement in node.body)
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
  )
  return [number for number in numbers if number]


def _docstring_lines(function: ast.AST) -> int:
  if ast.get_docstring(function) is None:
    return 0
  return function.body[0].end_lineno - function.body[0].lineno + 1


def _imports(tree: ast.AST, name: str, modules: Iterable[str]) -> set[str]:
  """Modules of the package that one of them imports, wherever it does so."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      for alias in node.names:
        # `from a import b` imports the module a.b, or a name of module a.
        inner = f'{node.module}.{alias.name}'
        found.add(inner if inner in modules else node.module)
  return (found & set(modules)) - {name}


def _circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
  """Groups of two and more modules that all reach each other by imports."""
  reached = {}
  for start in graph:
    seen, left = set(), [start]
    while left:
      new = graph[left.pop()] - seen
      seen |= new
      left.extend(new)
    reached[start] = seen
  circles = {
    tuple(sorted(b for b in reached[a] if a in reached[b]))
    for a in graph
    if a in reached[a]
  }
  return [list(circle) for circle in sorted(circles)]


def _comment_lines(text: str) -> int:
  """Lines that hold nothing but a comment."""
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return sum(
    token.type == tokenize.COMMENT and token.line.lstrip().startswith('#')
    for token in tokens
  )


def _num_lines(texts: Iterable[str]) -> int:
  return sum(len(text.splitlines()) for text in texts)


def _read(folder: pathlib.Path) -> dict[pathlib.Path, str]:
  return {path: path.read_text('utf-8') for path in folder.rglob('*.py')}


def _print_list(title: str, lines: Iterable[str]) -> None:
  lines = list(lines)
  print(f'{title}: {len(lines)}')
  for line in lines:
    print(f'  {line}')


def report(package: pathlib.Path, tests: pathlib.Path) -> None:
  """Prints all figures.

  Args:
    package: folder of the package, such as `mowe`.
    tests: folder of its tests.
  """
  files = _read(package)
  trees = {
    _module_name(path, package): ast.parse(text) for path, text in files.items()
  }
  folders = collections.Counter(
    path.parent for path in files if path.name != '__init__.py'
  )
  folder, most = folders.most_common(1)[0]
  lines = [len(text.splitlines()) for text in files.values() if text]
  functions = [
    (f.end_lineno - f.lineno + 1, name, depth)
    for module, tree in trees.items()
    for name, f, depth in _functions(tree, module)
  ]
  lengths = [length for length, _, _ in functions]
  without_docstrings = [
    f.end_lineno - f.lineno + 1 - _docstring_lines(f)
    for module, tree in trees.items()
    for _, f, _ in _functions(tree, module)
  ]
  fields = _fields(trees.values())
  homes = collections.defaultdict(list)
  for module, tree in sorted(trees.items()):
    for node in tree.body:
      if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        homes[node.name].append(module)
  total = _num_lines(files.values())
  comments = sum(map(_comment_lines, files.values()))

  print(f'most files in one folder: {most} ({folder.as_posix()})')
  print(
    'module lines, median / p90 / max: '
    f'{_quantile(lines, 0.5)} / {_quantile(lines, 0.9)} / {max(lines)}'
  )
  print(
    'function lines, p90 / max: '
    f'{_quantile(lengths, 0.9)} / {max(lengths)} of {len(lengths)}'
  )
  print(
    'the same without docstrings: '
    f'{_quantile(without_docstrings, 0.9)} / {max(without_docstrings)}'
  )
  print(
    'fields of classes, p90 / max: '
    f'{_quantile(fields, 0.9)} / {max(fields, default=0)}'
  )
  print(f'comment lines: {100 * comments / total:.1f} %')
  print(f'tests to code: {_num_lines(_read(tests).values()) / total:.2f}')
  _print_list(
    f'functions over {_LONGEST_FUNCTION} lines',
    (
      f'{n} {name}'
      for n, name, _ in sorted(functions, reverse=True)
      if n > _LONGEST_FUNCTION
    ),
  )
  _print_list(
    f'closures deeper than {_DEEPEST_CLOSURE}',
    sorted(name for _, name, depth in functions if depth > _DEEPEST_CLOSURE),
  )
  graph = {name: _imports(tree, name, trees) for name, tree in trees.items()}
  _print_list('import circles', map(' <-> '.join, _circles(graph)))
  _print_list(
    'public names that several modules define',
    (
      f'{name}: {", ".join(modules)}'
      for name, modules in sorted(homes.items())
      if not name.startswith('_') and len(modules) > 1
    ),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--package', type=pathlib.Path, default='mowe', help='folder of the package'
  )
  parser.add_argument(
    '--tests', type=pathlib.Path, default='tests', help='folder of its tests'
  )
  args = parser.parse_args()
  report(args.package, args.tests)


if __name__ == '__main__':
  main()
