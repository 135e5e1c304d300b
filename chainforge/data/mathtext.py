r"""Write a mathematical question so that spellings which mean the same read the same.

`$\dfrac{1}{2} x$`, `\(\frac12x\)` and `1/2 x` become one text, as do "Find" and "Determine".
Drawings (`[asy]`) are left out. All of it takes linear time.
"""

from __future__ import annotations

import re

from chainforge.rewards.language import end_of_formula

# What LaTeX and Unicode call the same thing; longer names first, since blanks after a command may
# be missing: `\infty` must not be read as `\in`.
_NAMES = {
    "*": "times cdot ast · ∙ ⋅ × ∗",
    "/": "div ÷ ∕",
    "-": "− – ‐ ‑ setminus",
    "+-": "pm ±",
    "<=": "leqslant leq le ≤ ⩽",
    ">=": "geqslant geq ge ≥ ⩾",
    "<": "lt",
    ">": "gt",
    "|": "mid vert lvert rvert ∣",
    "||": "Vert lVert rVert parallel ∥ ‖",
    "neq": "neq ne ≠",
    "approx": "approx ≈",
    "equiv": "equiv ≡",
    "sqrt": "sqrt √",
    "infty": "infty ∞",
    "sum": "sum ∑",
    "prod": "prod ∏",
    "int": "int ∫",
    "notin": "notin ∉",
    "in": "in ∈",
    "cup": "cup ∪",
    "cap": "cap ∩",
    "subset": "subseteq subset ⊂ ⊆",
    "to": "longrightarrow rightarrow to → ↦ mapsto",
    "angle": "measuredangle angle ∠",
    "triangle": "triangle △ ▵",
    "perp": "perp ⊥",
    "deg": "circ degree ° ∘",
    "floor": "lfloor rfloor ⌊ ⌋",
    "ceil": "lceil rceil ⌈ ⌉",
    "<<": "langle rangle ⟨ ⟩",
    "%": "%",
    "phi": "varphi phi φ ϕ",
    "epsilon": "varepsilon epsilon ε ϵ",
}
_GREEK = (
    "alpha α beta β gamma γ delta δ zeta ζ theta θ lambda λ mu μ nu ν xi ξ pi π rho ρ sigma σ "
    "tau τ chi χ psi ψ omega ω eta η Gamma Γ "
    "Delta Δ Theta Θ Lambda Λ Pi Π Sigma Σ Phi Φ Psi Ψ Omega Ω"
)
_NAMES |= {name: f"{name} {letter}" for name, letter in re.findall(r"(\w+) (\w)", _GREEK)}
_COMMANDS = {
    word: name for name, words in _NAMES.items() for word in words.split() if word.isascii()
}
# Commands that change how a formula looks, not what it says.
_LOOKS = re.findall(
    r"\w+",
    "displaystyle textstyle limits nolimits left right middle quad qquad ldots cdots dots hspace "
    "vspace text textbf textit textrm textup texttt emph mathrm mathbf mathit mathsf mathbb "
    "mathcal mbox hbox operatorname boldsymbol rm bf it big Big bigg Bigg bigl bigr Bigl Bigr "
    "biggl biggr Biggl Biggr dfrac tfrac cfrac frac dbinom tbinom binom",
)
_KNOWN = sorted([*_COMMANDS, *_LOOKS], key=len, reverse=True)
_PIECE = re.compile(
    rf"\\(?P<known>{'|'.join(map(re.escape, _KNOWN))})|\\(?:begin|end)\{{[A-Za-z*]*\}}"
    r"|(?P<over>\}\s*\{)|(?P<piece>\d+|[^\W\d_]|[^\s\w{}$\\&~.,;:!'\"…])"
)
_MARKUP = re.compile(
    rf"\\(?:(?P<known>{'|'.join(map(re.escape, _KNOWN))})(?![A-Za-z])"
    r"|(?:begin|end)\{[A-Za-z*]*\}|[,;:!])|(?P<over>\}\s*\{)"
)
_UNICODE = str.maketrans(
    {
        word: f"\\{next(filter(str.isascii, words.split()))} "
        for words in _NAMES.values()
        for word in words.split()
        if not word.isascii()
    }
    | {sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {sign: f"_{digit}" for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
)
_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL | re.IGNORECASE)
# These begin with a character that is rare: a search for one is fast.
_THOUSANDS = re.compile(r"(\d)(?:\{,\}|,\\!|\\,|,)(?=\d{3}(?!\d))")
_JOINT = re.compile(r"(\d)(?=[A-Za-z])")
_HYPHEN = re.compile(r"-(?<=[A-Za-z]-)(?=[A-Za-z])")
_SHORT_FRACTION = re.compile(r"frac\s*(\d)\s*(\d)")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\b")
_OPENING = re.compile(r"\\\$|\$\$|\$|\\\(|\\\[")
_CLOSING = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
# What asks for the same. Parts of words change too, which does no harm: equal texts stay equal.
_MEANINGS = {
    "suppose": "suppose that|assume that|assume|given that|given",
    "find": "determine|compute|calculate|evaluate|obtain|identify|state|give|work out|figure out|"
    "solve for|what is|what are|what was|what's",
    "show": "prove|verify|demonstrate",
}


def plain_question(text: str) -> str:
    """Return a question in lower case, its formulas in pieces, its verbs as one of each meaning."""
    if not text.isascii():
        text = text.translate(_UNICODE)
    if "[" in text:
        text = _DRAWING.sub(" ", text)
    text = _THOUSANDS.sub(r"\1", text)
    if "\\" in text or "$" in text:
        text = _DEGREES.sub(r"\\circ ", _SHORT_FRACTION.sub(r"frac{\1}{\2}", text))
        text = "".join(_written_out(text))
    else:
        text = _in_prose(text)
    text = " ".join(text.lower().split())
    for meaning, words in _MEANINGS.items():
        for word in words.split("|"):
            text = text.replace(word, meaning)
    return text.replace("find the exact value of", "find").replace("find the value of", "find")


def _in_prose(text: str) -> str:
    """Return a text outside formulas, its commands written out and its joints opened."""
    if "\\" in text or "{" in text:
        text = _MARKUP.sub(_in_words, text)
    return _HYPHEN.sub(" ", _JOINT.sub(r"\1 ", text))


def _written_out(text: str) -> list[str]:
    """Return the parts of a text, those between the marks of a formula in single pieces."""
    parts: list[str] = []
    never: set[str] = set()
    position = 0
    while match := _OPENING.search(text, position):
        parts += _in_prose(text[position : match.start()]), " "
        position = match.end()
        closing = _CLOSING.get(match[0], "$")
        if match[0] == "\\$" or closing in never:
            continue
        end = end_of_formula(text, position) if closing == "$" else text.find(closing, position)
        if end < 0:
            if closing != "$":
                never.add(closing)
            continue
        formula = (_in_pieces(piece) for piece in _PIECE.finditer(text, position, end))
        parts += " ".join(filter(None, formula)), " "
        position = end + len(closing)
    parts.append(_in_prose(text[position:]))
    return parts


def _in_pieces(match: re.Match[str]) -> str:
    """Return a number, a letter or an operator of a formula, or the name of a command."""
    if match["piece"]:
        return match["piece"]
    return "/" if match["over"] else _COMMANDS.get(match["known"] or "", "")


def _in_words(match: re.Match[str]) -> str:
    """Return what takes the place of a command outside a formula."""
    return f" {'/' if match['over'] else _COMMANDS.get(match['known'] or '', '')} "
