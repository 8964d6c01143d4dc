"""Writes articles in the form of WikiText, to train on what is tested there.

  python scripts/examples/wikitext.py train.txt ARTICLES.jsonl.gz

An article has `title` and `text`. The words of WikiText-2 are 33,278, so as
many of the most frequent ones stay, and others become <unk>.
"""

import argparse
import gzip
import json
import os

import wikitext


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('output')
  parser.add_argument('articles')
  parser.add_argument('--num_words', type=int, default=33_278)
  arguments = parser.parse_args()
  with gzip.open(arguments.articles, 'rt', encoding='utf-8') as file:
    articles = [json.loads(line) for line in file]
  lines = [
    line
    for one in articles
    for line in wikitext.article(one['title'], one['text'])
  ]
  known = wikitext.frequent_words(lines, arguments.num_words)
  unfinished = f'{arguments.output}.unfinished'
  with open(unfinished, 'w', encoding='utf-8') as file:
    file.writelines(f'{wikitext.masked(line, known)}\n' for line in lines)
  os.replace(unfinished, arguments.output)
  words = sum(map(len, lines))
  print(f'{arguments.output}: {len(articles):,} articles, {words:,} words')


if __name__ == '__main__':
  main()
