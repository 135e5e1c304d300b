"""Rewards that are a model's opinion: an LLM judge behind a server, and a reward model.

Neither needs an answer to compare with. Both see the final answer of a transcript alone unless
`part: all`, as in DeepSeek-R1's reward for helpfulness; a completion without the form has none.
What the policy wrote reaches a judge inside a JSON string, which it cannot close.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, hint, refuse_unknown
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.process import stage_directory
from chainforge.core.transcript import DEFAULT, is_blank, read
from chainforge.generate.api import LENGTH, ApiEngine, Reply
from chainforge.generate.budget import Ledger
from chainforge.generate.settings import Draw, Drawn, TeacherArgs, digest
from chainforge.generate.shards import own_file, shards_of, world_size
from chainforge.generate.teacher import CEILINGS, endpoint_of, key_of
from chainforge.rewards.reward import awaited

# The default rubric, and below it what every judge is told.
RUBRIC, INSTRUCTIONS = (
    Path(__file__).with_name("rubric.txt").read_text(encoding="utf-8").split("\n\n", 1)
)
HIGHEST = 10
_SCORE = re.compile(r"Score: (10|[0-9])")
_CLAIM = re.compile(r"^\W*score\b", re.IGNORECASE | re.MULTILINE)
# With these a text could look like a chat template's control token to the judge's tokenizer.
_CONTROL = re.compile(r"<|\[(?=/?[A-Z_]+\])")
_FILE = "judge-{}.jsonl"
_SETTINGS = (
    "model base_url temperature max_new_tokens extra_body max_concurrency timeout max_retries "
    "outage_timeout max_usd max_tokens_total max_requests prices"
)
# Kinds of failures that asking again would only buy again.
_FINAL = ("verdict", "truncated")
PARTS = ("answer", "all")


def _judged(call: Mapping[str, Any], part: str) -> str:
    """Return what of a completion is judged; empty where there is nothing to judge."""
    if part == "all":
        return str(call["completion"])
    found = read(call["completion"], call["transcript"])
    return found.answer if found else ""


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise InputError(f"part: {part!r}; {hint(str(part), PARTS)}")


class LlmJudge:
    """The verdict of a model at an OpenAI-compatible server, from 0 to 1; DeepSeek by default.

    `rubric` says what is good. Further params are those of a teacher: `model`, `base_url`,
    `max_usd` and so on. A verdict is asked for once: the stage's `judge-*.jsonl` has every request
    and verdict, by content. An answer without text gets 0 without being sent.
    """

    opinion = True

    def __init__(self, rubric: str = RUBRIC, part: str = "answer", **settings: Any) -> None:
        refuse_unknown(settings, [*_SETTINGS.split(), "rubric", "part"])
        _check_part(part)
        if not isinstance(rubric, str) or is_blank(rubric):
            raise InputError("rubric: expected the text of a rubric, or none for the default")
        own: Row = {"teacher": "openai" if settings.get("base_url") else "deepseek"}
        own |= {"temperature": 0.0, "max_new_tokens": 1024}
        if own["teacher"] == "deepseek":
            own["extra_body"] = {"thinking": {"type": "disabled"}}
        self.args = TeacherArgs(**own | settings)
        self.endpoint = replace(endpoint_of(self.args), instruction=None)
        key_of(self.args)
        self.__name__, self.part = "llm_judge", part
        self.system = f"{rubric.strip()}\n\n{INSTRUCTIONS}"
        self.scores: dict[str, float | None] = {}
        self._opened: tuple[ApiEngine, Ledger] | None = None

    def __call__(
        self, completion: str, prompt: Any, answer: str | None = None, transcript: str = DEFAULT
    ) -> float | None:
        """Return one verdict; None where the judge gave none."""
        given = {"prompt": prompt, "answer": answer, "transcript": transcript}
        value = self.batch([given | {"completion": completion}])[0]
        return None if isinstance(value, Exception) else value

    def batch(self, calls: Sequence[Mapping[str, Any]]) -> list[float | Exception]:
        """Return the verdicts, an exception where there is none; all are asked for at once.

        Raises `Stopped` for a budget that is spent, and `InputError` when no request can succeed.
        """
        engine, ledger = self._opened or self._open()
        texts = [_judged(call, self.part) for call in calls]
        draws = {
            place: self._draw(call, text)
            for place, (call, text) in enumerate(zip(calls, texts, strict=True))
            if not is_blank(text)
        }
        failed: dict[str, str] = {}

        def take(batch: list[Drawn]) -> None:
            for draw, answer in batch:
                if answer["completion"] is not None:
                    self.scores[draw.row["id"]] = answer["score"]
                else:
                    failed[draw.row["id"]] = f"{answer['class']}: {answer['message']}"
                    if answer["class"] in _FINAL:
                        self.scores[draw.row["id"]] = None

        new = {draw.row["id"]: draw for draw in draws.values()}
        if new := {key: draw for key, draw in new.items() if key not in self.scores}:
            awaited(engine.answer([*new.values()], take, ledger, engine.client()))
        values: list[float | Exception] = [0.0] * len(calls)
        for place, draw in draws.items():
            score = self.scores.get(draw.row["id"])
            why = failed.get(draw.row["id"], "the judge's reply had no verdict")
            values[place] = ValueError(why) if score is None else score / HIGHEST
        return values

    def _draw(self, call: Mapping[str, Any], text: str) -> Draw:
        """Return the request for a verdict; its id is the hash of all that decides the verdict."""
        turns = [turn for turn in call["prompt"] if turn["role"] != "system"]
        shown = {"conversation": turns, "answer": text}
        if call.get("answer"):
            shown["reference"] = call["answer"]
        said = json.dumps(shown, ensure_ascii=False).encode("utf-8", "replace").decode()
        said = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", said)
        prompt = [{"role": "system", "content": self.system}, {"role": "user", "content": said}]
        draw = Draw({"id": "", "prompt": prompt}, 0, 0)
        return Draw(draw.row | {"id": digest([prompt, self.endpoint.parameters(draw)])}, 0, 0)

    def _open(self) -> tuple[ApiEngine, Ledger]:
        """Open the ledger in the stage's directory, and read the verdicts that are in it."""
        if (folder := stage_directory.get()) is None:
            self._scratch = tempfile.TemporaryDirectory()  # of `chainforge check`
            folder = Path(self._scratch.name)
        path = folder / _FILE.format(digest([self.system, self.part, self.endpoint.model])[:8])
        for file in filter(Path.exists, (path, *shards_of(path))):
            for line in read_rows(file, torn_tail=True):
                if line.get("answer") or line.get("outcome") in _FINAL:
                    self.scores[line["key"]] = (line.get("answer") or {}).get("score")
        most = CEILINGS[self.args.teacher]
        engine = ApiEngine(self.args, self.endpoint, read_verdict, own_file(path), most)
        engine.key = lambda draw: str(draw.row["id"])
        if (processes := world_size()) > 1:  # each has its share of the budget
            engine.limits = {key: of and of / processes for key, of in engine.limits.items()}
        self._opened = engine, Ledger(engine.path, engine.limits)
        return self._opened


