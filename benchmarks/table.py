"""Make the table of all benchmarks from their result files.

    python benchmarks/table.py                   # print it
    python benchmarks/table.py --write           # put it into benchmarks/README.md, and that of
                                                 # the quickstart's stages into docs/evaluation.md
    python benchmarks/table.py --results bench   # of `make bench`

A mark is `met`, `not met`, or `not measured` where a result file is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import ROOT, results, stored

from chainforge.report.formatting import HOURLY

README, EVALUATION = ROOT / "benchmarks/README.md", ROOT / "docs/evaluation.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
Verdict = tuple[str, bool | None]  # what was measured, and whether that is enough


@dataclass(frozen=True)
class Row:
    """A line of the table: which result it reads, what it is held against, how it is judged."""

    name: str
    what: str
    peer: str
    limit: str
    file: str
    judge: Callable[[Any], Verdict]


def overhead(found: Any) -> Verdict:
    """Wall time within 2 % of the raw script's, memory too, and the same weights."""
    parts, met = [], True
    for kind, stage in found["stages"].items():
        clock, peak = (stage["ratio"][name]["median"] for name in ("seconds", "peak_bytes"))
        same = "weights equal" if stage["bit_equal"] else "weights differ"
        parts.append(f"{kind} {clock:.3f} of the time, {peak:.3f} of the memory, {same}")
        met = met and max(clock, peak) <= found["limit"] and stage["bit_equal"]
    return f"{'; '.join(parts)} (n={found['runs']})", met


def many_rows(found: Any) -> Verdict:
    """The peak memory of SFT on many rows, and the same weights."""
    clock, peak = (found["ratio"][name]["median"] for name in ("seconds", "peak_bytes"))
    words = f"{found['rows']:,} rows: {peak:.3f} of the memory, {clock:.2f} of the time"
    met = peak <= found["limit"] and found["bit_equal"]
    enough = found["rows"] >= 1_000_000  # of fewer the libraries take more than the rows
    return f"{words} (n={found['runs']})", met if enough else None


def rollouts(found: Any) -> Verdict:
    """Wall time of the RL stages with ChainForge's rollouts, as a share of the raw scripts'."""
    clocks = {kind: one["ratio"]["seconds"]["median"] for kind, one in found["stages"].items()}
    peaks = [one["ratio"]["peak_bytes"]["median"] for one in found["stages"].values()]
    words = ", ".join(
        f"{kind} {clock:.2f} (n={len(found['stages'][kind]['each']['ours'])})"
        for kind, clock in clocks.items()
    )
    met = all(
        clock <= (0.75 if kind == "smollm2" else found["limit"]) for kind, clock in clocks.items()
    )
    return f"{words} of the time, {max(peaks):.2f} of the memory at most", met


def rejection(found: Any) -> Verdict:
    """Ten times the naive loop at the best batch, and never below plain batches."""
    cases = found["speed"]
    rates = {(c["side"], c["batch_size"], c["samples"]): c["accepted_per_second"]["median"]
             for c in cases}  # fmt: skip
    [naive] = [rate for (side, _, _), rate in rates.items() if side == "naive loop"]
    plain = {key[1:]: rate for key, rate in rates.items() if key[0] == "plain batches"}
    ours = {key[1:]: rate for key, rate in rates.items() if key[0] == "ours"}
    least = min(ours[key] / plain[key] for key in plain)
    best = max(ours.values())
    words = f"{best:.0f} rows/s, {best / naive:.1f}x the loop; {least:.2f}x plain at the least"
    return words, best >= 10 * naive and least >= 1


def rewards(found: Any) -> Verdict:
    """The targets that the result carries, and no unexplained difference in verdicts."""
    reached, unexplained = found["ratio"], [
        one for one in found["verdicts"]["differences"] if not one["reason"]
    ]  # fmt: skip
    words = f"clean {reached['clean']:.1f}x, hostile {reached['hostile']:.0f}x; "
    words += f"{found['verdicts']['same']} of {found['rows']} verdicts the same"
    met = all(reached[name] >= least for name, least in found["targets"].items())
    return words, met and not unexplained


