"""How pytest-xdist hands out the tests that start processes (--dist loadscope): those that share what is costly go to
one of its processes, one after the other."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling


class Sharing(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        """All of tests/ray, which share a Ray; a test of tests/cluster, each of which has hosts of its own; elsewhere
        a file, whose tests compare runs that were trained once."""
        file = nodeid.partition("::")[0]
        if file.startswith("tests/ray/"):
            return "tests/ray"
        return nodeid if file.startswith("tests/cluster/") else file
