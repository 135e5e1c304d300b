"""Check a published model by the evidence beside it: `chainforge verify`.

Nothing in the folder is trusted. Answers are scored in the verifier pool, and rows are made again
in a process that is confined in the same way. Whatever else the folder provokes fails a check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from chainforge.core.artifacts import MANIFEST, canonical, digest, read_json, sha256, shaped
from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row
from chainforge.core.run_dir import SETTINGS, STATED, read_results
from chainforge.data.metrics import summarize
from chainforge.data.sources import example
from chainforge.data.tasks import load_confined
from chainforge.generate.rollouts import score_samples
from chainforge.hub.cards import head_of, measurements, results_section
from chainforge.hub.evidence import EVIDENCE, FILES, RESULTS, SAMPLES, read_folder, read_samples
from chainforge.hub.export import ADAPTER, CARD, CONFIG
from chainforge.hub.lineage import Ancestor, base_of, finished_in, lineage

QUESTION = ("prompt", "task", "answer", "verifier", "entry")


class Check(NamedTuple):
    """A check, what it looked at ("" where it could not), and what is wrong with that."""

    name: str
    looked_at: str
    faults: list[str]


def verify(reference: str) -> Iterator[Check]:
    """Yield the checks of what `export` filled; `InputError` for what is not safe to read."""
    folder = _Folder(reference)
    parts = [("files", folder.check_files), ("lineage", folder.check_lineage)]
    parts += [(one.name, partial(folder.check_evaluation, one)) for one in folder.evaluations]
    for name, part in [*parts, ("card", folder.check_card)]:
        try:
            yield from part()
        except Exception as error:  # a hostile folder may provoke any
            words = first_line(error) if isinstance(error, InputError) else repr(error)
            yield Check(name, "", [f"cannot be checked: {words}"])


class _Folder:
    """What `export` filled: its files, what it states, and what its samples give."""

    def __init__(self, reference: str) -> None:
        path, self.files = read_folder(reference)
        if FILES not in self.files:
            raise InputError(f"{reference}: no {FILES} to check it by; export a finished stage")
        self.stated = shaped(Path(FILES), read_json(self.files[FILES]), STATED)
        own = f"{EVIDENCE}/{self.stated['stage']}"
        if not {f"{own}/{MANIFEST}", CARD} <= self.files.keys():
            raise InputError(f"{path}: {CARD} or the manifest of its stage is missing")
        self.card = self.files[CARD].read_text(encoding="utf-8", errors="replace")
        try:
            self.stages = lineage(path / own, beside_only=True)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: its lineage cannot be read: {first_line(error)}") from None
        self.evaluations = [one for one in finished_in(path / EVIDENCE) if one.measured]
        self.results: dict[str, dict[str, Any]] = {}  # by the fingerprint of an evaluation

    def check_files(self) -> Iterator[Check]:
        """Compare the files with those that were published, and with what the stage signed."""
        stage, part, listed = self.stages[-1], f"{self.stated['what']}/", self.stated["files"]
        faults = [f"{name} was added" for name in self.files if name not in (*listed, FILES)]
        for name, hashed in listed.items():
            signed = stage.manifest.outputs.get(part + name, hashed)
            if name not in self.files:
                faults.append(f"{name} is missing")
            elif sha256(self.files[name]) != hashed:
                faults.append(f"{name} was changed")
            elif signed != hashed and name not in (CARD, CONFIG, ADAPTER):  # which export writes
                faults.append(f"{name} was changed: it is not what {stage.name} signed")
        yield Check("files", f"{len(listed):,} files", faults)

    def check_lineage(self) -> Iterator[Check]:
        """Work out each stage's fingerprint again: it has the settings and the inputs."""
        faults, every = [], (*self.stages, *self.evaluations)
        private = [one.name for one in every if "files" not in one.manifest.notes]
        for one in every:
            made = one.manifest
            content = {key: getattr(made, key) for key in ("recipe", "given", "inputs")}
            content |= {key: made.notes.get(key) for key in ("files", "code")}
            if "files" in made.notes and digest(content) != made.fingerprint:
                faults.append(f"{one.name}: its settings, seed, base or data were changed")
            if made.given.get("seed", made.seed) != made.seed:
                faults.append(f"{one.name}: its seed was changed")
        origin, names = base_of(self.stages), {head_of(self.card)[0].get("base_model")}
        if self.stated["what"] == "adapter":
            names.add(read_json(self.files[ADAPTER]).get("base_model_name_or_path"))
            continued = self.stages[-1].setting("adapter") == "continue"
            origin = None if continued else self.stages[-1].took.get("model")
        names |= {origin.name} if origin and origin.on_hub else set()
        if len(names := names - {None}) > 1:
            faults.append(f"its base was changed: {' or '.join(map(str, names))}")
        many = len(self.stages)
        words = f"{many} stage{'s' * (many != 1)}, from {origin.name if origin else 'an adapter'}"
        words += f"; not checked, for private settings: {', '.join(private)}" * bool(private)
        yield Check("lineage", words, faults)

    def check_card(self) -> Iterator[Check]:
        """Write the results in the card again from the samples, and compare."""
        stated = re.findall(r"^## Results\n(.*?)(?=^## )", self.card, re.MULTILINE | re.DOTALL)
        found = measurements(self.stages, self.results)
        wanted = results_section(found).splitlines()
        pairs = zip_longest("".join(stated).strip().splitlines(), wanted, fillvalue="")
        faults = [f"says {one!r}, but the samples {two!r}" for one, two in pairs if one != two]
        if f"Seed {(seed := self.stages[-1].manifest.seed)}." not in self.card:
            faults.append(f"does not say seed {seed}")
        unknown = [one.name for one in found if one.stage.manifest.fingerprint not in self.results]
        faults += [f"the results of {name} could not be worked out" for name in unknown]
        yield Check("card", f"{len(wanted):,} line{'s' * (len(wanted) != 1)} of results", faults)

    def check_evaluation(self, stage: Ancestor) -> Iterator[Check]:
        """Score the samples of an evaluation again, and work its results out from them."""
        names = [f"{EVIDENCE}/{stage.directory.name}/{name}" for name in (RESULTS, SAMPLES)]
        if missing := [name for name in names if name not in self.files]:
            raise InputError(f"{missing[0]} is missing")
        stated = read_results(self.files[names[0]])
        settings = shaped(Path(names[0]), stated.get("settings"), SETTINGS)
        given, used = stage.manifest.given, canonical(settings | settings["sampling"])
        odd = [key for key in given if key in used and given[key] != used[key]]
        faults = [f"{key} of the settings: {used[key]}, its manifest {given[key]}" for key in odd]
        rows = _scored(read_samples(self.files[names[1]]), [*stage.measured], settings, faults)
        yield Check(f"samples of {stage.name}", f"{sum(map(len, rows.values())):,}", faults)
        pairs = [tuple(pair.split(":", 1)) for pair in given.get("pairs") or []] or None
        found = summarize(
            rows, pairs, *(settings[one] for one in ("seed", "language", "transcript"))
        )
        self.results[stage.manifest.fingerprint] = stated | found
        faults = []
        for kind, numbers in found.items():
            for one, two in zip_longest(
                *map(_rounded, (stated.get(kind) or [], numbers)), fillvalue={}
            ):
                what = (one | two).get("name") or "{from} to {to}".format(**one | two)
                for key in [key for key in one | two if one.get(key) != two.get(key)]:
                    faults.append(f"{key} of {what}: {one.get(key)}, the samples {two.get(key)}")
        yield Check(f"results of {stage.name}", f"{len(rows)} models", faults)