def read_verdict(reply: Reply) -> Row:
    """Return the score in a judge's reply, which must claim exactly one, in its last line."""
    if reply.end == LENGTH:
        raise reply.skip("truncated", "the reply reached the limit of tokens; raise max_new_tokens")
    last = reply.content.strip().rpartition("\n")[2].strip()
    found = _SCORE.fullmatch(last)
    if found is None or len(_CLAIM.findall(reply.content)) != 1:
        raise reply.skip("verdict", f"the reply does not end with one `Score: N`: {last[:80]!r}")
    return {"completion": last, "score": int(found[1])}


def with_judges(directory: Path, spending: Row | None) -> Row | None:
    """Return what a stage's judges have spent, added to what its teacher has."""
    for file in sorted(directory.glob(_FILE.format("*"))):
        with Ledger(file) as ledger:
            more = ledger.summary()
        both = [(key, (spending or {}).get(key, 0), value) for key, value in more.items()]
        spending = {key: None if None in (a, b) else a + b for key, a, b in both}
    return spending


class RewardModel:
    """The score of a sequence classifier with one label, computed as TRL computes it."""

    opinion = True

    def __init__(self, model: str, part: str = "answer") -> None:
        from transformers import AutoTokenizer

        _check_part(part)
        self.path, self.part, self.__name__ = model, part, Path(model).name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise InputError(f"no reward model here or on the Hub ({said})") from None
        if not self.tokenizer.chat_template:
            raise InputError("its tokenizer has no chat template, so it cannot read messages")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._model: Any = None
        self._at_once = 16

    def open(self) -> Any:
        """Load the model; return it."""
        import torch
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(
            self.path, num_labels=1, use_safetensors=True, dtype="auto"
        )
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def use(self, model: Any) -> None:
        """Score with a model that a trainer has opened; processes may share its weights.

        Then all of them must call it equally often: once for each batch, rows or none.
        """
        self._model, self._at_once = model, 0

    def __call__(self, completion: str, prompt: Any, transcript: str = DEFAULT) -> float:
        """Return one score."""
        given = {"completion": completion, "prompt": prompt, "transcript": transcript}
        return self.batch([given])[0]

    def batch(self, calls: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the scores of some completions."""
        import torch

        if self._model is None:
            self._model = self.open()
        texts = [self._text(call["prompt"], _judged(call, self.part)) for call in calls]
        size = self._at_once or max(len(texts), 1)
        scores: list[float] = []
        for start in range(0, max(len(texts), 1 - bool(self._at_once)), size):
            part = texts[start : start + size] or [self.tokenizer.pad_token]
            rows = self.tokenizer(text=part, return_tensors="pt", padding=True,
                                  padding_side="right", add_special_tokens=False)  # fmt: skip
            with torch.inference_mode():
                logits = self._model(**rows.to(next(self._model.parameters()).device)).logits
            scores += logits[:, 0].float().tolist()
        return scores[: len(texts)]

    def _text(self, prompt: Any, answer: str) -> str:
        # A system turn that asks for the tags would not fit to an answer without them.
        turns = [turn for turn in prompt if self.part == "all" or turn["role"] != "system"]
        turns.append({"role": "assistant", "content": answer})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
