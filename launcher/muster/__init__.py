"""The installed package ``muster``: makes the tree importable under its own names, and gives the Python interface.

This folder holds this file only, which an installation places next to ``launcher``, ``trainer`` and the others.
"""

import sys

from muster.launcher.entry import ROOT

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launcher.python import *  # noqa: F403
from launcher.python import __all__ as __all__
from launcher.python import __doc__ as __doc__
