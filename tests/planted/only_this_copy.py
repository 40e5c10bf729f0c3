"""What every Python process of a run has as its `sitecustomize`: no other penstock than the copy.

Its one job: refuse to import a penstock that stands elsewhere, in children of any kind. The checkout is
installed as well (editable), and a child that got that one would show a pool without the fault.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

_SOURCES = str(Path(__file__).resolve().parent)


class OnlyThisCopy:
    """In front of the other finders; it answers for one name."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "penstock":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or not str(spec.origin).startswith(_SOURCES):
            raise ImportError(f"not the planted copy: {spec and spec.origin}")
        return spec


sys.meta_path.insert(0, OnlyThisCopy)
