"""The batch of CARLA servers that the stages train and measure on: one process and one environment a server."""

from __future__ import annotations

import itertools
import logging
import statistics
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from carla_digr.driving.control import ACTIONS, IMAGE_SIZE, RETRY, TICK
from carla_digr.driving.drive_process import RESET, SimulatorProcess, accepts, address_of, wait_awake
from carla_digr.errors import SimulatorGone, UserError
from carla_digr.tasks.driving.classes import importance_of
from carla_digr.tasks.driving.server_drive import SCRIPTED, Job, answer_requests
from carla_digr.tasks.driving.settings import DrivingConfig
from carla_digr.tasks.environment import BatchedEnvironment, Steps, episode_seed

FOR_EVER = float("inf")
LOOK = 1.0  # s after which it is looked for servers that are back
RENEWED = 200  # episodes after which a process is begun anew: the client library's memory grows
PACED = 200  # decisions over which the pace of a server is a median
SLOWED = 2.0  # times its first pace, from which on a server is said to have become slow
REPLAYED = 1.0  # s that a decision of a replayed episode may take

log = logging.getLogger(__name__)
_drove: set[str] = set()
"""Servers on which this process has driven: one of them that is gone is taken to come back."""


class Pace:
    """How long a server takes for a decision and what memory it holds, and whether that has grown."""

    def __init__(self, address: str):
        self._address = address
        self._seconds: list[float] = []
        self._first: float | None = None
        self._held: int | None = None

    @property
    def begins(self) -> bool:
        """Whether the next decision is the first of those of a median."""
        return not self._seconds

    def holds(self, memory: int | None) -> None:
        """Its memory, in bytes, where it is known; says so where it has come to SLOWED times the first, and again."""
        if memory is None:
            return
        if self._held is None:
            self._held = memory
        elif memory >= SLOWED * self._held:
            log.warning(
                "%s holds %.1f GiB of memory, at first it held %.1f; start it again when it suits, the job goes on "
                "meanwhile and with it afterwards.", self._address, memory / 2**30, self._held / 2**30,
            )  # fmt: skip
            self._held = memory

    def took(self, seconds: float) -> None:
        """One more decision; says so where they have come to take SLOWED times as long as at first, and again."""
        self._seconds.append(seconds)
        if len(self._seconds) < PACED:
            return
        now = statistics.median(self._seconds)
        self._seconds.clear()
        if self._first is None:
            self._first = now
        elif now >= SLOWED * self._first and now > TICK:  # not where it is only quicker at times
            log.warning(
                "%s takes %.0f ms a decision, at first it took %.0f; start it again when it suits, the job goes on "
                "meanwhile and with it afterwards.", self._address, 1000.0 * now, 1000.0 * self._first,
            )  # fmt: skip
            self._first = now


