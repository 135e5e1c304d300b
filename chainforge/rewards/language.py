"""Count the words of a text by the script they are written in.

DeepSeek-R1 (section 2.3.2) rewards "the proportion of target language words" in the reasoning, to
keep a model from mixing languages. Scripts tell Chinese from English, which is the mixing the paper
saw; they do not tell English from French, since both are Latin.
"""

from __future__ import annotations

import math
from collections import Counter

import regex

from chainforge.core.errors import InputError, hint

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
# Mathematics and code are no language. No part runs past its next opening: that were quadratic.
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


def scripts_of(language: str) -> frozenset[str]:
    """Return the scripts a language is written in; raise `InputError` for an unknown code."""
    if language not in LANGUAGES:
        raise InputError(f"no language {language!r}; {hint(str(language), LANGUAGES)}")
    return LANGUAGES[language]


def _prose(text: str) -> str:
    """Leave out mathematics and code, but for what a formula says in words."""

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


def share(text: str, language: str) -> float:
    """Return the share of words in the language's script; 1.0 where no words are.

    Reasoning in mathematics alone mixes no languages.
    """
    scripts = scripts_of(language)
    counts = count_words(text)
    total = sum(counts.values())
    return sum(counts[script] for script in scripts) / total if total else 1.0
