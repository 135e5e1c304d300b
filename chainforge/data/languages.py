"""Tell how much of a text is in the language that it should be in.

By script, as DeepSeek-R1 counts (section 2.3.2); and for languages of one script, which that cannot
tell apart, by a vote of the paragraphs, each identified by py3langid.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.rewards.language import LANGUAGES, count_words, prose, scripts_of, share

# Fewer letters name no language: "Hmm." would be Ligurian.
LETTERS = 20
NO_LANGUAGE = "zxx"  # what the identifier says of pure mathematics
_LETTER = re.compile(r"[^\W\d_]")
_BREAK = re.compile(r"\n+")


def language_share(text: str, language: str | None, asked: str) -> float:
    """Return the share of words in the language's script, or in the script of what was asked."""
    if _plain(text) and ("latin" in scripts_of(language) if language else _plain(asked)):
        return 1.0  # nearly every text: counting its words would cost ten times as much
    if language is not None:
        return share(text, language)
    wanted = count_words(asked)
    if not wanted:
        return 1.0
    main = wanted.most_common(1)[0][0]
    scripts = {main}
    for known in LANGUAGES.values():  # Japanese is written in two
        if main in known and len(known) > 1 and any(wanted[other] for other in known - {main}):
            scripts |= known
    counts = count_words(text)
    total = sum(counts.values())
    return sum(counts[script] for script in scripts) / total if total else 1.0


def _plain(text: str) -> bool:
    """Whether all letters are those of ASCII."""
    return text.isascii() or not any(c > "\x7f" and c.isalpha() for c in set(text))


def check_vote(language: str | None) -> None:
    """Raise `InputError` unless paragraphs can be held against this language."""
    if language is None:
        raise InputError("language_vote: say which language is right, as `language: en`")
    known = _identifier()[1]
    if language not in known:
        raise InputError(f"language_vote cannot tell {language!r}; {hint(language, known)}")


def voted_share(text: str, language: str) -> float:
    """Return the share of words in paragraphs that are in the language; 1.0 where none counts.

    Paragraphs of fewer than 20 letters, and those of mathematics alone, have no vote.
    """
    identify, _ = _identifier()
    right = total = 0
    for paragraph in _BREAK.split(prose(text)):
        if len(paragraph) < LETTERS or len(_LETTER.findall(paragraph)) < LETTERS:
            continue
        found = identify(paragraph)[0]
        if found != NO_LANGUAGE:
            words = len(paragraph.split())
            total += words
            right += words * (found == language)
    return right / total if total else 1.0


@functools.lru_cache(maxsize=1)
def _identifier() -> tuple[Any, list[str]]:
    """Return a classifier of our own, among the languages that are known here, and those."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    known = sorted(set(identifier.labels) & LANGUAGES.keys())
    identifier.set_languages([*known, NO_LANGUAGE])
    return identifier.classify, known
