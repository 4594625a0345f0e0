"""`parity new`: the files of a new problem, which run and are honestly wrong."""

import difflib
import os
from argparse import Namespace
from pathlib import Path

from parity import new
from parity.commands.shared import ENVIRONMENT, PASS, USAGE, Stop, print_json


def run(args: Namespace) -> int:
    root = new.ROOT
    if not new.is_checkout(root):
        raise Stop(
            ENVIRONMENT,
            f"`parity new` adds files to a checkout of the project, and {root} is an installed "
            "package: clone the repository, `make test` in it, and use its .venv/bin/parity",
        )
    try:
        texts = new.planned(args.stem, root)
    except new.Refused as e:
        raise Stop(USAGE, f"{e}; nothing was written") from None
    made = [path for path in texts if not (root / path).exists()]
    changed = [path for path in texts if path not in made]
    if not args.dry_run:
        try:
            new.write(texts, root)
        except OSError as e:
            raise Stop(ENVIRONMENT, f"{e}; nothing was written") from None
    if args.json:
        print_json({"ok": True, "dry_run": args.dry_run, "new": made, "changed": changed,
                    "files": texts if args.dry_run else None})  # fmt: skip
    elif args.dry_run:
        print(f"{len(made)} new files and one more name in {len(changed)}; nothing was written.")
        print(_as_diff(texts, root))
    else:
        print(_told(args.stem, made, changed, root))
    return PASS


def _told(stem: str, made: list[str], changed: list[str], root: Path) -> str:
    where = "" if Path.cwd() == root else f" in {os.path.relpath(root)}"
    lines = [f"{stem} is a problem now{where}: its kernels run, and copy what they read."]
    what = ("what it computes", "how, in Triton", "how, in Pallas")
    width = max(map(len, (*made, *changed)))
    lines += [f"  {path:<{width}}  {says}" for path, says in zip(made, what, strict=True)]
    lines += [f"  {path:<{width}}  one more name" for path in changed]
    lines += [
        f"Next: `parity check {stem}` says what is wrong with a copy, and {new.PAGE} goes on.",
        f"To undo it: rm {' '.join(made)}, and take the name out again (`git diff` shows where).",
    ]
    return "\n".join(lines)


def _as_diff(texts: dict[str, str], root: Path) -> str:
    """What would happen, as `git apply` reads it."""
    lines: list[str] = []
    for path, text in texts.items():
        file = root / path
        old = file.read_text().splitlines(keepends=True) if file.exists() else []
        before = f"a/{path}" if file.exists() else os.devnull
        lines += difflib.unified_diff(old, text.splitlines(keepends=True), before, f"b/{path}")
    return "".join(lines).rstrip("\n")
