"""Verify: what was exported passes anywhere, and each forgery is found by the right check."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import finished as runs
import pytest

from chainforge.core.artifacts import MANIFEST, read_json, write_json
from chainforge.core.errors import InputError
from chainforge.core.transcript import write
from chainforge.data.metrics import summarize
from chainforge.data.sources import example
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.rollouts import score_samples
from chainforge.hub.cards import measurements, results_section
from chainforge.hub.export import export
from chainforge.hub.lineage import lineage
from chainforge.hub.verify import verify

ROOT = Path(__file__).parents[2]
SUMS = {"fn": "reasoning_gym", "params": {"dataset": "chain_sum"}, "split": "test", "size": 12}
OWN = {"fn": "jsonl", "params": {"path": "/home/me/own.jsonl"}, "split": "test", "size": 4}
RIGHT = {"base": 2, "cold": 5, "rl": 9}  # of the rows, by model
SEED, PRIVATE = 42, "/home/me/secret-project"


def evaluate(folder, models, rows, task):
    """An evaluation of models that are right on so many of the rows, twice each."""
    samples = []
    for name in models:
        for place, row in enumerate(rows):
            for number in range(2):
                right = place < RIGHT[name] + number
                text = write("so", row["answer"] if right else "no idea")
                one = row | {"completion": text, "sample": number, "model": name, "tokens": 9}
                samples.append(one | {"finish_reason": "stop", "source_file": f"{PRIVATE}/x"})
    samples = score_samples(samples, "r1-cold-start")
    pairs = [("cold", "rl"), ("base", "rl")] if len(models) > 1 else []
    results = results_of(samples, models, pairs)
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64, "num_samples": 2}
    results["settings"] = {"seed": SEED, "tasks": [task], "transcript": "r1-cold-start"}
    results["settings"] |= {"system_prompt": "", "language": "en", "sampling": sampling}
    given = {"seed": SEED, "tasks": [task], "temperature": 1, "system_prompt": ""}
    given |= {"pairs": [":".join(pair) for pair in pairs]} if pairs else {}
    files = {"results.json": results, "samples.jsonl": samples}
    runs.stage(folder, "evaluate", measured=models, given=given, files=files)


def results_of(samples, models, pairs, seed=SEED):
    by_model = {name: [row for row in samples if row["model"] == name] for name in models}
    return summarize(by_model, pairs, seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two stages from a base, measured on sums and on rows of one's own."""
    folder = tmp_path_factory.mktemp("made")
    base = runs.base(folder / "base")
    given = {"seed": SEED, "teacher": "openai", "base_url": "http://gpu-of-mine:8000/v1"}
    traces = runs.stage(folder / "run/traces", "collect", given=given)
    cold = runs.stage(folder / "run/cold", "sft", model=base, data=[traces], given={"seed": SEED})
    runs.stage(folder / "run/rl", "grpo", model=cold / "model", given={"seed": SEED})
    models = {"base": base, "cold": cold / "model", "rl": folder / "run/rl/model"}
    evaluate(
        folder / "run/scores",
        models,
        load_examples(TaskArgs([SUMS], system_prompt=""), seed=SEED),
        SUMS,
    )
    turns = [[{"role": "user", "content": f"What is {n} + {n}?"}] for n in range(4)]
    rows = [example(one, str(2 * n), task="own") for n, one in enumerate(turns)]
    evaluate(folder / "run/own", {"rl": models["rl"]}, rows, OWN)
    export(folder / "run/rl", str(folder / "published"))
    return folder / "published"


