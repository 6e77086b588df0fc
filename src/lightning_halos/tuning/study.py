"""The optuna study of a search: which settings come next, which trials end early, and what is kept in its file.

Only the search's own process writes it. Processes of trials know nothing of it.
"""

from __future__ import annotations

import fcntl
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from lightning_halos.tuning.goal import RUNGS, Goal, Point
from lightning_halos.tuning.space import Choice, Parameter, Settings, Space, Values

Outcome = Literal["complete", "pruned", "diverged", "failed", "left out", "interrupted"]

_STATES: dict[Outcome, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,  # without a value, which makes it the worst: nothing near it is worth a trial
    "failed": TrialState.FAIL,
    "left out": TrialState.FAIL,
    "interrupted": TrialState.FAIL,
}
_RANDOM = 6  # trials before the first one that TPE draws by what it has learned
_GOOD = 0.2  # share of the trials that TPE counts as good ones
_VARIATIONS = 3  # one of this number of trials is TPE's, the others vary the best one
_REDUCTION = 3  # one of this number of trials goes on at a rung
_REFUSED = 40  # settings that are left out, in a row, before the next ones are tried anyway, if they are new
_REPEATS = 5  # draws of settings that were tried already, before nothing seems to be left
_KNOWN = "tried already"  # why settings are left out
_FEWEST_FOR_IMPORTANCES = 10
_SECONDS = 60.0  # to wait for the file, which another program may be reading


