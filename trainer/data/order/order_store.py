"""A run's plans, stored one object per window and chained by hash. A plan is made once; a resumed run reads it.

Plan n's link is sha256(link n-1, digest of plan n). The link before the first plan is a hash of the data's fingerprint
and the settings of the plan, with the run's seed. A cursor contains the link of its own window's plan, so that one
object proves that a resumed run continues the order it started with. Any rank may write a plan: all would write the
same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypedDict

import pyarrow as pa

from trainer.data.blocks import read_stream, stream_bytes
from trainer.data.order.pack_order import PlanSettings, WindowPlan, epoch_order, plan_window
from trainer.data.prepare.prepared import PreparedDataset
from trainer.data.seeding import hash_parts
from trainer.errors import CorruptObject
from trainer.parsing import parse_json
from trainer.records import read_record
from trainer.run.layout import PLAN
from trainer.storage import Storage

log = logging.getLogger(__name__)
_META = b"plan"
_HELD = 3


@dataclass(frozen=True)
class LinkedPlan:
    """A window's plan, the window of the prepared data that it is for, and its link of the chain."""

    plan: WindowPlan
    window: int
    chain: str


class PlanStore:
    """Looks up plans by (epoch, ordinal in the epoch). Thread-safe; holds the last few in memory."""

    def __init__(self, prepared: PreparedDataset, run: Storage, settings: PlanSettings) -> None:
        self.prepared, self.run, self.settings = prepared, run, settings
        self._held: OrderedDict[tuple[int, int], LinkedPlan] = OrderedDict()
        self._orders: dict[int, list[int]] = {}
        self._lock = threading.RLock()

    def root(self) -> str:
        """Returns the link before the first plan. Two runs share a chain only if their data and settings are the
        same."""
        s = self.settings
        weights = json.dumps(s.weights)
        return hash_parts("plan", self.prepared.fingerprint, s.seed, s.sequence_length, s.packing, weights)

    def follow(self, epoch: int, ordinal: int, previous: str) -> LinkedPlan:
        """Returns the plan after the link ``previous``. Makes and stores it if it does not exist yet."""
        with self._lock:
            held = self._held.get((epoch, ordinal))
            if held is None:
                held = self._keep(epoch, ordinal, *self._read_or_make(epoch, ordinal, previous))
        return self._checked(held, epoch, ordinal, _link(previous, held.plan))

    def at(self, epoch: int, ordinal: int, chain: str) -> LinkedPlan:
        """Returns the stored plan whose link is ``chain``. Raises CorruptObject if it is missing or has another
        link."""
        with self._lock:
            held = self._held.get((epoch, ordinal))
            if held is None:
                try:
                    found = self._read(epoch, ordinal)
                except FileNotFoundError as error:
                    raise CorruptObject(
                        f"{self._url(epoch, ordinal)} is gone; without it the run cannot continue its order: restore "
                        "the object, or start a run under another name"
                    ) from error
                held = self._keep(epoch, ordinal, *found)
        return self._checked(held, epoch, ordinal, chain)

    def _read_or_make(self, epoch: int, ordinal: int, previous: str) -> tuple[WindowPlan, str]:
        """Returns the plan after ``previous`` and its link to it. Stores it if none is stored or the stored one is
        stale."""
        key, stale = plan_key(epoch, ordinal), False
        try:
            found = self._read(epoch, ordinal)
            if found[1] == previous:
                return found
            # It is of an earlier start, on other data or settings, that ended before its first checkpoint. No
            # checkpoint of this run's chain depends on it.
            stale = True
        except FileNotFoundError:
            pass
        window = self._window(epoch, ordinal)
        plan = plan_window(self.prepared.index(window), self.settings, epoch, window)
        if stale:
            log.warning("%s is of an earlier start on other data or settings, and is replaced", self.run.uri(key))
            self.run.write(key, encode_plan(plan, previous))
        elif not self.run.put_if_absent(key, encode_plan(plan, previous)):
            return self._read(epoch, ordinal)
        return plan, previous

    def _read(self, epoch: int, ordinal: int) -> tuple[WindowPlan, str]:
        raw = self.run.read(plan_key(epoch, ordinal))
        try:
            return decode_plan(raw)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise CorruptObject(f"{self._url(epoch, ordinal)} is not a complete plan ({error}); restore it") from error

    def _keep(self, epoch: int, ordinal: int, plan: WindowPlan, previous: str) -> LinkedPlan:
        linked = LinkedPlan(plan, self._window(epoch, ordinal), _link(previous, plan))
        self._held[(epoch, ordinal)] = linked
        while len(self._held) > _HELD:
            self._held.popitem(last=False)
        return linked

    def _checked(self, held: LinkedPlan, epoch: int, ordinal: int, chain: str) -> LinkedPlan:
        if held.chain != chain:
            raise CorruptObject(
                f"{self._url(epoch, ordinal)} is not the plan that this run has followed (chain {held.chain[:12]}…, "
                f"not {chain[:12]}…); restore the object, or start a run under another name"
            )
        return held

    def order(self, epoch: int) -> list[int]:
        """Returns the windows of the prepared data in the order of this epoch."""
        with self._lock:
            if epoch not in self._orders:
                near = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
                self._orders = {
                    **near,
                    epoch: epoch_order(self.settings.order_key, self.settings.seed, epoch, self.prepared.count),
                }
            return self._orders[epoch]

    def _window(self, epoch: int, ordinal: int) -> int:
        return self.order(epoch)[ordinal]

    def _url(self, epoch: int, ordinal: int) -> str:
        return f"{self.run.url}/{plan_key(epoch, ordinal)}"


def plan_key(epoch: int, ordinal: int) -> str:
    return f"{PLAN}/e{epoch:05d}-w{ordinal:06d}.arrow"


def encode_plan(plan: WindowPlan, previous: str) -> bytes:
    lists = pa.ListArray.from_arrays(pa.array(plan.offsets, pa.int32()), pa.array(plan.samples))
    table = pa.table({"samples": lists, "tokens": pa.array(plan.tokens), "targets": pa.array(plan.targets)})
    return stream_bytes(table.replace_schema_metadata({_META: json.dumps({"previous": previous}).encode()}))


class _Link(TypedDict):
    previous: str


def decode_plan(raw: bytes) -> tuple[WindowPlan, str]:
    table = read_stream(raw)
    previous = read_record(_Link, parse_json((table.schema.metadata or {})[_META]))["previous"]
    lists = table.column("samples").combine_chunks()
    plan = WindowPlan(
        lists.values.to_numpy(),
        lists.offsets.to_numpy().astype("int64"),
        table.column("tokens").combine_chunks().to_numpy(),
        table.column("targets").combine_chunks().to_numpy(),
    )
    return plan, previous


def _link(previous: str, plan: WindowPlan) -> str:
    return hashlib.sha256(f"{previous}{plan.digest()}".encode()).hexdigest()
