"""`parity list`: problems, their workloads, and what runs on this machine."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from parity.commands.shared import PASS, print_json, problems_of

if TYPE_CHECKING:
    import parity.spec


def run(args: Namespace) -> int:
    from parity import doctor

    problems = problems_of([args.stem] if args.stem else [])
    machine = doctor.machine()
    if args.json:
        print_json(
            {
                "machine": machine.to_json(),
                "problems": [_described(p) for p in problems],
            }
        )
        return PASS
    print(machine.sentence())
    if not args.stem:
        width = max(len(p.stem) for p in problems)
        for p in problems:
            line = p.doc.strip().splitlines()[0].rstrip(".:")
            tags = [sum(tag in w.tags for w in p.workloads) for tag in ("ci", "model")]
            print(f"\n{p.stem:<{width}}  {line}")
            print(f"{'':<{width}}  {tags[0]} ci and {tags[1]} model workloads; {_who(p)}")
        print("\n`parity list STEM` shows the workloads, `parity check STEM` checks them.")
        return PASS
    p = problems[0]
    print(f"\n{p.doc.strip()}\n\nTwins: {_who(p)}\n")
    names = max(len(w.name) for w in p.workloads)
    for w in p.workloads:
        sizes = " ".join(f"{k}={v}" for k, v in w.sizes.items())
        options = "".join(f" {k}={v}" for k, v in w.options.items())
        print(f"  {w.name:<{names}}  {w.dtype:<9} {', '.join(w.tags):<21} {sizes}{options}")
    return PASS


def _who(p: "parity.spec.Problem") -> str:
    return ", ".join((*p.implementations, *(f"peer:{name}" for name in p.peers)))


def _described(p: "parity.spec.Problem") -> dict[str, Any]:
    return {
        "stem": p.stem,
        "doc": p.doc.strip(),
        "implementations": dict(p.implementations),
        "peers": dict(p.peers),
        "workloads": [
            {
                "name": w.name,
                "sizes": dict(w.sizes),
                "dtype": w.dtype,
                "tags": list(w.tags),
                "options": dict(w.options),
                "passes": list(w.passes),
            }
            for w in p.workloads
        ],
    }
