"""The rewards: correctness, format, language, and correctness scaled by length.

Each takes the completion's text first; the other arguments are columns of the row or `params`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.transcript import DEFAULT, read
from chainforge.rewards.answers import lenient_answer
from chainforge.rewards.language import scripts_of, share
from chainforge.rewards.verify import Claim, check_verifier, verify_all


def accuracy_reward(
    completion: str,
    answer: str | None,
    verifier: str = "math",
    entry: str | dict[str, Any] | None = None,
    transcript: str = DEFAULT,
    lenient: bool = False,
    tolerance: float = 1e-6,
) -> float | None:
    """Return 1.0 for the right answer, else 0.0; None when the gold answer cannot be read.

    Only the answer part of a well-formed transcript counts: a right number in the reasoning, or in
    a second summary, earns nothing. `lenient` also looks for an answer in an ill-formed one.
    DeepSeek-R1, section 2.2.2 ("accuracy rewards").
    """
    call = dict(locals())
    return accuracy_rewards([call])[0]


def accuracy_rewards(calls: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return `[accuracy_reward(**call) for call in calls]`, verified side by side."""
    verdicts = verify_all([_claim(call) for call in calls])
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def _claim(call: Mapping[str, Any]) -> Claim:
    """Cut the answer out of a completion; an unreadable one claims the empty answer."""
    completion, form = call["completion"], call.get("transcript", DEFAULT)
    if call.get("lenient"):
        text = lenient_answer(completion, form)
    else:
        parts = read(completion, form)
        text = parts.answer if parts else None
    gold = None if call["answer"] is None else str(call["answer"])
    tolerance = call.get("tolerance", 1e-6)
    return Claim(call.get("verifier", "math"), text or "", gold, call.get("entry"), tolerance)


def format_reward(completion: str, transcript: str = DEFAULT) -> float:
    """Return 1.0 for a well-formed transcript, else 0.0 (DeepSeek-R1, section 2.2.2)."""
    return 1.0 if read(completion, transcript) else 0.0


def language_consistency_reward(
    completion: str, language: str = "en", transcript: str = DEFAULT
) -> float:
    """Return the share of words of the reasoning in the language's script, 0.0 when unreadable.

    Mathematics, code and digits do not count as words. DeepSeek-R1, section 2.3.2.
    """
    parts = read(completion, transcript)
    return share(parts.reasoning, language) if parts else 0.0


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Scale correctness by length along a cosine, as TRL's function of this name does.

    The same curve and arguments; the correctness is `accuracy_reward`'s, since TRL's runs
    math-verify in the trainer's process, where one answer can hang it, and also reads the
    reasoning. "Demystifying Long Chain-of-Thought Reasoning", appendix C.1.
    """
    if not max_len > 0:
        raise InputError(f"cosine_scaled: max_len is {max_len}, it must be positive")

    def scale(correct: float | None, length: int) -> float | None:
        if correct is None:
            return None
        # A wrong answer's bounds are swapped: a short one is penalised more, so exploring pays.
        low, high = (min_value_correct, max_value_correct)
        if not correct:
            low, high = max_value_wrong, min_value_wrong
        progress = min(length / max_len, 1.0)
        return low + 0.5 * (high - low) * (1.0 + math.cos(progress * math.pi))

    def cosine_scaled_reward(
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        answer: list[str],
        verifier: list[str] | None = None,
        entry: list[str | None] | None = None,
        transcript: str = DEFAULT,
    ) -> list[float | None]:
        calls = [
            {
                "completion": completion[0]["content"],
                "answer": answer[index],
                "verifier": (verifier[index] if verifier else None) or "math",
                "entry": entry[index] if entry else None,
                "transcript": transcript,
            }
            for index, completion in enumerate(completions)
        ]
        lengths = map(len, completion_ids)
        return [scale(*pair) for pair in zip(accuracy_rewards(calls), lengths, strict=True)]

    return cosine_scaled_reward


def _check(verifier: str = "math", language: str = "en", **params: Any) -> None:
    """Refuse an unknown verifier or language."""
    check_verifier(verifier)
    scripts_of(language)


# A `batch` attribute takes many calls at once; a `check` attribute looks at `params` when a
# configuration is read.
accuracy_reward.batch = accuracy_rewards  # type: ignore[attr-defined]
accuracy_reward.check = _check  # type: ignore[attr-defined]
language_consistency_reward.check = _check  # type: ignore[attr-defined]

BUILTINS: dict[str, str | Callable[..., Any]] = {
    "accuracy_reward": accuracy_reward,
    "format_reward": format_reward,
    "language_consistency_reward": language_consistency_reward,
    "cosine_scaled": get_cosine_scaled_reward,
    # Named, not imported: TRL brings torch.
    "soft_overlong": "trl.rewards:get_soft_overlong_punishment",
    "repetition_penalty": "trl.rewards:get_repetition_penalty_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}