def startup(found: Any) -> Verdict:
    """Every command of ours under the limit; the first step no later than the raw script's."""
    seconds = {name: one["seconds"]["median"] for name, one in found["commands"].items()}
    trl = seconds.pop("trl --help")
    slowest = max(seconds, key=lambda name: seconds[name])
    words = f"slowest: {slowest} {seconds[slowest]:.2f} s (trl --help {trl:.2f} s)"
    met = seconds[slowest] < found["limit"]
    for kind, one in found["first_step"].items():
        words += f"; first step of {kind} {one['ratio']['median']:.3f} of raw"
        met = met and one["ratio"]["median"] <= 1.02
    return words, met if found["first_step"] else None


def pipeline(found: Any) -> Verdict:
    """No slower than the scripts, and ten minutes at most."""
    ratio, whole = found["ratio"]["median"], found["whole_seconds"]["median"]
    words = f"{whole:.0f} s, {ratio:.3f} of the scripts' time (n={found['runs']})"
    return words, ratio <= 1 and whole <= found["limit_seconds"]


def collector(found: Any) -> Verdict:
    """A share of the rate of a client that was told the limit."""
    return f"{100 * found['ratio_of_medians']:.0f} %", found["ratio_of_medians"] >= 0.85


def builder(found: Any) -> Verdict:
    """Five times the peer, within 4 GB."""
    ratio = found["peer"]["seconds_extrapolated"] / found["seconds"]["median"]
    peak = found["peak_bytes"]["median"]
    words = f"{found['rows']:,} rows in {found['seconds']['median']:.0f} s, {ratio:.1f}x; "
    return f"{words}{peak / 1e9:.1f} GB", ratio >= 5 and peak <= found["limits"]["bytes"]


def lost(found: Any) -> Verdict:
    """Fewer steps than a save interval are done twice, and no row that was on disk."""
    parts, met = [], True
    for kind, one in found["training"].items():
        twice = one["done_twice"]
        words = f"{kind} {max(twice['ours'])} of {one['save_steps']} steps at most"
        parts.append(words + (f" (TRL: {max(twice['raw'])})" if "raw" in twice else ""))
        met = met and max(twice["ours"]) <= one["save_steps"]
    for kind, one in found["data"].items():
        parts.append(f"{kind} {max(one['made_again'])} rows")
        met = met and max(one["made_again"]) == 0
    return "; ".join(parts), met


def evaluation(found: Any) -> Verdict:
    """At most half of lm_eval's time for the same accuracy."""
    ratio, (name, share) = found["ratio"], next(iter(found["accuracy"]["ours"].items()))
    words = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) of the time"
    same = "the same" if found["equal"] else "another"
    words += f", {same} accuracy ({name}: {100 * share:.1f} %; n={found['runs']})"
    return words, ratio["median"] <= found["limit"] and found["equal"]


def memory(found: Any) -> Verdict:
    """The worst case of the estimate against what was measured."""
    off = {name: abs(case["ratio"] - 1) for name, case in found["cases"].items()}
    worst = max(off, key=lambda name: off[name])
    words = f"{len(off)} cases on {found['hardware']}, the worst ({worst}) off by "
    return f"{words}{100 * off[worst]:.0f} %", off[worst] <= 0.15


def busy(found: Any) -> Verdict:
    """The time of a stage beside a loop on each core, and quiet, as a share of the default's."""
    parts, met = [], True
    for load, sides in found["loads"].items():
        one = sides["bounded"]
        parts.append(f"{load} {one['ratio']:.3f} of the time (n={one['n']})")
        met = met and one["ratio"] <= found["limits"][load]
    return "; ".join(parts), met and found["bit_equal"]


def own(found: Any) -> Verdict:
    """What a result says of itself, as `row`: its words and whether they are enough."""
    return str(found["row"]["measured"]), found["row"]["met"]


