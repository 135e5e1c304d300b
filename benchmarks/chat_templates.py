"""Make docs/chat_templates.md: what becomes of every chat template that TRL ships.

    python benchmarks/chat_templates.py           # print it
    python benchmarks/chat_templates.py --write   # put it into docs/chat_templates.md

For each template and preset of the transcript, what SFT trains on and what a policy that learnt it
samples must be the transcript itself, and be paid for format and accuracy. Where a template is
refused, the key that the message names must work.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import trl
from transformers import AutoTokenizer

from chainforge.core.errors import InputError
from chainforge.core.transcript import PRESETS, write
from chainforge.rewards.functions import accuracy_reward, format_reward
from chainforge.train.templates import CHATML, Turn, fit_template, shield

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/chat_templates.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
USER = [{"role": "user", "content": "What is 2 + 2?"}]
SYSTEM = [{"role": "system", "content": "Reason, then answer."}, *USER]
EMPTY, CHATML_KEY = '`system_prompt: ""`', "`chat_template_path: chatml`"
WORKS, WRAPPED = "works", "works, wrapped"


def fitted(base: Any, template: str, preset: str, prompt: Any) -> tuple[Any, Turn]:
    """Return a tokenizer as a model with this template has it, and how turns are written."""
    made = copy.deepcopy(base)
    made.bos_token, made.chat_template = "<|endoftext|>", template
    turn = fit_template(made, preset, "it", [prompt, USER])
    marks = re.findall(r"<[^<>\s]+>|\[/?[A-Z_]+\]", turn.end)
    made.add_special_tokens({"additional_special_tokens": marks})
    made.eos_token, made.chat_template = marks[-1], turn.template
    return made, turn


def verdict(base: Any, template: str, preset: str, prompt: Any = SYSTEM) -> str:
    """Return what becomes of a template; raise `AssertionError` for a silent mismatch."""
    try:
        made, turn = fitted(base, template, preset, prompt)
    except InputError as error:
        words = str(error)
        if EMPTY in words and prompt is SYSTEM:
            assert verdict(base, template, preset, USER) in (WORKS, WRAPPED)
            return f"refused; works with {EMPTY}"
        assert CHATML_KEY[:-1] in words, words
        assert template != CHATML
        assert verdict(base, CHATML, preset) == WORKS
        return f"refused; works with {CHATML_KEY}"
    plain = made.apply_chat_template  # what a user has for inference: nothing of ChainForge's
    shield(made, turn)
    text = write("2 + 2 is 4.", "4", preset)
    for asked in (prompt, USER):
        start = made.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert start == plain(asked, add_generation_prompt=True)["input_ids"]
        assert all(turn["content"] in made.decode(start) for turn in asked)
        answer = {"role": "assistant", "content": text}
        ids = made.apply_chat_template([*asked, answer])["input_ids"]
        assert ids[: len(start)] == start, "SFT trains after the prompt that is sampled from"
        learnt = ids[len(start) :]
        sampled = learnt[: learnt.index(made.eos_token_id)]
        said = made.decode(sampled, skip_special_tokens=True)
        assert said.strip() == text, said
        assert format_reward(said, transcript=preset) == 1
        assert accuracy_reward(said, "4", transcript=preset) == 1
    return WORKS if turn.template == template else WRAPPED


def verdicts() -> dict[str, list[str]]:
    """Return what becomes of each template, with each preset."""
    base = AutoTokenizer.from_pretrained(ROOT / "recipes/quickstart/base")
    texts = {file.stem: file.read_text(encoding="utf-8") for file in FILES}
    for text in texts.values():  # compiled once, and not in each process that tries it
        with contextlib.suppress(Exception):
            base.apply_chat_template(USER, chat_template=text)
    return {
        name: [verdict(base, text, preset) for preset in PRESETS] for name, text in texts.items()
    }


def table(found: dict[str, list[str]]) -> str:
    """Return the counts and the table as Markdown."""
    working = sum(any(one in (WORKS, WRAPPED) for one in row) for row in found.values())
    default = sum(row[0] in (WORKS, WRAPPED) for row in found.values())
    lines = [
        f"TRL {trl.__version__}: of {len(found)} chat templates {default} work with the default "
        f"transcript, {working} with some preset, and the others are refused with a key that "
        "works.",
        "",
        "| template | " + " | ".join(f"`{preset}`" for preset in PRESETS) + " |",
        "|---" * (1 + len(PRESETS)) + "|",
        *(f"| `{name}` | {' | '.join(row)} |" for name, row in found.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    made = table(verdicts())
    if parser.parse_args().write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
    else:
        print(made)


if __name__ == "__main__":
    main()