class Study:
    """A search's study, in a folder.

    Two of three trials vary some parameters of the best trial so far. Every third one is drawn by TPE, which models all
    parameters together and counts trials that are running as bad ones, so that those side by side differ. Variations
    find good settings with few trials, and TPE keeps them from ending at the first good ones. At a third and at two
    thirds of the virtual time, one of three trials goes on (asynchronous successive halving).

    Args:
        folder: The folder.
        space: The search space.
        goal: What counts.
        identity: What another search differs in; values that are JSON.
        seed: Of the draws.

    Raises:
        ValueError: If the folder has another search, or another process uses it.
    """

    def __init__(self, folder: Path, space: Space, goal: Goal, identity: dict[str, Any], seed: int) -> None:
        self._space, self._goal = space, goal
        self._asked = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            # Unlike with flock, trials do not hold it, which live on for a moment if the search is killed.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # of which systems raise one or the other
            raise ValueError(f"Another search is running in {folder}. Give another folder.") from None
        try:
            self._open(folder, identity, seed)
        except BaseException:
            self.close()
            raise

    def _open(self, folder: Path, identity: dict[str, Any], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optuna, that some arguments may change
            # No connection is open when a trial's process is forked.
            arguments = {"poolclass": NullPool, "connect_args": {"timeout": _SECONDS}}
            path = (folder / "study.db").absolute()
            try:
                storage = optuna.storages.RDBStorage(f"sqlite:///{path}", arguments)
                self._study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
            except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"{path} is not the study of a search, or it is damaged: {reason}. Give another folder, or remove"
                    " the file."
                ) from error
            before = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed + before,
                n_startup_trials=_RANDOM,
                multivariate=True,
                constant_liar=True,
                gamma=lambda number: math.ceil(_GOOD * number),
            )
        self._random = Random(seed + before)
        self._study.pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=_REDUCTION)
        self._distributions = {name: _distribution(parameter) for name, parameter in self._space.parameters.items()}
        self._begin(folder, identity)

    def _begin(self, folder: Path, identity: dict[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))
        known = self._study.user_attrs.get("search")
        if known is None:
            self._study.set_user_attr("search", identity)
        elif known != identity:
            other = [
                f"{name}: {_short(known.get(name))} there, {_short(value)} now"
                for name, value in identity.items()
                if known.get(name) != value
            ]
            raise ValueError(
                f"{folder} has another search ({'; '.join(other)}). Give another folder, or the same command to go on."
            )
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            if "settings" in trial.user_attrs:
                self._again(trial)

    def _again(self, trial: FrozenTrial) -> None:
        kept: dict[str, Any] = {
            name: trial.user_attrs[name] for name in ("name", "settings", "complete") if name in trial.user_attrs
        }
        self._study.enqueue_trial(dict(trial.params), user_attrs=kept)

    def enqueue(self, name: str, values: Values, settings: Settings) -> None:
        """Has settings tried before others, unless they are already, or were in an earlier part of the search.

        Args:
            name: Why they are tried.
            values: The values that they come from.
            settings: The settings.
        """
        complete = self._complete(settings, values)
        names = (trial.user_attrs.get("name") for trial in self._study.get_trials(deepcopy=False))
        if name not in names and complete not in self._known():
            self._study.enqueue_trial(values, user_attrs={"name": name, "settings": settings, "complete": complete})

    def ask(self) -> tuple[Trial, Settings] | None:
        """Returns a trial and its settings; ``None`` if nothing comes that was not tried before.

        Settings that need not be tried are left out, with a note in the study.
        """
        self._asked += 1
        repeats = 0
        for number in range(_REFUSED + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if repeats or self._asked % _VARIATIONS:
                    self._enqueue_variation()
                trial = self._study.ask(self._distributions)
            if "settings" in trial.user_attrs:
                return trial, dict(trial.user_attrs["settings"])
            settings = self._space.settings(trial.params)
            complete = self._complete(settings, trial.params)
            is_known = complete in self._known()
            objection = _KNOWN if is_known else self._space.objection(settings, self._goal.seconds)
            if objection is None or (number == _REFUSED and not is_known):
                trial.set_user_attr("settings", settings)
                trial.set_user_attr("complete", complete)
                return trial, settings
            self.tell(trial, "left out", [], reason=objection)
            repeats += is_known
            if repeats == _REPEATS:
                break
        return None

    def _complete(self, settings: Settings, values: Values) -> Settings:
        """Returns the settings that equal ones have in the study, too."""
        complete: Settings = json.loads(json.dumps(self._space.complete(settings, values)))
        return complete

    def _known(self) -> list[Settings]:
        """Returns the complete settings that have been tried, are being tried or will be; not those that failed."""
        trials = self._study.get_trials(deepcopy=False)
        return [
            self._complete_of(trial)
            for trial in trials
            if trial.state is not TrialState.FAIL and "settings" in trial.user_attrs
        ]

    def _complete_of(self, trial: FrozenTrial) -> Settings:
        """Returns the complete settings of a trial. Earlier versions did not note them."""
        kept: Settings | None = trial.user_attrs.get("complete")
        return self._complete(trial.user_attrs["settings"], trial.params) if kept is None else kept

    def _enqueue_variation(self) -> None:
        """Has a new variation of the best trial come next, unless others wait, or none is complete."""
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if complete and not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            best, known = min(complete, key=lambda trial: trial.value or 0.0), self._known()
            for _ in range(_REFUSED):
                values = self._space.near(best.params, self._random)
                if self._complete(self._space.settings(values), values) not in known:
                    self._study.enqueue_trial(values)
                    break

    def goes_on(self, trial: Trial, curve: list[Point]) -> bool:
        """Says whether a trial goes on after its last validation, and notes its losses at the rungs."""
        told = trial.user_attrs.get("rungs", 0)
        for number, part in enumerate(RUNGS[told:], told):
            loss = self._goal.at(curve, part)
            if loss is None:
                break
            # The pruner has rungs at powers of its factor, of whatever unit.
            trial.report(loss, _REDUCTION**number)
            trial.set_user_attr("rungs", number + 1)
            is_bad = trial.should_prune()  # by which the others are compared with it, too
            if is_bad and "name" not in trial.user_attrs:
                return False
        return True

    def tell(self, trial: Trial, outcome: Outcome, curve: list[Point], seconds: float = 0.0, reason: str = "") -> None:
        """Notes how a trial has ended.

        Args:
            trial: The trial.
            outcome: How.
            curve: Its validations.
            seconds: Wall-clock seconds that it took.
            reason: Why.
        """
        trial.set_user_attr("outcome", outcome)
        trial.set_user_attr("seconds", round(seconds, 1))
        if reason:
            trial.set_user_attr("reason", reason)
        if curve:
            trial.set_user_attr("curve", [list(point) for point in curve])
        value = self._goal.value(curve) if outcome == "complete" else None
        self._study.tell(trial, value, state=_STATES[outcome])
        if outcome == "interrupted":
            self._again(self._study.trials[trial.number])

    def results(self) -> list[Tried]:
        """Returns the trials that have ended, without those that were left out or interrupted."""
        return [_tried(trial) for trial in self._ended()]

    def result_of(self, settings: Settings, values: Values) -> Tried | None:
        """Returns the last trial of settings, or of equal ones; ``None`` if none has ended.

        Args:
            settings: The settings.
            values: The values that they come from.
        """
        complete = self._complete(settings, values)
        found = [trial for trial in self._ended() if self._complete_of(trial) == complete]
        return _tried(found[-1]) if found else None

    def _ended(self) -> list[FrozenTrial]:
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.user_attrs.get("outcome") not in (None, "left out", "interrupted")]

    @property
    def left_out(self) -> dict[str, int]:
        """How many settings were left out, by reason."""
        counts: dict[str, int] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if trial.user_attrs.get("outcome") == "left out":
                reason = trial.user_attrs["reason"]
                counts[reason] = counts.get(reason, 0) + 1
        return counts

    def importances(self) -> dict[str, float]:
        """Returns the share of each parameter in what makes good trials good; empty with too few trials.

        It is that of the losses at the first rung, which trials that have ended early have, too.
        """
        trials = [trial for trial in self._study.get_trials(deepcopy=False) if 1 in trial.intermediate_values]
        if len(trials) < _FEWEST_FOR_IMPORTANCES:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            at_rung = optuna.create_study()
            for trial in trials:
                value, params = trial.intermediate_values[1], trial.params
                at_rung.add_trial(optuna.create_trial(params=params, distributions=trial.distributions, value=value))
            evaluator = PedAnovaImportanceEvaluator(target_quantile=_GOOD)
            return get_param_importances(at_rung, evaluator=evaluator)

    def close(self) -> None:
        """Lets another search use the folder."""
        self._lock.close()


@dataclass(frozen=True)
class Tried:
    """A trial that has ended.

    Attributes:
        number: In the study.
        outcome: How it ended.
        settings: Its settings.
        values: The values that they come from.
        value: What counts, lower is better; ``None`` unless it is complete.
        curve: Its validations.
        seconds: Wall-clock seconds that it took.
        name: Why it was tried, unless it was drawn.
        reason: Why it failed.
    """

    number: int
    outcome: Outcome
    settings: Settings
    values: Values
    value: float | None
    curve: list[Point]
    seconds: float
    name: str
    reason: str


def _tried(trial: FrozenTrial) -> Tried:
    notes = trial.user_attrs
    return Tried(
        trial.number,
        notes["outcome"],
        notes["settings"],
        trial.params,
        trial.value if trial.state is TrialState.COMPLETE else None,
        [Point(*point) for point in notes.get("curve", ())],
        notes.get("seconds", 0.0),
        notes.get("name", ""),
        notes.get("reason", ""),
    )


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.values)
    if parameter.is_whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.is_log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.is_log)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