ROWS = (
    Row("P1", "an SFT and a GRPO stage: wall time, peak memory", "raw TRL scripts",
        "1.00 ± 0.02, weights equal bit by bit", "overhead", overhead),
    Row("P1b", "SFT on a million rows: peak memory to the third step", "raw TRL script",
        "1.2, weights equal bit by bit", "many_rows", many_rows),
    Row("P2", "rejection sampling: accepted rows per second", "one prompt at a time; plain batches",
        "10x the loop, never below batches", "rejection_sampling", rejection),
    Row("P3", "rewards: completions scored per second", "TRL's accuracy_reward",
        "clean 5x, hostile 50x, the same verdicts but listed ones", "rewards", rewards),
    Row("P4", "start-up: commands; first step of a stage", "trl --help; raw TRL scripts",
        "under 0.3 s; no slower", "startup", startup),
    Row("P5", "the whole quickstart on two cores", "the same stages as scripts",
        "no slower, 10 minutes at most", "pipeline", pipeline),
    Row("P6", "collector: rows per second from a server with a limit", "a client told the limit",
        "85 %", "collector", collector),
    Row("P7", "builder: filter, deduplicate, select", "a pass with datasketch",
        "5x, within 4 GiB", "builder", builder),
    Row("P8", "done twice after a SIGKILL", "TRL's default save settings",
        "one save interval; 0 rows", "lost_work", lost),
    Row("P9", "tokens to the best accuracy that plain GRPO comes to", "plain GRPO",
        "1.3x fewer", "sample_efficiency", own),
    Row("P10", "RL stages of the quickstart, and a step of SmolLM2-135M: wall time",
        "raw TRL scripts", "0.65; SmolLM2 0.75", "rollouts", rollouts),
    Row("P11", "greedy evaluation of 600 held-out rows: wall time",
        "lm-evaluation-harness (hf)", "0.5, the same accuracy", "evaluation", evaluation),
    Row("P12", "a stage on the CPU with its bounded spin, beside a loop on each core",
        "OpenMP's default", "0.5; quiet 1.01", "busy", busy),
    Row("G1", "GPU: GRPO step time, tokens/s", "raw TRL defaults",
        "the recipe's settings are the fastest found", "gpu_grpo", own),
    Row("G2", "GPU: SFT tokens/s", "raw TRL defaults", "as G1, at equal loss", "gpu_sft", own),
    Row("G3", "memory estimate against the measured peak", "–", "within 15 %", "memory", memory),
)  # fmt: skip


def table(folder: Path | None = None) -> str:
    """Return the table as Markdown."""
    lines = ["| | what | peer | limit | measured | |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        found = stored(row.file, folder)
        words, met = row.judge(found) if found else (f"`{row.file}.json` is not there", None)
        mark = "not measured" if met is None else "**met**" if met else "not met"
        lines.append(f"| {row.name} | {row.what} | {row.peer} | {row.limit} | {words} | {mark} |")
    return "\n".join(lines)


def ablation(folder: Path | None = None) -> str:
    """Return what the stages of the quickstart are worth, as Markdown; nothing if not measured."""
    found = stored("ablation", folder)
    if not found:
        return ""
    lines = [f"| | strict % | {' | '.join([*HOURLY][1:])} |", "|---|" + "--:|" * len(HOURLY)]
    pairs = {pair["from"]: [*(write(pair) for write in HOURLY.values())] for pair in found["pairs"]}
    for model in found["models"]:
        cells = pairs.get(model["name"], [""] * len(HOURLY))[1:]
        accuracy = f"{100 * model['strict']['mean']:.1f}"
        lines.append(f"| {' | '.join([model['name'], accuracy, *cells])} |")
    reasons = [f"{name}: {why}" for name, why in found.get("failed", {}).items()]
    return "\n\n".join(["\n".join(lines), *reasons])


def put(file: Path, made: str) -> None:
    """Put a table where its file has the marks."""
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Print the table, or put it where it stands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, help="folder of the results")
    parser.add_argument("--write", action="store_true", help="put it into its page")
    args = parser.parse_args()
    made = table(args.results or results())
    print(made)
    if args.write:
        put(README, made)
        put(EVALUATION, ablation(args.results or results()))


if __name__ == "__main__":
    main()
