"""Scenes of LIBERO-Spatial: two bowls, and an instruction names one of them by where it stands.

    relations = Relations(env)
    relations.shuffle(seed)       plate, ramekin and cookie box exchange places, both bowls stand in a drawn relation
    relations.named               {"pick up the black bowl next to the plate and …": "akita_black_bowl_2", …}

A relation is a region of LIBERO's scene files, and its instruction is that of the task whose bowl starts there. One
bowl stands where the task says, the other in any other relation, so that each can be asked for; a bowl that would fit
a second instruction is drawn again. In some scenes plate and other bowl exchange places, as LIBERO-PRO has it: the
plate lies on the stove, the cabinet or the box, or beside something, and nothing names the bowl at its home. Cabinet
and stove keep their places, but for the centimetres that LIBERO gives them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from safe_pruner_jax.libero.env import LiberoEnv, load_task, num_tasks
from safe_pruner_jax.libero.labels import problem_of
from safe_pruner_jax.libero.placements import JITTER, USUAL_JITTER, Placements, Visited
from safe_pruner_jax.libero.scene import Scene

PLATE, RAMEKIN, COOKIES = "plate_1", "glazed_rim_porcelain_ramekin_1", "cookies_1"
BETWEEN, CENTRE = "main_table_between_plate_ramekin_region", "main_table_table_center"
BESIDE = {
    "main_table_next_to_plate_region": PLATE,
    "main_table_next_to_ramekin_region": RAMEKIN,
    "main_table_next_to_box_region": COOKIES,
}
DRAWER = "wooden_cabinet_1_top_region"
HOME = "main_table_plate_region"
NEAR_PLATE = frozenset({BETWEEN, "main_table_next_to_plate_region"})
_EXCHANGED = 0.5  # of the scenes in which they can: plate and other bowl have each other's place
_HOMES = {PLATE: HOME, RAMEKIN: "main_table_ramekin_region", COOKIES: "main_table_box_region"}
_RAISED = {"flat_stove_1_cook_region": 0.03, "wooden_cabinet_1_top_side": 0.02, DRAWER: 0.05}  # m above the site
_RADIUS = {PLATE: 0.069, RAMEKIN: 0.045, COOKIES: 0.047}
_BOWL = 0.054  # m, radius
_TABLE, _STACKED = 0.92, 0.965  # m, height from which things drop on the table, and on one another
_OPEN = -0.15  # m, the drawer's joint
_GAP, _CLEARLY = 0.012, 0.05  # m between two things; and by which a thing is nearer than others
_HAND, _PALM = 0.09, (1.0, 1.08)  # m that the hand needs beside a bowl or over the plate, and at which heights
_CLOSED = 0.03  # m of it beside a closed cabinet, of which there is less
_BOUNDS, _BASE, _REACH = np.array([[-0.30, -0.12], [0.19, 0.36]]), np.array([-0.66, 0.0]), 0.86
_TRIES = 2000


class _Layout(NamedTuple):
    """Where things are dropped, [3] in metres each, and the region of every bowl."""

    at: dict[str, np.ndarray]
    regions: dict[str, str]


class Relations(Placements):
    """Draws scenes for one environment of LIBERO-Spatial or a variant of it; see `Placements`.

    Args:
      env: any episode may be running.

    Raises:
      ValueError: another suite.
    """

    scenes, noise = 10, 0.15

    def __init__(self, env: LiberoEnv):
        suite = env.task.suite
        self._instructions = {}
        for task in range(num_tasks(suite)):
            starts = problem_of(suite, task)["initial_state"]
            region = next((place for _, thing, *place in starts if thing.endswith("bowl_1")), [""])[0]
            self._instructions[region] = load_task(suite, task).language
        if set(self._instructions) - {BETWEEN, CENTRE, RAMEKIN, COOKIES, *BESIDE, *_RAISED}:
            raise ValueError(f"suite: expected one object of a kind per scene, or libero_spatial, got {suite}")
        super().__init__(env)
        self._bowls = self.names = [name for name in self._places if name.startswith("akita_black_bowl")]
        self.instructions = tuple(self._instructions.values())
        started = {thing: place[0] for _, thing, *place in env.simulator.env.parsed_problem["initial_state"] if place}
        self._usual = {name: started[name] for name in self._bowls}
        self._regions = dict(self._usual)
        self._scene = Scene(env)
        self._drawer = 1 + env.simulator.sim.model.get_joint_qpos_addr("wooden_cabinet_1_top_level")

    @property
    def named(self) -> Mapping[str, str]:
        """Instruction → bowl; of an episode that `shuffle` did not begin, what the task's own scene says."""
        said = self._instructions
        return {said[region]: name for name, region in self._regions.items() if region in said}

    def shuffle(self, seed: int, *, permute: bool = True, arm: float = 0.02) -> None:
        """Starts an episode in a new scene, in which one bowl is where the task says, and one where another task says.

        Args:
          seed: of the whole scene, together with the task.
          permute: False leaves everything within a few centimetres of where LIBERO puts it for this task.
          arm: standard deviation, rad, that the arm's joints get.

        Raises:
          RuntimeError: no scene was found that stands.
        """
        env, rng = self._env, np.random.default_rng([seed, self._env.task.index])
        for attempt in range(20):
            env.randomize(seed + attempt)  # a bowl that LIBERO's own draw has leaning on the plate would stay tilted
            start = env.simulator.get_sim_state().copy()
            start[self._arm] += rng.normal(0.0, arm, len(self._arm))
            start[self._positions :] = 0
            layout = self._draw(rng, start, permute)
            state = self._state(start, layout)
            env.begin(state, reset=False)
            self._regions, self.names = layout.regions, [n for n in self._bowls if layout.regions[n] != HOME]
            if self._stands(layout):
                return
        raise RuntimeError(f"{env.task.name}: no scene of seed {seed} stands")

    def teleport(self, rng: np.random.Generator, base: np.ndarray, visited: Sequence[Visited]) -> str | None:
        """Puts the arm near where an episode came by; returns the bowl in the hand, if one is there.

        Args:
          rng: draws everything.
          base: not used: a bowl that is put elsewhere is no longer what the instruction names.
          visited: states of an episode in this scene.
        """
        sim, (state, held) = self._env.simulator.sim, visited[int(rng.integers(len(visited)))]
        state = state.copy()
        state[self._positions :] = 0
        state[self._arm] += rng.normal(0.0, 0.06 if held is None else 0.004, len(self._arm))
        if held is None and rng.random() < 0.3:
            half = rng.uniform(0.0, 0.04)
            state[self._fingers] = half, -half
        sim.set_state_from_flattened(state)
        sim.forward()
        self._env.look()
        return held

    def _draw(self, rng: np.random.Generator, start: np.ndarray, permute: bool) -> _Layout:
        """A layout in which nothing touches and no bowl answers to two instructions."""
        for _ in range(_TRIES):
            regions, (own, other) = dict(self._usual), self._bowls  # the task names the first one
            if permute:
                regions[other] = str(rng.choice([r for r in self._instructions if r != regions[own]]))
            exchanged = permute and rng.random() < _EXCHANGED and self._can_exchange(regions)
            self._pull(start, regions)
            homes = [self._site(region)[:2] for region in _HOMES.values()]
            order = rng.permutation(len(homes)) if permute else range(len(homes))
            spread = JITTER if permute else USUAL_JITTER
            ground = {name: homes[i] + rng.normal(0.0, spread, 2) for name, i in zip(_HOMES, order, strict=True)}
            at = {name: np.array([*xy, _TABLE]) for name, xy in ground.items()}
            if exchanged:
                at[PLATE], regions[other] = self._place(rng, regions[other], at, permute, _RADIUS[PLATE]), HOME
                at[other] = np.array([*ground[PLATE], _TABLE])
            at |= {n: self._place(rng, region, at, permute) for n, region in regions.items() if n not in at}
            layout = _Layout(at, regions)
            room = _GAP if not permute else _HAND if DRAWER in regions.values() else _CLOSED
            if self._clear(layout, room) and self._told_apart(layout):
                return layout
        raise RuntimeError(f"{self._env.task.name}: no layout in {_TRIES} draws")

    def _can_exchange(self, regions: Mapping[str, str]) -> bool:
        """Whether plate and second bowl can have each other's place: the plate lies there, and names no bowl."""
        own, other = (regions[name] for name in self._bowls)
        return not {own, other} & NEAR_PLATE and other not in (RAMEKIN, DRAWER)

    def _place(
        self,
        rng: np.random.Generator,
        region: str,
        at: Mapping[str, np.ndarray],
        permute: bool,
        radius: float = _BOWL,
    ) -> np.ndarray:
        """Where a bowl, or another thing of a `radius` in metres, is dropped that stands in a region."""
        small = rng.normal(0.0, 0.006, 2)
        if region in at:
            return np.array([*(at[region][:2] + small / 2), _STACKED])
        if region in _RAISED:
            x, y, z = self._site(region)
            spread = 0.7 if region == DRAWER else 1.0 + 1.5 * permute
            return np.array([x, y, z + _RAISED[region]]) + spread * np.array([*small, 0.0])
        if region == CENTRE:
            return np.array([*(self._site(region)[:2] + (1.0 + 1.5 * permute) * small), _TABLE])
        plate, ramekin = at[PLATE][:2], at[RAMEKIN][:2]
        if region == BETWEEN:
            share = (1 + (_RADIUS[PLATE] - _RADIUS[RAMEKIN]) / np.linalg.norm(ramekin - plate)) / 2
            return np.array([*(plate + share * (ramekin - plate) + small), _TABLE])
        thing = BESIDE[region]
        if permute:
            angle, far = rng.uniform(0, 2 * np.pi), _RADIUS[thing] + radius + _GAP + rng.uniform(0.0, 0.02)
            return np.array([*(at[thing][:2] + far * np.array([np.cos(angle), np.sin(angle)])), _TABLE])
        usual = self._site(region) - self._site(_HOMES[thing])
        return np.array([*(at[thing][:2] + usual[:2] + small), _TABLE])

    def _pull(self, start: np.ndarray, regions: Mapping[str, str]) -> None:
        """Opens the drawer for a bowl in it, else closes it; where fixtures and their sites are is then known."""
        start[self._drawer] = _OPEN if DRAWER in regions.values() else 0.0
        self._env.simulator.sim.set_state_from_flattened(start)
        self._env.simulator.sim.forward()

    def _clear(self, layout: _Layout, hand: float) -> bool:
        """Whether things on the table are in reach, apart, and as far from fixtures as a `hand` needs."""
        standing = {name: xyz[:2] for name, xyz in layout.at.items() if xyz[2] == _TABLE}
        on_table = [(here, _RADIUS.get(name, _BOWL)) for name, here in standing.items()]
        for k, (here, radius) in enumerate(on_table):
            inside = (here > _BOUNDS[0]).all() and (here < _BOUNDS[1]).all()
            if not inside or np.linalg.norm(here - _BASE) > _REACH:
                return False
            if any(np.linalg.norm(here - there) < radius + other + _GAP / 2 for there, other in on_table[:k]):
                return False
        fixtures = self._scene.boxes(*self._env.simulator.env.fixtures_dict)
        turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        ring = np.stack([np.cos(turns), np.sin(turns)], -1)
        around = lambda here, far, z: np.c_[here + far * ring, np.full(len(ring), z)]
        points = [around(here, radius + _GAP, _TABLE) for here, radius in on_table]
        reached = [pair for pair, name in zip(on_table, standing, strict=True) if name not in (RAMEKIN, COOKIES)]
        points += [around(here, radius + hand, z) for here, radius in reached for z in _PALM]
        return fixtures.count(np.concatenate(points)) == 0

    def _told_apart(self, layout: _Layout) -> bool:
        """Whether every bowl on the table answers to its own instruction alone."""
        for name, region in layout.regions.items():
            here = layout.at[name][:2]
            gaps = {thing: np.linalg.norm(here - layout.at[thing][:2]) - _BOWL - _RADIUS[thing] for thing in _RADIUS}
            if region in BESIDE:
                nearest = gaps.pop(BESIDE[region])
                if min(gaps.values()) < nearest + _CLEARLY or self._is_between(here, layout):
                    return False
            if region in (CENTRE, HOME) and (min(gaps.values()) < 0.03 or self._is_between(here, layout)):
                return False
            if region == BETWEEN and gaps[COOKIES] < _CLEARLY:
                return False
        return True

    def _is_between(self, here: np.ndarray, layout: _Layout) -> bool:
        """Whether a place is near the line from plate to ramekin, between the two."""
        plate, ramekin = layout.at[PLATE][:2], layout.at[RAMEKIN][:2]
        along = (ramekin - plate) / np.linalg.norm(ramekin - plate)
        share, aside = (here - plate) @ along, abs((here - plate) @ [-along[1], along[0]])
        return bool(0.02 < share < np.linalg.norm(ramekin - plate) - 0.02 and aside < 0.07)

    def _state(self, start: np.ndarray, layout: _Layout) -> np.ndarray:
        state = start.copy()
        for name, xyz in layout.at.items():
            state[self._places[name] : self._places[name] + 3] = xyz
        return state

    def _stands(self, layout: _Layout) -> bool:
        """Whether everything has settled upright where it was dropped."""
        body = self._env.simulator.env.obj_body_id
        for name, meant in layout.at.items():
            tilt = self._env.simulator.sim.data.body_xmat[body[name]].reshape(3, 3)[2]
            if np.linalg.norm(self._scene.position(name)[:2] - meant[:2]) > 0.03 or np.abs(tilt).max() < 0.98:
                return False
        return True

    def _site(self, region: str) -> np.ndarray:
        return np.array(self._env.simulator.sim.data.get_site_xpos(region))
