"""Tests of the rows of installed plug-ins: ``pytest --pyargs muster.testing``.

Every row that an installed package offers is held to the contract of its table, by the functions that muster's own rows
are tested with. It needs pytest; pytest's options choose among the tests (``-k "tasks and focal"``).
"""
