"""``plan.json``: what a study has fixed once, which must not change when it is started again: a race's rule and looks, measured seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gradreg import files
from gradreg.study.plan import Plan
from gradreg.study.racing import Look
from gradreg.study.seconds import EqualSeconds

FILE = "plan.json"
RESULTS = "results.json"


class PlanError(ValueError):
    """A study that was planned differently from the one whose runs are in its folder."""


@dataclass
class StoredPlan:
    """What is fixed in a study's folder.

    Args:
        folder: of the study.
        race: the rule of its race; None without one.
        judged_before: seeds whose verdicts were given without a race before it began; 0 if none were.
        looks: of the race, as far as they have been taken.
        seconds: what was measured for the rival at equal seconds, by variant.
    """

    folder: Path
    race: dict[str, Any] | None = None
    judged_before: int = 0
    looks: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, EqualSeconds] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, plan: Plan, *, reading: bool = False) -> StoredPlan:
        """What is fixed in ``folder``, which must be what ``plan`` says; written if nothing is yet, unless it is only read.

        Raises:
            PlanError: the folder holds a race of another plan, or a race and the plan has none.
        """
        held = _read(folder / FILE)
        race = rule(plan)
        before = held.get("race")
        if before is not None and race is None:
            raise PlanError(
                f"{str(folder)!r} holds a race, seeds {before['seeds'][0]} to {before['seeds'][-1]} until decided; got a study without. "
                f"Give until='decided' and max_seeds={len(before['seeds'])} (--until decided --max-seeds {len(before['seeds'])}), or "
                "another --out."
            )
        if before is not None and race is not None and before != race:
            changed = [f"{key} {before.get(key)} → {race.get(key)}" for key in race if before.get(key) != race.get(key)]
            raise PlanError(
                f"{str(folder)!r} holds a race with another rule: {'; '.join(changed)}. Bound, first look and variants are fixed before "
                "the first result, because changing them is looking again. Choose another --out, or --fresh to keep the old runs aside and "
                "start again."
            )
        seconds = {
            name: EqualSeconds(one["ratio"], one["length"], tuple(one["rounds"]), tuple(one["lengths"]))
            for name, one in held.get("seconds", {}).items()
        }
        stored = cls(folder, race, held.get("judged_before", 0), held.get("looks", []), seconds)
        if race is not None and before is None:
            stored.judged_before = len(_read(folder / RESULTS).get("seeds", []))
            if not reading:
                stored.write()
        return stored

    def timed(self, plan: Plan) -> Plan:
        """``plan`` with the seconds that were measured before, where it asks for them."""
        return replace(plan, seconds=self.seconds if "seconds" in plan.rivals else {})

    def take_looks(self, plan: Plan, records: Mapping[str, Any]) -> None:
        """Store the looks that can be taken by now, and check those that are stored.

        A run that failed is started again with the study, so a look that counted one may come out differently.

        Raises:
            PlanError: a look finds something else than it did.
        """
        standing = plan.standing(records)
        looks = [] if standing is None else standing.log
        agree = [_same(stored, look) for stored, look in zip(self.looks, looks, strict=False)]
        for stored, look, same in zip(self.looks, looks, agree, strict=False):
            if not same and not stored["failed"]:
                raise PlanError(
                    f"{str(self.folder)!r} holds results that have changed since the look at {look.seeds} seeds: it saw p "
                    f"{_numbers(stored['p'])}, and would see {_numbers(look.p)} now. Put the old runs back, or use --fresh."
                )
        if all(agree) and len(looks) <= len(self.looks):
            return  # fewer: results that were there are missing, and are run again
        failed = [record for record in records.values() if record.error is not None]
        self.looks = [{**asdict(look), "failed": [r.folder for r in failed if r.seed in plan.seeds[: look.seeds]]} for look in looks]
        self.write()

    def found(self) -> dict[str, Any] | None:
        """The rule and the looks of the race, as ``results.json`` holds them; None without one."""
        return None if self.race is None else {**self.race, "judged_before": self.judged_before, "looks": self.looks}

    def write(self) -> None:
        """Write the file."""
        seconds = {name: asdict(one) for name, one in self.seconds.items()}
        written = {"race": self.race, "judged_before": self.judged_before, "looks": self.looks, "seconds": seconds}
        files.write_json(self.folder / FILE, written)


def rule(plan: Plan) -> dict[str, Any] | None:
    """All that decides a race beside its results; None without one."""
    race = plan.race
    if race is None:
        return None
    return {
        "metric": plan.metric.name,
        "mode": plan.metric.mode,
        "rival": plan.rivals[0],
        "margin": plan.margin,
        "baseline": plan.baseline,
        "variants": [name for name in plan.variants if name != plan.baseline],
        "seeds": list(race.seeds),
        "first": race.first,
        "step": race.step,
        "level": race.level,
        "spending": race.spending,
    }


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _same(stored: Mapping[str, Any], look: Look) -> bool:
    p = stored["p"]
    return stored["decided"] == look.decided and p.keys() == look.p.keys() and all(math.isclose(p[k], look.p[k], rel_tol=1e-6) for k in p)


def _numbers(p: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.4g} of {name}" for name, value in p.items())
