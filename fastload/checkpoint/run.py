"""A training run's checkpoints: steps side by side below one URL, of which the old ones go.

There is no list of steps beside them: a step is there when its manifest is (`pruning`). What is deleted, and in which
order, is decided by `retention` and `pruning`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from fastload.checkpoint import retention
from fastload.checkpoint.attempts import opened
from fastload.checkpoint.copies import FOLDER
from fastload.checkpoint.dedup import Base
from fastload.checkpoint.retention import GRACE_S, Keep, Known, Pruned
from fastload.client.cache import AnyCache, directory_of, handle_of
from fastload.errors import CheckpointDamagedError, ConfigError, FastloadError, ObjectMissingError, WaitTimeoutError
from fastload.protocol import Level
from fastload.redaction import redact

if TYPE_CHECKING:
    import torch

    from fastload.checkpoint.saving import Saving

# How often is looked whether a step that is being saved is there.
_LOOK_S = 0.5
# How long the service of this node may take to begin one in the store that it carries.
_BEGIN_S = 5.0
_log = logging.getLogger("fastload.checkpoint")


class Run:
    """The checkpoints of one training run, each in a folder called by its step: `url/1200`.

    With `keep` old steps go after each save. With `on_error="warn"` a save that fails is logged, with the reason, and
    training goes on. With `dedup=True` a piece whose bytes the step before has already is not stored again.

    One process saves; where a state is spread over several, they save by `Writer(run.step_url(step))`, and one of them
    calls `prune()` afterwards.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep: Keep | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        dedup: bool = False,
        cache: AnyCache = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if on_error not in ("raise", "warn"):
            raise ConfigError(f"on_error={on_error!r}: write raise or warn")
        self._url = os.fspath(url).rstrip("/")
        self._shown = redact(self._url)
        self._keep, self._on_error, self._dedup = keep, on_error, dedup
        self._cache, self._storage_options = cache, storage_options
        self._known = Known()
        self._under_way: dict[int, Saving] = {}
        self._reasons: dict[int, str] = {}  # why they are not in the store, as logged last
        self._tidying: threading.Thread | None = None
        #: The step that was saved or loaded last; None: none yet.
        self.step: int | None = None

    def step_url(self, step: int) -> str:
        """Where the checkpoint of a step is."""
        return f"{self._url}/{_checked(step)}"

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metric: float | None = None,
        *,
        until: Level = "store",
        timeout_s: float = 600.0,
    ) -> Saving | None:
        """Save a state as the checkpoint of a step, in place of one that is there; `metric` is for `Keep(best=)`, where
        what is not finite is never the best. Then steps go that `keep` lets go: in a thread, where it does not wait for
        the store.

        Raises what `save` does, unless `on_error` is "warn"; then it is logged, and there is no `Saving`, unless it
        goes on: a save in which no byte has moved for `timeout_s` is not waited for any more, and counts as under way.
        What fails after this has returned is logged by the next call, or by `wait`. So is a step that could not be
        deleted, which is tried again after the next save.
        """
        self._look_back()
        saving = None
        try:
            step = _checked(step)
            finite = float(metric) if metric is not None and math.isfinite(metric) else None
            saving = self._under_way[step] = self._save(step, state, finite, until, timeout_s)
            saving.wait_while_moving(until, timeout_s)
        except Exception as error:
            goes_on = saving is not None and not saving.is_over
            if goes_on:
                self.step = step
            elif saving is not None:
                del self._under_way[step]
            if self._on_error == "raise":
                raise
            self._log_failure(step, error)
            return saving if goes_on else None
        self.step = step
        if until == "store":
            del self._under_way[step]
            self._tidy()
        elif self._keep is not None and (self._tidying is None or not self._tidying.is_alive()):
            self._tidying = threading.Thread(target=self._tidy, name="fastload-run")
            self._tidying.start()
        return saving

    def wait(self, timeout_s: float = 600.0) -> None:
        """Wait until all that was saved is in the store, and old steps are gone. Raises what keeps it from that, unless
        `on_error` is "warn", and `WaitTimeoutError` when time is up.
        """
        deadline = time.monotonic() + timeout_s
        for step, saving in list(self._under_way.items()):
            try:
                saving.wait("store", max(0.0, deadline - time.monotonic()))
            except Exception as error:
                if self._on_error == "raise" or isinstance(error, WaitTimeoutError):
                    raise
                self._log_failure(step, error)
            del self._under_way[step]
        if self._tidying is not None:
            self._tidying.join()  # it has the deadlines of requests
            self._tidying = None
            self._tidy()  # since it may have begun before the last was there

    def _look_back(self) -> None:
        """Of what was saved before: what is in the store, what failed, and what cannot go on."""
        for step, saving in list(self._under_way.items()):
            try:
                if not saving.done("store"):
                    reason = saving.progress().reason
                    if reason and self._reasons.get(step) != reason:
                        _log.warning("step %s of %s is not in the store yet: %s", step, self._shown, reason)
                    self._reasons[step] = reason
                    continue
            except Exception as error:
                self._log_failure(step, error)
            del self._under_way[step]
            self._reasons.pop(step, None)

    def _log_failure(self, step: int, error: Exception) -> None:
        # As text: who keeps records of the log would keep the error, and with it the state's memory.
        _log.warning("step %s of %s was not saved: %s: %s", step, self._shown, type(error).__name__, str(error))
        _log.debug("how it failed", exc_info=error)

    def _tidy(self) -> None:
        if self._keep is not None:
            try:
                self.prune()
            except Exception as error:  # of any kind: the step is saved
                _log.warning("old steps of %s were not deleted: %s", self._shown, str(error))

    def load(
        self,
        into: dict[str, Any] | None = None,
        step: int | None = None,
        *,
        names: Collection[str] | None = None,
        device: str | torch.device = "cpu",
        allow_pickle: bool = False,
        wait_s: float = 60.0,
    ) -> dict[str, Any]:
        """The state of a step, or of the newest that is whole: one that is damaged is logged, and the step before is
        taken. `self.step` says which it is. A newer one that this node's service still carries to the store, as after
        a crash of the trainer, is waited for, for `wait_s` at most. The other arguments are those of `load`.

        Raises `ObjectMissingError` where no step is, `CheckpointDamagedError` where none is whole, and what `load`
        does.
        """
        from fastload.checkpoint.single import load

        def of(one: int) -> dict[str, Any]:
            url = self.step_url(one)
            state = load(
                url,
                into,
                names,
                device=device,
                allow_pickle=allow_pickle,
                cache=self._cache,
                storage_options=self._storage_options,
            )
            self.step = one
            return state

        if step is not None:
            return of(_checked(step))
        self._await_carried(wait_s)
        failed: Exception | None = None
        for one in reversed(self.steps()):
            try:
                return of(one)
            except (CheckpointDamagedError, ObjectMissingError) as error:  # a step may also have gone meanwhile
                _log.warning(
                    "step %s of %s cannot be loaded, and the step before is taken: %s", one, self._shown, str(error)
                )
                failed = error
        if failed is None:
            raise ObjectMissingError(f"{self._url}/: no step of a run is here; check its name, or begin anew")
        raise CheckpointDamagedError(f"{self._url}/: no step can be loaded; the oldest: {failed}") from failed

    def steps(self) -> list[int]:
        """Those that are committed, in order."""
        with opened(self._url, self._storage_options) as place:
            return retention.steps(place)

    def latest(self) -> int | None:
        """The newest step that is committed; None where there is none."""
        return max(self.steps(), default=None)

    def prune(self, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Pruned:
        """Delete the steps that `keep` lets go, and what saves that failed have left for `grace_s`; what went. With
        `dry_run` nothing changes, and it says what would go. A save of which all is there, though its process ended
        before it could commit it, is committed.
        """
        with opened(self._url, self._storage_options) as place:
            return retention.prune(
                place,
                self._keep,
                now_s=time.time(),
                grace_s=grace_s,
                is_trial=dry_run,
                known=self._known,
                at_hand=self.step,
            )

    def _await_carried(self, timeout_s: float) -> None:
        now_s = time.monotonic()
        # Where the service has to begin an attempt itself, since the store was away, it does once a consumer comes.
        may_carry = (directory_of(self._cache) / FOLDER).exists()
        soon, deadline = now_s + (min(_BEGIN_S, timeout_s) if may_carry else 0.0), now_s + timeout_s
        with opened(self._url, self._storage_options) as place, contextlib.ExitStack() as stack:
            consumer = None
            while (newer := retention.begun(place)) or time.monotonic() < soon:
                try:
                    if consumer is None:  # one that brings credentials, for what is left of a service that ended too
                        handle = handle_of(self._cache)
                        consumer = stack.enter_context(handle.consumer(self._storage_options, name="run"))
                    if not consumer.stats()["node"]["checkpoints_under_way"]:
                        return
                except FastloadError as error:  # without a service there is nothing to wait for
                    _log.info("nothing is known of saves under way: %s", str(error))
                    return
                if time.monotonic() > deadline:
                    _log.warning("step %s of %s is still being saved, and not waited for", newer[-1], self._shown)
                    return
                time.sleep(_LOOK_S)

    def _save(
        self, step: int, state: Mapping[str, Any], metric: float | None, until: Level, timeout_s: float
    ) -> Saving:
        from fastload.checkpoint.single import save_at

        with opened(self._url, self._storage_options) as place:
            base = None
            if self._dedup:
                newest = max((other for other in retention.steps(place) if other != step), default=None)
                base = Base.at(retention.folder_of(place, newest)) if newest is not None else None
            folder = retention.folder_of(place, step)
            return save_at(
                folder,
                state,
                overwrite=True,
                metric=metric,
                dedup=self._dedup,
                base=base,
                until=until,
                timeout_s=timeout_s,
                cache=self._cache,
                storage_options=self._storage_options,
            )


def _checked(step: SupportsIndex) -> int:
    if isinstance(step, bool) or not isinstance(step, SupportsIndex) or not 0 <= (number := step.__index__()) < 10**18:
        raise ConfigError(f"step={step!r}: give a whole number from 0 on")
    return number
