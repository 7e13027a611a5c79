"""The part of the driver's environment that workers need: the way to the storage and the Hub.

It travels inside pickled functions, never in Ray's runtime environment or a worker's configuration: those are kept by
the cluster and shown on its dashboard, and credentials are among these variables.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.registry import IMPORTED, look_in_working_folder

PREFIXES = ("AWS_", "FSSPEC_", "S3FS_", "GOOGLE_", "GCS_", "AZURE_", "HF_", "HUGGING_FACE_", "MUSTER_")
NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "REQUESTS_CA_BUNDLE")


@dataclass(frozen=True)
class Environment:
    """Variables and working directory of the driver; ``repr`` shows neither."""

    variables: Mapping[str, str] = field(repr=False)
    folder: str = field(repr=False)

    @classmethod
    def current(cls, also: Collection[str] = ()) -> Environment:
        """``also``: the names of further variables (`cluster.env`)."""
        chosen = {k: v for k, v in os.environ.items() if k.startswith(PREFIXES) or k in NAMES or k in also}
        return cls(chosen, os.getcwd())

    def apply(self) -> None:
        """In a worker: what the driver has set wins; relative paths mean what they mean to the driver, if this host has
        the driver's folder."""
        os.environ.update(self.variables)
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        if IMPORTED in os.environ:  # pickles may hold classes of plug-ins
            look_in_working_folder()
