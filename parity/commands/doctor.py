"""`parity doctor`: what this machine can run, and why not the rest."""

from argparse import Namespace

from parity.commands.shared import ENVIRONMENT, PASS, console_of, print_json, progress


def run(args: Namespace) -> int:
    from parity import doctor

    with progress(doctor.STEPS, "doctor") as tell:
        findings = doctor.examine(tell)
    worst = doctor.worst(findings)
    machine = doctor.machine()
    if args.json:
        print_json(
            {
                "ok": worst != doctor.RED,
                "worst": worst,
                "machine": machine.to_json(),
                "findings": [f.to_json() for f in findings],
            }
        )
        return ENVIRONMENT if worst == doctor.RED else PASS
    console = console_of()
    red = sum(f.colour == doctor.RED for f in findings)
    able = "Nothing stands in the way."
    if red:
        able = f"[bold red]{red} thing{'s stand' if red > 1 else ' stands'} in the way.[/]"
    console.print(f"{able} {machine.sentence()}\n")
    from rich.table import Table

    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(max_width=18, overflow="fold")
    lines.add_column(overflow="fold")
    for f in findings:
        do = f"\n-> {doctor.escape(f.do)}" if f.do else ""
        lines.add_row(f"[{f.colour}]{f.colour}[/]", f.name, doctor.escape(f.says) + do)
    console.print(lines)
    return ENVIRONMENT if red else PASS
