r"""Translate the formulas of docstrings and pages, which are plain text, into TeX.

    gamma_k^2 = alpha_k^2 gamma_{k-1}^2 + beta_k^2        \gamma_{k}^{2} = \alpha_{k}^{2} \gamma_{k-1}^{2} + ...
    y_0-hat, ŷ_0                                          \hat{y}_{0}
    sqrt(1 - a_t^2), √(1 − a_t²)                          \sqrt{1 - a_{t}^{2}}

`tex` translates one formula, `block` an indented block whose lines may have labels and remarks beside the formulas, and
`prose` the symbols in a paragraph. Text that is no formula is left alone: better plain than wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

GREEK = {
    **{letter: "\\" + name for name, letter in zip(
        "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega".split(),
        "αβγδεζηθκλμνξπρστφχψω", strict=True)},
    "µ": r"\mu", "Δ": r"\Delta", "Σ": r"\sum", "Π": r"\prod", "ℓ": r"\ell", "∂": r"\partial", "∞": r"\infty",
}  # fmt: skip
GREEK["ε"] = r"\varepsilon"
WORDS = {
    **{name: f"\\{name}" for name in
       "alpha beta gamma delta eta theta lambda mu nu xi pi rho sigma tau phi chi psi omega".split()},
    "kappa": r"\kappa", "eps": r"\varepsilon", "lam": r"\lambda", "gam": r"\gamma", "Phi": r"\Phi",
    "infinity": r"\infty", "inf": r"\infty", "Laplacian": r"\Delta", "int": r"\int ",
    **{name: f"\\{name} " for name in "exp log ln sin cos tan min max det sum prod".split()},
}  # fmt: skip
OPERATORS = {
    *("Var", "Cov", "KL", "SNR", "logSNR", "logsumexp", "sigmoid", "clamp", "clip", "softmax", "mean", "tr", "logit"),
    *("div", "MMD", "std", "into"),
}
SIGNS = {
    "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "->": r"\to ", "+-": r"\pm ", "...": r"\dots ", "…": r"\dots ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "−": "-", "·": r"\cdot ", "*": r"\cdot ", "~": r"\sim ", "×": r"\times ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "∈": r"\in ", "≈": r"\approx ", "½": r"\tfrac12 ",
    "–": "-", "{": r"\{", "}": r"\}",
}  # fmt: skip
RAISED = {"²": "2", "³": "3", "⁻¹": "-1", "⁻²": "-2", "ᵀ": r"\top", "¹": "1", "⁸": "8", "′": r"\prime"}
LOWERED = {"₀": "0", "₁": "1", "₂": "2", "ₖ": "k", "ₛ": "s", "ₜ": "t"}
HATS = {"ŷ": "y", "ŝ": "s", "σ̂": r"\sigma", "x̂": "x", "t̂": "t", "Ĉ": "C", "ẑ": "z"}

MOST_WORDS = 12
"""Largest number of words in a line of a formula with its labels and remarks; a line with more is text."""
_NAME = re.compile(r"[A-Za-z][A-Za-z]*")
_WORD_WITH_UNDERSCORE = re.compile(r"[A-Za-z]{2,}(?:_[A-Za-z0-9]+)+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
_PLAIN = set("=+-/,.;:<>()[]'!")
_CODE = re.compile(
    r"^\s*(?:import \w|from \w+ import|for .* in |(?:with|if) .*:|def |class |python |dpm-scales )"
    r"|\b[a-z_]\w+\.\w+\(|\('|\['|: \.\.\.$"
)
_RELATION = re.compile(r"[=<>≤≥~∈≈]|->")


class NotAFormula(ValueError):
    """The text contains something that formulas do not."""


def _closing(text: str, start: int) -> int:
    """Return the place of the bracket that closes the one at `start`. Raises NotAFormula if none does."""
    pairs = {"(": ")", "{": "}", "[": "]"}
    stack = []
    for place in range(start, len(text)):
        if text[place] in pairs:
            stack.append(pairs[text[place]])
        elif stack and text[place] == stack[-1]:
            stack.pop()
            if not stack:
                return place
    raise NotAFormula(text)


def _script(text: str, at: int) -> tuple[str, int]:
    """Return the sub- or superscript that begins at `at` as TeX, and the place after it."""
    if at < len(text) and text[at] in "{(":
        end = _closing(text, at)
        inside = tex(text[at + 1 : end])
        return (f"({inside})" if text[at] == "(" and text[at - 1] == "_" else inside), end + 1
    if text.startswith("½", at):
        return "1/2", at + 1
    if text.startswith("t_hat", at):
        return r"\hat{t}", at + len("t_hat")
    found = re.compile(r"-?(?:\d+(?:\.\d+)?(?:/\d+)?|[A-Za-z]+|[α-ωµ])").match(text, at)
    if not found:
        raise NotAFormula(text)
    word = found[0]
    sign, bare = ("-", word[1:]) if word.startswith("-") else ("", word)
    if bare in WORDS:
        return sign + WORDS[bare].strip(), found.end()
    if bare.isalpha() and len(bare) > 2 and bare.isascii():
        return sign + rf"\mathrm{{{bare}}}", found.end()
    return sign + "".join(GREEK.get(letter, letter) for letter in bare), found.end()


def _scripts(symbol: str, text: str, at: int) -> tuple[str, int]:
    """Append to a symbol its hat, primes, sub- and superscripts at `at`; return the TeX and the place after them."""
    low, high, primes, hat = "", "", "", False
    while at < len(text):
        raised = next((sign for sign in RAISED if text.startswith(sign, at)), None)
        if text.startswith("-hat", at):
            hat, at = True, at + 4
        elif text[at] == "'":
            primes, at = primes + "'", at + 1
        elif text[at] == "_" and (not low or hat):
            piece, at = _script(text, at + 1)
            low = f"{low},{piece}" if low else piece
        elif text[at] in LOWERED:
            low, at = low + LOWERED[text[at]], at + 1
        elif text[at] == "^" and not high:
            high, at = _script(text, at + 1)
        elif raised and not high:
            high, at = RAISED[raised], at + len(raised)
        else:
            break
    result = rf"\hat{{{symbol}}}" if hat else symbol
    if primes:
        result += primes
    return result + (f"_{{{low}}}" if low else "") + (f"^{{{high}}}" if high else ""), at


def tex(text: str) -> str:
    """Return a formula as TeX.

    Raises: NotAFormula for quotes, code, and brackets that do not close.
    """
    out: list[str] = []
    at = 0
    while at < len(text):
        rest = text[at:]
        hatted = next((mark for mark in HATS if rest.startswith(mark)), None)
        sign = next((sign for sign in SIGNS if rest.startswith(sign)), None)
        identifier, name, number = (
            _WORD_WITH_UNDERSCORE.match(text, at),
            _NAME.match(text, at),
            _NUMBER.match(text, at),
        )
        if text[at].isspace():
            out.append(" ")
            at += 1
        elif rest.startswith("sqrt(") or rest.startswith("√("):
            end = _closing(text, at + rest.index("("))
            inside = tex(text[at + rest.index("(") + 1 : end])
            piece, at = _scripts(rf"\sqrt{{{inside}}}", text, end + 1)
            out.append(piece)
        elif rest[0] == "√":
            out.append(rf"\sqrt{{{tex(rest[1])}}}")
            at += 2
        elif hatted:
            piece, at = _scripts(rf"\hat{{{HATS[hatted]}}}", text, at + len(hatted))
            out.append(piece)
        elif rest[0] in GREEK:
            piece, at = _scripts(GREEK[rest[0]], text, at + 1)
            out.append(piece + " ")
        elif identifier and identifier[0].partition("_")[0] not in {*WORDS, *OPERATORS, "dt", "sum", "prod"}:
            escaped = identifier[0].replace("_", r"\_")
            out.append(rf"\mathrm{{{escaped}}}")
            at = identifier.end()
        elif name:
            piece, at = _named(text, name)
            out.append(piece)
        elif number:
            piece, at = _scripts(number[0], text, number.end())
            out.append(piece)
        elif rest[0] in ")]":
            piece, at = _scripts(rest[0], text, at + 1)
            out.append(piece)
        elif rest[0] in "|‖":
            wide = 2 if rest.startswith("||") else 1
            alone = rest[0] == "|" and wide == 1 and text[at - 1 : at + 2] == " | "
            bar = r"\mid" if alone else r"\Vert" if wide == 2 or rest[0] == "‖" else r"\vert"
            piece, at = _scripts(bar, text, at + wide)
            out.append(piece + " ")
        elif sign:
            out.append(SIGNS[sign])
            at += len(sign)
        elif rest[0] in _PLAIN:
            out.append(rest[0])
            at += 1
        else:
            raise NotAFormula(text)
    return re.sub(r" +", " ", "".join(out)).strip()


def _named(text: str, name: re.Match[str]) -> tuple[str, int]:
    """Return a name as TeX, and the place after it: Greek letter, function, variable, or words of prose."""
    word, at = name[0], name.end()
    if word in WORDS:
        piece, at = _scripts(WORDS[word].strip(), text, at)
        return piece + " ", at
    if word in OPERATORS:
        piece, at = _scripts(rf"\mathrm{{{word}}}", text, at)
        return piece + (" " if at < len(text) and text[at] != "(" else ""), at
    if len(word) == 1:
        return _scripts(word, text, at)
    if re.fullmatch("[a-z][A-Z]|d[a-z]", word):
        return word, at
    if word[0] == "d" and word[1:] in WORDS:
        return f"d{WORDS[word[1:]]} ", at
    words = re.compile(r"[A-Za-z][A-Za-z]+(?:[ ](?![A-Za-z](?![A-Za-z]))[A-Za-z]{2,})*").match(text, name.start())
    assert words is not None
    kept = []
    for part in words[0].split(" "):
        if part in WORDS or part in OPERATORS or (text[name.start() + len(" ".join([*kept, part])) :][:1] in ("_", "^")):
            break
        kept.append(part)
    phrase = " ".join(kept) if kept else word
    start, end = name.start(), name.start() + len(phrase)
    left, right = (" " if text[place : place + 1].isspace() else "" for place in (start - 1, end))
    return rf"\text{{{left}{phrase}{right}}}", end


def _is_math(piece: str) -> bool:
    return bool(re.search(r"[_^√²]|[α-ωµΔΣΠ]", piece)) or any(
        word in WORDS for word in re.findall(r"[A-Za-z]+", piece)
    )


def _line(line: str) -> tuple[list[str], bool]:
    """Return the cells of a line of a block as TeX, and whether it holds a formula. Raises NotAFormula for a message."""
    found, formula = [], False
    if sum(word not in WORDS and word not in OPERATORS for word in re.findall(r"[A-Za-z]{3,}", line)) > MOST_WORDS:
        raise NotAFormula(line)
    for piece in re.split(r"\s{2,}", line.strip()):
        if _is_math(piece) or (_RELATION.search(piece) and len(re.findall(r"[A-Za-z]{3,}", piece)) < 3):
            found.append(tex(piece))
            formula = formula or bool(_RELATION.search(piece))
        else:
            if re.search(r"[`$\\_]", piece):
                raise NotAFormula(piece)
            words = re.sub(r"([%#&])", r"\\\1", piece)
            found.append(rf"\text{{{words}}}")
    return found, formula


def block(lines: list[str]) -> str | None:
    """Return an indented block as TeX, a row for each line, or None if it is no formula.

    Cells, which two spaces separate, are aligned; a line that begins deeper than the first has an empty first one.
    """
    if any(_CODE.search(line) for line in lines):
        return None
    rows: list[list[str]] = []
    formulas = 0
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    try:
        for line in lines:
            if not line.strip():
                continue
            cells, formula = _line(line)
            formulas += formula
            deeper = bool(rows) and len(line) - len(line.lstrip()) > margin
            rows.append(["", *cells] if deeper else cells)
    except NotAFormula:
        return None
    if not formulas or 2 * formulas < len(rows):
        return None
    if len(rows) == 1:
        return r" \qquad ".join(rows[0])
    columns = max(map(len, rows))
    return rf"\begin{{array}}{{{'l' * columns}}}" + r" \\ ".join(" & ".join(row) for row in rows) + r"\end{array}"


_GREEK_NAMES = "|".join(sorted((name for name in WORDS if WORDS[name][-1] != " "), key=len, reverse=True))
_SCRIPT = r"(?:\{[^{}]*\}|\d+(?:/\d+)?|[A-Za-z]{1,5}\b|[α-ωµ])"
_SYMBOL = re.compile(
    rf"(?<![\w$\\.{{])(?<!\w-)(?:(?:{_GREEK_NAMES})(?![A-Za-z])|[A-Za-z](?=[_^'][\w{{(-]|[₀₁₂ₖₛₜ])|[α-ωΑ-Ωµℓ]|[ŷẑĈ]|[xtσ]̂)"
    rf"(?:'(?=[_ ^,;.)]))?(?:_{_SCRIPT})?(?:\^(?:{_SCRIPT}|-?\d|\([^()]*\)))?(?:-hat)?[₀₁₂ₖₛₜ]*[²³]?"
)
_KEEP = re.compile(r"(`+).*?\1|\]\([^)]*\)|https?://\S+|\$[^$]*\$|<[^>]+>|\*\*?[^*\n]+\*\*?", re.DOTALL)


def prose(text: str) -> str:
    """Return a paragraph whose symbols, such as lambda_t and y_0-hat, are TeX between dollars; code stays."""
    parts, last = [], 0
    for kept in [*_KEEP.finditer(text), None]:
        end = len(text) if kept is None else kept.start()
        parts.append(_SYMBOL.sub(_replace, text[last:end]))
        if kept is not None:
            parts.append(kept[0])
            last = kept.end()
    return "".join(parts)


def _replace(found: re.Match[str]) -> str:
    symbol = found[0]
    if symbol in ("a", "I", "eta", "inf") or (symbol.isascii() and symbol.isalpha() and symbol not in WORDS):
        return symbol
    try:
        return f"${tex(symbol)}$"
    except NotAFormula:
        return symbol


def markdown(text: str) -> str:
    """Return a page or a docstring in Markdown with its indented formulas and its symbols as TeX between dollars.

    Fenced code, tables of options and indented code stay as they are.
    """
    return "".join(_markdown(text.splitlines(keepends=True)))


def _markdown(lines: list[str]) -> Iterator[str]:
    at, fence = 0, ""
    while at < len(lines):
        line = lines[at]
        marker = re.match(r"\s*(```+|~~~+)", line)
        if fence or marker:
            fence = "" if fence and marker and marker[1].startswith(fence) else fence or marker[1]  # type: ignore[index]
            yield line
            at += 1
            continue
        if line.startswith("$$"):
            end = at + (line.strip() == "$$")
            while end < len(lines) - 1 and not lines[end].rstrip(" .,\n").endswith("$$"):
                end += 1
            yield from lines[at : end + 1]
            at = end + 1
            continue
        if line.startswith(":::"):
            yield line
            at += 1
            while at < len(lines) and lines[at].startswith("    "):
                yield lines[at]
                at += 1
            continue
        before = lines[at - 1].strip() if at else ""
        if line.startswith("    ") and not before:
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            while not lines[end - 1].strip():
                end -= 1
            found = block([part[4:].rstrip("\n") for part in lines[at:end]])
            yield "".join(lines[at:end]) if found is None else f"\n$$\n{found}\n$$\n\n"
            at = end
            continue
        if _is_columns(lines, at):
            end = at
            while end < len(lines) and lines[end].strip():
                end += 1
            yield from _table([part.rstrip() for part in lines[at:end]])
            at = end
            continue
        yield line if line.startswith("#") else _row(line) if line.startswith("|") else prose(line)
        at += 1


def _row(line: str) -> str:
    """Return a row of a Markdown table, with cells that hold only a formula as TeX."""
    cells = re.split(r"(?<!\\)\|", line.rstrip("\n"))
    return "|".join(_formula_or_prose(cell) for cell in cells) + "\n" * line.endswith("\n")


def _formula_or_prose(cell: str) -> str:
    words = [word for word in re.findall(r"[A-Za-z]{2,}", cell) if word not in WORDS and word not in OPERATORS]
    plain = [word for word in words if not re.search(rf"[_^{{]\{{?{word}", cell) and word not in ("hat", "sqrt", "dT")]
    if not plain and _is_math(cell) and re.search(r"[-+/=(]", cell) and not re.search(r"[`\[\]$]|\d{4}", cell):
        try:
            return f" ${tex(cell.strip())}$ "
        except NotAFormula:
            return prose(cell)
    return prose(cell)


def _is_columns(lines: list[str], at: int) -> bool:
    """Return whether a paragraph of two lines or more begins at `at` whose unindented lines have two columns each."""
    end = at
    while end < len(lines) and lines[end].strip():
        end += 1
    whole = [line for line in lines[at:end] if not line.startswith(" ")]
    return (
        (at == 0 or not lines[at - 1].strip())
        and len(whole) > 1
        and not lines[at].startswith((" ", "|"))
        and all(re.search(r"\S {2,}\S", line) for line in whole)
    )


def _table(lines: list[str]) -> Iterator[str]:
    """Yield lines of two columns as a Markdown table; an indented line continues the cell above."""
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and rows:
            rows[-1][1] += " " + line.strip()
        else:
            left, right = re.split(r" {2,}", line.strip(), maxsplit=1)
            rows.append([left, right])
    yield "\n| | |\n|---|---|\n"
    for left, right in rows:
        yield f"| {prose(_cell(left))} | {prose(_cell(right))} |\n"
    yield "\n"


def _cell(text: str) -> str:
    return re.sub(r" {2,}", ", ", text.replace("|", r"\|"))
