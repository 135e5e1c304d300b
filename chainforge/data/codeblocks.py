"""Find blocks of code in a text, fenced or not, and tell them from equations and inline names."""

from __future__ import annotations

import re

# Both are looked for in a text after a line's end: a pattern that begins with it is found at once.
_FENCE = re.compile(r"\n[ \t]*(?:```|~~~)")
# Of a stripped line. No part may overlap the next, or a hostile line costs quadratic time.
_CODE_LINE = re.compile(
    r"(?:def|class)\s+\w.*:|(?:from\s+[\w.]+\s+)?import\s+\w[\w., *]*|#include\s*<.*"
    r"|(?:if|elif|for|while|with|try|except|else)\b.*:|return\b.*[\w)\]]|print\(.*\)"
    r"|[\w.\[\]]++\s*[-+*/]?=(?!=).*[\w)\]'\"]|.*[;{}]"
)
_CODE_MARK = re.compile(
    r"\n[ \t]*(?:def \w+\(|class \w+[(:]|import \w+|from \w+ import|print\(|return\b|#include"
    r"|for \w+ in .*:|while .*:|(?:int|void|public|static|const|let|var|function) )"
)
CODE_LINES = 3


def code_block(text: str) -> str | None:
    """Return what block of code a text holds: a fence, or three lines of code in a row."""
    whole = f"\n{text}"
    if _FENCE.search(whole):
        return "a fenced block"
    if not _CODE_MARK.search(whole):
        return None
    lines = 0
    for line in text.splitlines():
        line = line.strip()
        lines = lines + 1 if _CODE_LINE.fullmatch(line) else 0 if line else lines
        if lines >= CODE_LINES:
            return f"{lines} lines of code"
    return None