@pytest.fixture
def published(made, tmp_path):
    """What was exported, to be forged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def failed(folder):
    """Return what each failed check says."""
    return {one.name: "\n".join(one.faults) for one in verify(str(folder)) if one.faults}


def sign(folder, evaluation=True):
    """Make all hashes fit again, as a forger would who knows the format."""
    if evaluation:
        for stage in (folder / "evidence/scores", folder / "evidence/own"):
            manifest = read_json(stage / MANIFEST)
            for name in ("results.json", "samples.jsonl.gz"):
                manifest["outputs"][name] = hashlib.sha256((stage / name).read_bytes()).hexdigest()
            write_json(stage / MANIFEST, manifest)
    stated = read_json(folder / "evidence/files.json")
    files = [one for one in folder.rglob("*") if one.is_file() and one.name != "files.json"]
    hashes = {one: hashlib.sha256(one.read_bytes()).hexdigest() for one in files}
    stated["files"] = {one.relative_to(folder).as_posix(): value for one, value in hashes.items()}
    write_json(folder / "evidence/files.json", stated)


def edit_json(path, change):
    value = read_json(path)
    change(value)
    write_json(path, value)


def edit_samples(folder, change, evaluation="scores"):
    path = folder / f"evidence/{evaluation}/samples.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows = change(rows)
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    return rows


def consistent(folder, rows):
    """Write results and card that fit the forged samples, as a careful forger would."""
    path = folder / "evidence/scores/results.json"
    stated = read_json(path)
    pairs = [(pair["from"], pair["to"]) for pair in stated["pairs"]]
    write_json(path, stated | results_of(rows, RIGHT, pairs))
    sign(folder)
    card = folder / "README.md"
    before, _, after = card.read_text().partition("## Results\n")
    new = results_section(measurements(lineage(folder / "evidence/rl")))
    after = after[after.index("\n## ") :]
    card.write_text(f"{before}## Results\n\n{new}\n{after}")
    sign(folder)


def chainforge(*argv, folder):
    """Run the command line where torch cannot be imported."""
    code = "from chainforge import cli; cli.main()"
    (folder / "no/torch").mkdir(parents=True, exist_ok=True)
    (folder / "no/torch/__init__.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": f"{folder}/no:{ROOT}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=folder, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip


def test_what_was_exported_passes_in_another_folder_without_torch(published, tmp_path):
    done = chainforge("verify", "copy", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split("  ")[:2] for line in done.stdout.splitlines()] == [
        ["passed", name]
        for name in ("files", "lineage", "samples of own", "results of own", "samples of scores",
                     "results of scores", "card")
    ]  # fmt: skip
    assert "3 stages, from base; not checked, for private settings: traces, own" in done.stdout
    (published / "notes.txt").touch()
    done = chainforge("verify", "copy", "--json", folder=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["faults"] == ["notes.txt was added"]
    done = chainforge("verify", "nowhere", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such folder" in done.stderr


def test_nothing_of_the_publishers_machine_is_in_the_evidence(made):
    texts = [path.read_text() for path in made.rglob("*.json")]
    texts += [gzip.decompress(path.read_bytes()).decode() for path in made.rglob("*.gz")]
    words = (PRIVATE, "/home/me", str(made.parent), "gpu-of-mine", "source_file")
    assert not [word for word in words for text in texts if word in text]


def test_a_secret_in_a_sample_stops_the_export(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "What is 3 + 3")
    with pytest.raises(InputError, match="samples.jsonl.gz holds the value of MY_API_KEY"):
        export(made.parent / "run/rl", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def weights(folder):
    (folder / "model.safetensors").write_bytes(b"other weights")


def accuracy(value, name="rl"):
    model = next(model for model in value["models"] if model["name"] == name)
    model["strict"]["mean"] = 0.99


def card(folder, old="| **`rl`** | 75.0", new="| **`rl`** | 99.0"):
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new))


def of(value, *keys):
    for key in keys[:-2]:
        value = value[key]
    value[keys[-2]] = keys[-1]


RESULTS = "evidence/scores/results.json"
FORGERIES = {
    "a weight": (weights, "files", "model.safetensors was changed: it is not what rl signed"),
    "an accuracy in the card": (card, "card", "99.0"),
    "an accuracy in the results": (
        lambda f: edit_json(f / RESULTS, accuracy), "results of scores", "strict of rl"),
    "a p-value": (
        lambda f: edit_json(f / RESULTS, lambda v: of(v, "pairs", 1, "p", 1e-9)),
        "results of scores", "p of base to rl"),
    "an interval": (
        lambda f: edit_json(f / RESULTS, lambda v: of(v, "pairs", 0, "low", 0.2)),
        "results of scores", "low of cold to rl"),
    "a temperature": (
        lambda f: edit_json(f / RESULTS, lambda v: of(v, "settings", "sampling", "temperature", 0)),
        "samples of scores", "temperature of the settings"),
    "a comparison that is left out": (
        lambda f: edit_json(f / RESULTS, lambda v: v["pairs"].pop()),
        "results of scores", "p of base to rl"),
    "wrong samples that are left out": (
        lambda f: edit_samples(f, lambda rows: [r for r in rows if r["correct"] or r["model"] != "rl"]),
        "samples of scores", "rl: 5 samples are missing"),
    "right samples twice": (
        lambda f: edit_samples(f, lambda rows: rows + [r for r in rows if r["correct"]]),
        "samples of scores", "is there twice"),
    "samples beyond those asked for": (
        lambda f: edit_samples(f, lambda rows: rows + [r | {"sample": 2} for r in rows[-2:]]),
        "samples of scores", "was not asked for"),
    "a completion": (
        lambda f: edit_samples(f, lambda rows: [*rows[:-1], rows[-1] | {"completion": rows[0]["completion"]}]),
        "samples of scores", "extracted of row"),
    "a score": (
        lambda f: edit_samples(f, lambda rows: [*rows[:-1], rows[-1] | {"correct": True}]),
        "samples of scores", "is True, should be False"),
    "a gold answer": (
        lambda f: edit_samples(f, lambda rows: [r | {"answer": "no idea"} for r in rows]),
        "samples of scores", "answer of row"),
    "a verifier": (
        lambda f: edit_samples(f, lambda rows: [r | {"verifier": "exact"} for r in rows]),
        "samples of scores", "verifier of row"),
    "a base of the lineage": (
        lambda f: edit_json(f / "evidence/cold/manifest.json", lambda v: of(v, "inputs", "model", "hub:me/big")),
        "lineage", "cold: its settings, seed, base or data were changed"),
    "an input of the last stage": (
        lambda f: edit_json(f / "evidence/rl/manifest.json", lambda v: of(v, "inputs", "model", "hub:me/big")),
        "lineage", "rl: its settings, seed, base or data were changed"),
    "a seed": (
        lambda f: edit_json(f / "evidence/rl/manifest.json", lambda v: of(v, "given", "seed", 7)),
        "lineage", "rl: its seed was changed"),
    "the evaluation's seed": (
        lambda f: edit_json(f / RESULTS, lambda v: of(v, "settings", "seed", 7)),
        "samples of scores", "seed of the settings: 7, its manifest 42"),
    "the seed in the card": (lambda f: card(f, "Seed 42.", "Seed 7."), "card", "seed 42"),
    "a file that is added": (lambda f: (f / "extra.bin").touch(), "files", "extra.bin was added"),
    "a file that is missing": (
        lambda f: (f / "tokenizer.json").unlink(), "files", "tokenizer.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_fails_the_right_check_also_where_all_hashes_fit(name, published):
    forge, check, words = FORGERIES[name]
    forge(published)
    if not name.startswith("a file"):
        sign(published)
    said = failed(published)
    assert words in said[check]
    assert "Error(" not in "".join(said.values())


def test_hashes_alone_find_what_the_forger_did_not_sign(published):
    weights(published)
    card(published, "Limits", "No limits")
    said = failed(published)
    assert said.keys() == {"files"}
    assert {"README.md was changed", "model.safetensors was changed"} == {
        *said["files"].split("\n")
    }


def test_accuracies_that_are_edited_everywhere_are_not_those_of_the_samples(published):
    edit_json(published / RESULTS, accuracy)
    card(published)
    sign(published)
    assert {"results of scores", "card"} == failed(published).keys()


def test_rows_that_are_left_out_or_added_for_all_models_are_not_those_of_the_task(published):
    first = edit_samples(published, lambda rows: rows)[0]["id"]
    rows = edit_samples(published, lambda rows: [row for row in rows if row["id"] != first])
    consistent(published, rows)
    said = failed(published)
    assert said.keys() == {"samples of scores"}
    assert (
        "11 rows, and 12 were asked for\nbase: 2 samples are missing" in said["samples of scores"]
    )
    other = example([{"role": "user", "content": "What is 1 + 1?"}], "2", task="chain_sum")
    rows = edit_samples(published, lambda rows: [*rows, *(
        rows[0] | other | {"sample": n, "model": m} for n in range(2) for m in RIGHT
    )])  # fmt: skip
    consistent(published, rows)
    said = failed(published)
    assert f"rl: row {other['id']} of chain_sum was not asked for" in said["samples of scores"]


def test_the_prompt_of_a_row_is_that_of_its_id_where_it_cannot_be_made_again(published):
    turns = [{"role": "user", "content": "What is 1 + 1?"}]
    edit_samples(published, lambda rows: [row | {"prompt": turns} for row in rows], "own")
    edit_samples(published, lambda rows: [*rows[:-1], rows[-1] | {"answer": "0"}])
    sign(published)
    said = failed(published)
    assert "its id is not that of its prompt" in said["samples of own"]
    assert "answer of row" in said["samples of scores"]


def test_what_no_check_can_find(published):
    """A forger who invents all answers and rewrites every file leaves no contradiction."""
    right = {}

    def invent(rows):
        right.update({row["id"]: row["completion"] for row in rows if row["correct"]})
        rows = [row | {"completion": right.get(row["id"], row["completion"])} for row in rows]
        return score_samples(rows, "r1-cold-start")

    rows = edit_samples(published, invent)
    consistent(published, rows)
    assert failed(published) == {}


def test_an_adapters_base_is_that_of_the_lineage(tmp_path, hub):
    """On the Hub, from which it is downloaded again; old evidence is not left there."""
    config = {"base_model_name_or_path": "me/small"}
    run = runs.stage(tmp_path / "run/cold", "sft", model="me/small", parts=("adapter",),
                     adapter_config=config)  # fmt: skip
    export(run, "me/adapter", public=True)
    assert failed("me/adapter") == {}
    files = hub.files("me/adapter")
    files["evidence/old/manifest.json"] = b"{}"
    hub.repositories["models", "me/adapter"].commits += 1
    assert failed("me/adapter") == {"files": "evidence/old/manifest.json was added"}
    export(run, "me/adapter", public=True)
    assert "evidence/old/manifest.json" not in files
    assert failed("me/adapter") == {}
    export(run, str(tmp_path / "out"))
    for name in ("adapter_config.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        (tmp_path / "out" / name).write_text(text.replace("me/small", "me/large"))
        sign(tmp_path / "out", evaluation=False)
        assert "its base was changed: " in failed(tmp_path / "out")["lineage"]
    with pytest.raises(InputError, match="me/nothing cannot be downloaded"):
        failed("me/nothing")


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def settings(**changed):
    def change(value):
        value["settings"] |= changed

    return lambda folder: edit_json(folder / RESULTS, change)


DEEP = b"[" * 100_000
SAMPLES = "evidence/scores/samples.jsonl.gz"
HOSTILE = {
    "a link that leaves": lambda f: (f / "extra.json").symlink_to("/etc/passwd"),
    "a folder that leaves": lambda f: (f / "extra").symlink_to("/etc"),
    "a link to itself": lambda f: (f / "extra").symlink_to("extra"),
    "a pipe": lambda f: os.mkfifo(f / "evidence/pipe.json"),
    "a huge text": lambda f: os.truncate(f / "README.md", 2**40),
    "no list": lambda f: (f / "evidence/files.json").unlink(),
    "a list of numbers": text("evidence/files.json", b"[1]"),
    "a deep list": text("evidence/files.json", DEEP),
    "names outside": lambda f: edit_json(
        f / "evidence/files.json", lambda v: v["files"].update({"../../etc/passwd": "0", "/a": "0"})),
    "a stage outside": lambda f: edit_json(
        f / "evidence/files.json", lambda v: of(v, "stage", "../../copy/evidence/rl")),
    "a stage of numbers": text("evidence/rl/manifest.json", b'{"recipe": 1}'),
    "an odd role": lambda f: edit_json(
        f / "evidence/rl/manifest.json", lambda v: of(v, "inputs", "data.x", "0")),
    "a circle": lambda f: edit_json(
        f / "evidence/cold/manifest.json",
        lambda v: of(v, "inputs", "model", read_json(f / "evidence/rl/manifest.json")["fingerprint"])),
    "no card": lambda f: (f / "README.md").unlink(),
    "a card that is no text": text("README.md", b"\xff---\n{{[\n---\n## Results\n"),
    "results of texts": text(RESULTS, b'{"models": ["x"], "pairs": 3}'),
    "results that are not a number": text(RESULTS, b'{"models": NaN, "pairs": []}'),
    "no settings": lambda f: edit_json(f / RESULTS, lambda v: v.pop("settings")),
    "odd samples a row": settings(sampling={"num_samples": "x"}),
    "countless samples a row": settings(sampling={"num_samples": 10**15}),
    "an unknown transcript": settings(transcript="x"),
    "tasks of code": settings(tasks=[{"fn": "evil.py:rows", "size": 12}]),
    "tasks that are refused": settings(tasks=[SUMS | {"params": {"dataset": "x"}}]),
    "no gzip": text(SAMPLES, b"x"),
    "half a gzip": text(SAMPLES, gzip.compress(b"{}" * 999)[:-9]),
    "a bomb": text(SAMPLES, gzip.compress(b"0" * 10**8)),
    "samples that are no objects": text(SAMPLES, gzip.compress(b"null\n")),
    "samples that are too deep": text(SAMPLES, gzip.compress(DEEP)),
    "samples that are no text": text(SAMPLES, gzip.compress(b"\xff\n")),
    "numbers for names": lambda f: edit_samples(f, lambda rows: [r | {"id": 1} for r in rows]),
    "half characters": lambda f: edit_samples(f, lambda rows: [r | {"id": "\ud800"} for r in rows]),
    "broken entries": lambda f: edit_samples(f, lambda rows: [r | {"entry": "{}"} for r in rows]),
    "unknown verifiers": lambda f: edit_samples(f, lambda rows: [r | {"verifier": "x"} for r in rows]),
    "models that were not measured": lambda f: edit_samples(
        f, lambda rows: [r | {"model": "\x1b[2J"} for r in rows]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_a_failed_check_or_one_message(name, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w')\ndef rows(): return []\n")
    HOSTILE[name](published)
    with pytest.raises((InputError, AssertionError), match=r"\w"):
        assert not failed(published)
    assert not Path("ran").exists()


def test_answers_that_attack_the_verifier_do_not_hang_it(published):
    """They are scored in the pool: the verdict is no, whatever the sample says."""
    tower = write("so", "$" + "9^{" * 8 + "9" + "}" * 8 + "$")
    edit_samples(published, lambda rows: [r | {"completion": tower} for r in rows], "own")
    sign(published)
    assert "should be" in failed(published)["samples of own"]


def test_the_terminal_gets_no_control_characters(published, tmp_path):
    (published / "\x1b[2J\n").touch()
    done = chainforge("verify", "copy", folder=tmp_path)
    assert done.returncode == 1
    assert "[2J  was added" in done.stdout
    assert "\x1b" not in done.stdout
