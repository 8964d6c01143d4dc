"""The gin files of mowe, a folder of files and not of modules.

Gin looks for an included file in Python packages, too. A folder without this
file is a package to Python if it lies on its path, but one without a place of
its own, and gin fails when it asks for that place: so T5X could not read these
files with a checkout on PYTHONPATH. With no path below it, this package has no
such folders, and gin goes on to its search paths.
"""

__path__ = []
