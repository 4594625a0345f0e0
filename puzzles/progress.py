"""What the learner has done: one readable JSON file in the learner's own folder.

It is written beside itself and then renamed, so that there is always a whole one. A pass of an
older version of a puzzle is kept, and shown as one to look at again.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.commands.shared import ENVIRONMENT, Stop
from puzzles.puzzle import Puzzle

SCHEMA = 1
NAME = "progress.json"


@dataclass
class Progress:
    """folder: the learner's. puzzles: {id: {"hints": n, backend: {...}}}."""

    folder: Path
    puzzles: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: Path | None = None  # where a file went that could not be read

    @staticmethod
    def read(folder: Path) -> "Progress":
        """What is there, or a beginning. A file that is no JSON is put aside, never lost.

        Raises Stop for a file of a newer schema: an older program must not write over it.
        """
        path = folder / NAME
        try:
            found = json.loads(path.read_text())
            schema, puzzles = found["schema"], found["puzzles"]
            if not isinstance(puzzles, dict):
                raise ValueError("puzzles")
        except FileNotFoundError:
            return Progress(folder)
        except (ValueError, KeyError, TypeError):
            aside = path.with_name(f"{NAME}.{time.strftime('%Y%m%d-%H%M%S')}.unreadable")
            path.rename(aside)
            return Progress(folder, broken=aside)
        if schema != SCHEMA:
            raise Stop(
                ENVIRONMENT,
                f"{path} has schema {schema}, and this program knows {SCHEMA}: update it, or "
                "choose another --folder",
            )
        return Progress(folder, puzzles)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / NAME
        beside = path.with_name(f".{NAME}.{os.getpid()}")
        text = json.dumps({"schema": SCHEMA, "puzzles": self.puzzles}, indent=2, sort_keys=True)
        with open(beside, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    # What is known of a puzzle.

    def of(self, puzzle: str, backend: str) -> dict[str, Any]:
        return self.puzzles.get(puzzle, {}).get(backend, {})

    def hints(self, puzzle: str) -> int:
        return self.puzzles.get(puzzle, {}).get("hints", 0)

    def hint_taken(self, puzzle: str, count: int) -> None:
        entry = self.puzzles.setdefault(puzzle, {})
        entry["hints"] = max(count, entry.get("hints", 0))

    def state(self, puzzle: Puzzle, backend: str) -> str:
        """ "", "tried", "solved" or "solved before" (of an older version of the puzzle)."""
        known = self.of(puzzle.id, backend)
        if known.get("solved"):
            return "solved" if known["version"] == puzzle.version else "solved before"
        return "tried" if known.get("attempts") else ""

    def graded(self, result: Mapping[str, Any]) -> None:
        """Counts an attempt and keeps the best points; a worse attempt takes nothing away."""
        entry = self.puzzles.setdefault(result["puzzle"], {}).setdefault(result["backend"], {})
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        entry["attempts"] = entry.get("attempts", 0) + 1
        entry["last"] = {"verdict": result["verdict"], "seed": result["seed"],
                         "source": result["source"], "when": now}  # fmt: skip
        same = entry.get("version") == result["version"]
        best = entry.get("best", {}) if same else {}
        if not same and entry.get("solved") and result["verdict"] != "pass":
            return  # an old pass stands until the new version is passed
        if sum(result["points"].values()) >= sum(best.values()):
            entry["best"] = dict(result["points"])
        entry["version"] = result["version"]
        if result["verdict"] == "pass" and not (same and entry.get("solved")):
            entry["solved"] = now


def folder_of(given: Path | None) -> Path:
    """The learner's folder: the one given, the one we are in, or ./my_puzzles."""
    if given is not None:
        return given.resolve()
    here = Path.cwd()
    return here if (here / NAME).is_file() else here / "my_puzzles"