def _rounded(value: Any) -> Any:
    """Return numbers to nine digits: libraries differ in the last."""
    return json.loads(json.dumps(value), parse_float=lambda text: f"{float(text):.9g}")


def _scored(
    samples: Iterable[Row], models: list[str], settings: Row, faults: list[str]
) -> dict[str, list[Row]]:
    """Return each model's samples, scored again; add to the faults what is wrong with them."""
    rows: dict[tuple[str, str, int], Row] = {}
    for row in samples:
        key = row["model"], row["id"], row["sample"]
        faults += [f"{key[0]}: sample {key[2]} of row {key[1]} is there twice"] * (key in rows)
        rows[key] = row
    examples, each = _examples(rows.values(), settings, faults), settings["sampling"]["num_samples"]
    odd = [k for k in rows if k[0] not in models or k[1] not in examples or k[2] >= each]
    for key in odd:
        faults.append(f"{key[0]}: row {key[1]} of {rows.pop(key)['task']} was not asked for")
    for name in models:
        if lacking := len(examples) * each - sum(key[0] == name for key in rows):
            faults.append(f"{name}: {lacking:,} samples are missing")
    asked = [row | examples[row["id"]] for row in rows.values()]
    found: dict[str, list[Row]] = {name: [] for name in models}
    for row, new in zip(rows.values(), score_samples(asked, settings["transcript"]), strict=True):
        new["rewards"] = row.get("rewards") or {}  # by code, or a model, that is not here
        found[new["model"]].append(new)
        for name in [name for name in row if row[name] != new[name]][:1]:
            was, now = (f"{one[name]!r:.60}" for one in (row, new))
            faults.append(f"{row['model']}: {name} of row {row['id']} is {was}, should be {now}")
    return found


def _examples(rows: Iterable[Row], settings: Row, faults: list[str]) -> dict[str, Row]:
    """Return the questions by id: reasoning-gym's made again, others as they were published."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["id"], {key: row[key] for key in QUESTION if key in row})
    for key, row in found.items():
        if example(row["prompt"], None, task=row["task"])["id"] != key:
            faults.append(f"row {key}: its id is not that of its prompt")
    tasks = settings["tasks"]
    sizes = [task.get("size") for task in tasks]
    if None not in sizes and sum(sizes) != len(found):
        faults.append(f"{len(found):,} rows, and {sum(sizes):,} were asked for")
    ours = [task for task in tasks if task.get("fn") == "reasoning_gym"]
    asked = [ours, *(settings[name] for name in ("system_prompt", "transcript", "seed"))]
    again = load_confined(json.dumps(asked)) if ours else []
    made = {row["id"]: {key: row[key] for key in QUESTION if key in row} for row in again}
    return made if len(ours) == len(tasks) else found | made
