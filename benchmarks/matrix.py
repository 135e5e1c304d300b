"""Make the tables of ways of training and layouts from the receipts.

    python benchmarks/matrix.py            # print them
    python benchmarks/matrix.py --write    # put them into docs/distributed.md and README.md

A cell links to the receipts of what was run there; what a recipe refuses it says, with the reason
below; and everything else was not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from receipt import ROOT, Receipt, read_receipts

from chainforge.train.distributed import LAYOUTS, Layout, refusals

BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->"
METHODS = {
    "full": {},
    "LoRA": {"use_peft": True},
    "QLoRA": {"use_peft": True, "load_in_4bit": True},
}
ENGINES = {"transformers": {}, "vLLM": {"use_vllm": True}}
DEFAULTS = {
    "dtype": "bfloat16",
    "bnb_4bit_quant_storage": "bfloat16",
    "use_cpu": False,
    "use_peft": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
}
RECIPES = {"sft": "SFT", "grpo": "GRPO", "distill": "distillation"}
Files = Mapping[str, Receipt]
Show = Callable[[Files, list[str]], str]  # of a cell's receipts, and of why it is refused


def matrix(receipts: Files, show: Show) -> list[str]:
    """Return the lines of a table whose cells `show` writes."""
    lines = [f"| | {' | '.join(LAYOUTS.values())} |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for method, settings in METHODS.items():
        for engine, served in ENGINES.items():
            cells = []
            for layout in LAYOUTS:
                asked = {"use_vllm": False} | DEFAULTS | settings | served
                where = (method, engine, layout)
                found = {name: one for name, one in receipts.items() if place(one) == where}
                cells.append(show(found, list(refusals(asked, Layout(layout, 8)))))
            lines.append(f"| {method}, {engine} | {' | '.join(cells)} |")
    return lines


def place(receipt: Receipt) -> tuple[str, str, str] | None:
    """Return the cell of a receipt: method, engine and layout; None when it trains nothing."""
    cell = receipt.cell
    return (cell.method, cell.engine, cell.layout) if cell else None


def hardware(receipt: Receipt) -> str:
    """Return the short name of what a receipt was run on: CPU, H100."""
    name = receipt.hardware
    return name.split()[1] if name.startswith("NVIDIA") else "CPU"


def linked(reasons: list[str]) -> Show:
    """Return what writes a cell with links; reasons of refusals are collected in a list."""

    def show(receipts: Files, refused: list[str]) -> str:
        if refused:
            reasons.extend(reason for reason in refused if reason not in reasons)
            return f"refused ({', '.join(str(reasons.index(reason) + 1) for reason in refused)})"
        parts = []
        for recipe, title in RECIPES.items():
            links = [
                f"[{hardware(one)}](../benchmarks/receipts/{name})"
                for name, one in receipts.items()
                if one.cell and one.cell.recipe == recipe
            ]
            parts += [f"{title} {', '.join(links)}"] if links else []
        return "; ".join(parts) or "not run"

    return show


def short(receipts: Files, refused: list[str]) -> str:
    """Return a cell that names the hardware alone."""
    names = ", ".join(sorted({hardware(one) for one in receipts.values()}, reverse=True))
    return "refused" if refused else names or "not run"


def long_text(receipts: Files) -> str:
    """Return what docs/distributed.md contains: the matrix, the refusals, and every receipt."""
    reasons: list[str] = []
    lines = [*matrix(receipts, linked(reasons)), ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    lines += ["", "| receipt | date | hardware | steps | tokens/s | last loss |"]
    lines.append("|---|---|---|--:|--:|--:|")
    for name, one in receipts.items():
        numbers = (figure(one.steps, "d"), figure(one.tokens_per_second, ".0f"), figure(one.loss))
        link = f"[{Path(name).stem}](../benchmarks/receipts/{name})"
        lines.append(f"| {link} | {one.date} | {one.hardware} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def figure(value: float | None, digits: str = ".4f") -> str:
    return "–" if value is None else format(value, digits)


def short_text(receipts: Files) -> str:
    """Return what README.md contains: the matrix without links."""
    return "\n".join(matrix(receipts, short)) + "\n"


PAGES: dict[str, Callable[[Files], str]] = {
    "docs/distributed.md": long_text,
    "README.md": short_text,
}


def filled(page: str, text: str) -> str:
    """Return the text of a page with its table replaced."""
    begin, end = BEGIN.format("matrix"), END.format("matrix")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        raise SystemExit(f"{page} has no place for the table: {begin.strip()} and {end}")
    return f"{before}{begin}{PAGES[page](read_receipts())}{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="Put the tables into their pages.")
    args = parser.parse_args()
    for page, table in PAGES.items():
        path = Path(ROOT / page)
        if args.write:
            path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            print(table(read_receipts()))


if __name__ == "__main__":
    main()