class ServersVecEnv(BatchedEnvironment):
    """One environment a server, all stepped together; see Task.make_vec_env.

    A server that hangs or dies costs its episode: the step says that it was cut, the process that drove there is ended,
    and the episode begins anew once the server is back. Until then, and on servers of the kind "carla" while an episode
    starts, which takes seconds there, the environment is absent: it stands still, and nothing is to be learnt from what
    its steps say.

    Args:
        environments: at most as many as there are simulators.
        seed: episode e of environment i follows from (seed, i, e).
        config: of the task, with ``simulators``.
        evaluation: decisions last ``decision_ticks`` instead of ``training_decision_ticks``.

    Attributes:
        begin_drive: what makes the process of a server; a cluster has its own, on another machine.
        present: bool (N,), which environments took the last step.
        started: int (N,), episodes begun.

    Raises:
        UserError: the settings do not fit each other, a simulator cannot be connected, or one has another map.
    """

    begin_drive: ClassVar[type[SimulatorProcess] | Any] = SimulatorProcess

    def __init__(self, environments: int, seed: int, config: DrivingConfig, evaluation: bool):
        super().__init__(environments, (3, IMAGE_SIZE, IMAGE_SIZE), len(ACTIONS[config.actions]))
        self.base_seed, self.config = seed, config
        self.addresses = _addresses(config, environments)
        self.present = np.ones(environments, bool)
        self.started = np.zeros(environments, np.int64)
        self.observations = np.zeros((environments, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        self._actions: list[list[int]] = [[] for _ in range(environments)]
        """Taken in the present episodes."""
        self._interval: int | None = None
        """Steps from one at whose end ``classes`` are to be known to the next."""
        self._steps = 0
        self._later: dict[int, Future[NDArray[np.uint8]]] = {}
        """First pictures of the episodes of those that are absent."""
        self._lost: dict[int, float] = {}
        """When servers were lost, of those that are not back."""
        self._paces = [Pace(address) for address in self.addresses]
        self._begun = [0] * environments
        """Episodes of each process."""
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(environments, "server")
        ticks = config.decision_ticks if evaluation else config.training_decision_ticks
        where: dict[str, Any] = {"vehicles": config.vehicles, "roads": config.roads or ()}
        where["spawn_points"] = config.spawn_points or ()
        if config.kind == "embedded":  # whose pictures take its processor's time
            where["picture_ticks"] = ticks
        self._processes: list[SimulatorProcess] = []
        try:
            for number, address in enumerate(self.addresses):
                host, port = address_of(address)
                job = Job(config, ticks, number)
                process = self.begin_drive(answer_requests, job, config.kind, host, port, config.timeout, **where)
                self._processes.append(process)
            for i, process in enumerate(self._processes):
                self._meet(i, process)
            _refuse_different_maps([p for i, p in enumerate(self._processes) if i not in self._lost])
        except BaseException:
            self.close()
            raise

    def _meet(self, i: int, process: SimulatorProcess) -> None:
        try:
            process.ready()
        except UserError as error:
            gone = isinstance(error, SimulatorGone) or not accepts(process.address)
            if process.address not in _drove or not gone:
                raise
            log.warning("%s It is waited for.", error)
            self._lost[i] = time.monotonic()
        else:
            _drove.add(process.address)

    def watch_labels(self, interval: int) -> None:
        """From the next reset on, have ``classes`` and ``importance`` after every ``interval``-th step.

        Raises:
            UserError: a server has no camera for that.
        """
        self._interval = interval
        there = [process for i, process in enumerate(self._processes) if i not in self._lost]
        for process in there:
            process.ask(self._watch())
        for process in there:
            process.answer(RESET)

    def _watch(self) -> dict[str, Any]:
        return {"watch": self.config.kind == "carla"}  # whose cameras must not be switched on and off

    def reset(self) -> NDArray[np.uint8]:
        """Start a new episode everywhere; uint8 (N, 3, 128, 128)."""
        self._steps = 0
        self._begin_all([[] for _ in self._processes])
        return self.observe()

    def _begin_all(self, actions: list[list[int]]) -> None:
        wait(self._later.values())
        self._later.clear()
        for i, taken in enumerate(actions):
            self._restart(i, taken)
        left = RESET + self.config.patience
        while self._later:
            begun = time.monotonic()
            self._welcome(list(self._later), LOOK)
            left -= min(LOOK, time.monotonic() - begun)  # not all that the clock says, see wait_awake
            if left <= 0.0 and self._lost:
                raise UserError(
                    f"{', '.join(self.addresses[i] for i in self._lost)} does not come back; start it again."
                )

    def step(self, actions: Any) -> Steps:
        """One decision everywhere; finished episodes restart.

        Raises:
            UserError: no server has been there for ``patience``.
        """
        rewards = np.zeros(self.num_envs, np.float32)
        dones = np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self._steps += 1
        self.present[:] = [i not in self._later for i in range(self.num_envs)]
        asked = [i for i in np.flatnonzero(self.present).tolist() if self._ask(i, int(actions[i]))]
        over = []
        for i in asked:
            try:
                facts, (picture,) = self._processes[i].answer()
            except UserError as error:
                self._lose(i, error)
                continue
            self.observations[i] = picture
            rewards[i] = facts["reward"]
            self._paces[i].holds(facts.get("memory"))
            self._paces[i].took(facts["took"])
            self._actions[i].append(int(actions[i]))
            if facts["terminated"] or facts["truncated"]:
                dones[i] = True
                infos[i] = {
                    "terminal_observation": self.observations[i].copy(),
                    "TimeLimit.truncated": facts["truncated"],
                    "is_success": not facts["terminated"],
                    "metrics": facts["metrics"],
                }
                over.append(i)
        for i in np.flatnonzero(self.present).tolist():
            if i in self._lost:
                self.present[i], dones[i] = False, True
                infos[i] = {"terminal_observation": self.observations[i].copy(), "TimeLimit.truncated": True}
        for i in over:
            self._restart(i)
        self._welcome(over if self.config.kind == "embedded" else [])
        return self.observe(), rewards, dones, infos

    def _ask(self, i: int, action: int) -> bool:
        try:
            memory = {"memory": True} if self._paces[i].begins else {}
            self._processes[i].ask({"action": action, **self._label(), **memory})
        except UserError as error:
            self._lose(i, error)
            return False
        return True

    def _label(self) -> dict[str, Any]:
        return {"label": True} if self._interval is not None and self._steps % self._interval == 0 else {}

    def _lose(self, i: int, error: UserError) -> None:
        """A server is gone in the middle of an episode, which is to begin anew."""
        log.warning("%s Its episode is cut; the others drive on.", error)
        self._lost[i] = time.monotonic()
        self.started[i] -= 1
        self._restart(i)

    def _restart(self, i: int, actions: list[int] | None = None) -> None:
        """The next episode, in a thread of its own; ``actions`` are taken in it at once."""
        seed = episode_seed(self.base_seed, i, int(self.started[i]))
        self.started[i] += 1
        self._actions[i] = actions or []
        anew = i in self._lost or self._begun[i] == RENEWED
        self._begun[i] = 1 if anew else self._begun[i] + 1
        self._later[i] = self._pool.submit(self._begin, i, seed, self._actions[i], anew)

    def _begin(self, i: int, seed: int, actions: list[int], anew: bool) -> NDArray[np.uint8]:
        """The first picture of an episode; with ``anew`` of a new process, however long its server takes to be back."""
        request = {"seed": seed, **({"actions": actions} if actions else {}), **self._label()}
        said = ""
        while True:
            try:
                if anew:
                    before = self._processes[i]
                    self._processes[i] = before.reconnect(FOR_EVER, self._closing.is_set)
                    _refuse_different_maps([before, self._processes[i]])
                    if self._interval is not None:
                        self._processes[i].ask(self._watch())
                        self._processes[i].answer(RESET)
                self._processes[i].ask(request)
                return self._processes[i].answer(RESET + REPLAYED * len(actions))[1][0]
            except UserError as error:
                if not anew or self._closing.is_set():
                    raise
                if str(error) != said:
                    log.warning("%s is not back yet: %s", self.addresses[i], error)
                    said = str(error)
                time.sleep(RETRY)

    def _welcome(self, waited_for: list[int], patience: float | None = None) -> None:
        """Take the first pictures of those that are back; wait for some, and for one if all are absent."""
        wait([self._later[i] for i in waited_for], patience)
        if len(self._later) == self.num_envs:
            patience = self.config.patience + (RESET if len(self._lost) < self.num_envs else 0.0)
            if not wait_awake(lambda part: wait(self._later.values(), part, FIRST_COMPLETED).done, patience):
                raise UserError(
                    f"None of the simulators {', '.join(self.addresses)} has answered for {patience:g} s; "
                    "start them again, then this job."
                )
        for i in [i for i, first in self._later.items() if first.done()]:
            first = self._later.pop(i)
            error = first.exception()
            if isinstance(error, UserError):
                self._lose(i, error)
                continue
            self.observations[i] = first.result()
            if (since := self._lost.pop(i, None)) is not None:
                log.warning("%s drives again, after %.0f s.", self.addresses[i], time.monotonic() - since)

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Which of the present observations (N,) are new, and of episodes that go on."""
        return self.present & np.array([i not in self._later for i in range(self.num_envs)])

    @property
    def driving(self) -> int:
        """How many of the servers are not lost."""
        return self.num_envs - len(self._lost)

    def observe(self) -> NDArray[np.uint8]:
        """The present observations, uint8 (N, 3, 128, 128); the last ones of those that are absent."""
        return self.observations.copy()

    def classes(self) -> NDArray[np.int8]:
        """What each pixel of the present observations shows, int8 (N, 128, 128), 0 of those that are not ``shown``."""
        found = np.zeros((self.num_envs, IMAGE_SIZE, IMAGE_SIZE), np.int8)
        there = np.flatnonzero(self.shown).tolist()
        for i in there:
            self._processes[i].ask({"classes": True})
        for i in there:
            try:
                found[i] = self._processes[i].answer()[1][0]
            except UserError as error:
                self._lose(i, error)
        return found

    def importance(self) -> NDArray[np.int8]:
        """Which pixels matter, int8 (N, 128, 128); see tasks.KnowsImportance."""
        return importance_of(self.classes())

    def metrics(self, i: int) -> dict[str, float]:
        """Figures of the present episode of environment i."""
        self._processes[i].ask({"metrics": True})
        return self._processes[i].answer()[0]

    def scripted(self, observations: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The action (N,) that leaves the command to the scripted driver everywhere."""
        return np.full(len(observations), SCRIPTED)

    def get_state(self) -> dict[str, np.ndarray]:
        """The present episodes by their actions, from which they follow where the server's world does not draw."""
        actions = {f"{i}.actions": np.array(taken, np.int64) for i, taken in enumerate(self._actions)}
        return {"started": self.started.copy(), **actions}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from ``get_state``: on embedded highways by driving the episodes again, elsewhere with new ones."""
        self.started[:] = state["started"] - 1
        again = self.config.kind == "embedded"
        self._begin_all([state[f"{i}.actions"].tolist() if again else [] for i in range(self.num_envs)])

    def close(self) -> None:
        """Have the processes leave the servers as they were found, and end; safe to call twice."""
        self._closing.set()
        self._pool.shutdown()
        with ThreadPoolExecutor(self.num_envs) as pool:
            list(pool.map(lambda process: process.close(), self._processes))


def _addresses(config: DrivingConfig, environments: int) -> tuple[str, ...]:
    simulators = config.simulators or ()
    if config.random_scenery:
        raise UserError("The setting environment.random_scenery must be 0 with environment.simulators.")
    for address in simulators:
        address_of(address)
        if simulators.count(address) > 1:
            raise UserError(f"The setting environment.simulators names {address} twice; each drives one environment.")
    if environments > len(simulators):
        raise UserError(
            f"The stage asks for {environments} environments, but environment.simulators names {len(simulators)}; "
            "set the environments of each section of the configuration to as many."
        )
    return simulators[:environments]


def _refuse_different_maps(processes: list[SimulatorProcess]) -> None:
    for first, other in itertools.pairwise(processes):
        if (other.map_name, other.map_hash) != (first.map_name, first.map_hash):
            raise UserError(
                f"The simulator at {other.address} has the map {other.map_name} ({other.map_hash}), that at "
                f"{first.address} has {first.map_name} ({first.map_hash}); load the same map everywhere."
            )
