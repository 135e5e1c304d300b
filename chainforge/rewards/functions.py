"""The rewards: correctness, format, language, and correctness scaled by length.

Each takes the completion's text first; the other arguments are columns of the row or `params`.

Language is told by script, which tells Chinese from English, the mixing that DeepSeek-R1 (section
2.3.2) saw, but not English from French, since both are Latin.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import regex

from chainforge.core.errors import InputError, hint
from chainforge.core.transcript import DEFAULT, read
from chainforge.rewards.answers import lenient_answer
from chainforge.rewards.verify import Claim, check_verifier, verify_all

# Unicode's scripts, and the languages written in each.
_SCRIPTS = {
    "latin": "cs da de en es et fi fr hr hu id it lt lv ms nl no pl pt ro sk sl sv sw tl tr vi",
    "cyrillic": "ru uk bg sr kk", "arabic": "ar fa ur", "devanagari": "hi mr ne", "han": "zh ja",
    "kana": "ja", "hangul": "ko", "greek": "el", "hebrew": "he", "thai": "th", "bengali": "bn",
    "gurmukhi": "pa", "gujarati": "gu", "tamil": "ta", "telugu": "te", "kannada": "kn",
    "malayalam": "ml", "georgian": "ka", "armenian": "hy",
}  # fmt: skip
LANGUAGES: dict[str, frozenset[str]] = {
    code: frozenset(script for script, codes in _SCRIPTS.items() if code in codes.split())
    for code in " ".join(_SCRIPTS.values()).split()
}
# Written without spaces: this many characters make about one word.
_CHARACTERS_PER_WORD = {"han": 2, "kana": 2, "thai": 4}

_LETTERS = {script: rf"\p{{{script}}}" for script in _SCRIPTS} | {
    "kana": r"[\p{Hiragana}\p{Katakana}ー]",
    "other": r"\p{L}",
}
_RUN = regex.compile(
    "|".join(rf"(?P<{name}>(?:{letter}\p{{M}}*)+)" for name, letter in _LETTERS.items())
)
# Mathematics and code are not language. No part runs past its next opening: quadratic otherwise.
_NO_PROSE = regex.compile(
    r"```[^`]*```|`[^`\n]*`|(?P<formula>\$\$[^$]*\$\$|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]"
    r"|\\begin\{(?:(?!\\begin\{).)*?\\end\{[A-Za-z]*\*?\}"
    # Pandoc's rule tells a formula from prices: in one paragraph, no digit after the second `$`,
    # no blank before it where a digit follows the first.
    r"|(?<!\\)\$(?!\d[^$]*\s\$)(?:(?!\n\n)[^$])+\$(?!\d))",
    regex.DOTALL,
)
# A LaTeX command, a name with a digit or underscore, a function's name, a letter that is a symbol.
_NOT_WORDS = regex.compile(
    r"\\[A-Za-z]+|(?<![A-Za-z])[A-Za-z_]{0,40}[\d_][A-Za-z0-9_]{0,40}"
    r"|(?<![A-Za-z])(?:sin|cos|tan|log|ln|exp|max|min|mod|gcd|lcm|sqrt)(?![A-Za-z])"
    "|[\u2070-\u209f\u2100-\u214f\U0001d400-\U0001d7ff]+"
)
# In a formula, three words in a row and letters that formulas are not written in are language.
_SYMBOL = r"[\p{Latin}\p{Greek}\p{Mn}]"
_SAID = regex.compile(
    rf"{_SYMBOL}++(?:[\s,.;:!?'’-]++{_SYMBOL}++)*+|(?P<foreign>(?:(?!{_SYMBOL})\p{{L}})+)"
)
_WORD = regex.compile(rf"{_SYMBOL}{{2,}}")
_APOSTROPHE = regex.compile(r"(?<=[^\W\d_])['’](?=[^\W\d_])")


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
    return accuracy_rewards([dict(locals())])[0]


def accuracy_rewards(calls: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return `[accuracy_reward(**call) for call in calls]`, verified in parallel."""
    verdicts = verify_all([_claim(call) for call in calls])
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def _claim(call: Mapping[str, Any]) -> Claim:
    """Return the answer in a completion as a `Claim`; an unreadable one claims an empty answer."""
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


def scripts_of(language: str) -> frozenset[str]:
    """Return the scripts a language is written in; raise `InputError` for an unknown code."""
    if language not in LANGUAGES:
        raise InputError(f"no language {language!r}; {hint(str(language), LANGUAGES)}")
    return LANGUAGES[language]


def _prose(text: str) -> str:
    """Return a text without mathematics and code, but with the words in formulas."""

    def said(found: regex.Match[str]) -> str:
        parts = _SAID.finditer(_NOT_WORDS.sub(" ", found["formula"] or ""))
        kept = [p[0] for p in parts if p["foreign"] or len(_WORD.findall(p[0])) >= 3]
        return f" {' '.join(kept)} "

    return str(_NOT_WORDS.sub(" ", _NO_PROSE.sub(said, text)))


def count_words(text: str) -> Counter[str]:
    """Count words by script; a single Latin or Greek letter is a variable, not a word."""
    counts: Counter[str] = Counter()
    for match in _RUN.finditer(_APOSTROPHE.sub("", _prose(text))):
        script = match.lastgroup or "other"
        length = len(match[0])
        if length > 1 or script not in ("latin", "greek"):
            counts[script] += math.ceil(length / _CHARACTERS_PER_WORD.get(script, length))
    return counts


def share(text: str, scripts: Collection[str]) -> float:
    """Return the share of words in these scripts; 1.0 where no words are.

    Reasoning in mathematics alone mixes no languages.
    """
    counts = count_words(text)
    total = sum(counts.values())
    return sum(counts[script] for script in scripts) / total if total else 1.0


def language_consistency_reward(
    completion: str, language: str = "en", transcript: str = DEFAULT
) -> float:
    """Return the share of words of the reasoning in the language's script, 0.0 when unreadable.

    Mathematics, code and digits do not count as words. DeepSeek-R1, section 2.3.2.
    """
    parts = read(completion, transcript)
    return share(parts.reasoning, scripts_of(language)) if parts else 0.0


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., float | None]:
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
        right, wrong = (min_value_correct, max_value_correct), (max_value_wrong, min_value_wrong)
        low, high = right if correct else wrong
        return low + (high - low) * (1.0 + math.cos(math.pi * min(length / max_len, 1.0))) / 2

    def cosine_scaled_reward(
        completion: str,
        completion_ids: Sequence[int],
        answer: str | None,
        verifier: str = "math",
        entry: str | dict[str, Any] | None = None,
        transcript: str = DEFAULT,
    ) -> float | None:
        correct = accuracy_reward(completion, answer, verifier, entry, transcript)
        return scale(correct, len(completion_ids))

    def batch(calls: Sequence[Mapping[str, Any]]) -> list[float | None]:
        lengths = [len(call["completion_ids"]) for call in calls]
        return [scale(*pair) for pair in zip(accuracy_rewards(calls), lengths, strict=True)]

    cosine_scaled_reward.batch = batch  # type: ignore[attr-defined]
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
    # Named, not imported: they need the network, or torch.
    "llm_judge": "chainforge.generate.judge:LlmJudge",
    "reward_model": "chainforge.generate.judge:RewardModel",
    "soft_overlong": "trl.rewards:get_soft_overlong_punishment",
    "repetition_penalty": "trl.rewards:get_repetition_penalty_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
}
