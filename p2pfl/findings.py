"""What an audit found, for people: sentences, a table of several runs, and the picture of the attacks.

Reads what `audit` wrote as JSON and attacks nothing. Whatever is missing or damaged in it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from p2pfl import plots
from p2pfl.plots import Attack
from p2pfl.records import Json, Line, inside, is_number, number, words

ATTACKS = {"loss": "Attack by loss", "shadow": "Attack by shadow models"}
TITLE = "What a neighbour could find out"
HEAD = ("run", "protection", "AUC by loss", "AUC by shadows", "advantage", "at most", "rows read")
CAPTION = (
    "Of the rows that a sender did not train on, the attack takes so many for training rows (to the right), and so "
    "many it recognises of those that it did train on (upwards). On the dashed diagonal it guesses. Thick: the mean "
    "over the senders; thin: each of them. Dotted: the most that differential privacy leaves any attack."
)
METHOD = (
    "The attacker is a strong one: it has the rows in question, in the sender's units, and knows of one half of them "
    "whether they were learnt. It is judged by the other half. AUC: of pairs of a row that was learnt and one that was "
    "not, the share told right, with the percentile bootstrap over rows. Advantage: the share of learnt rows that is "
    "recognised less that of other rows taken for learnt, with the exact binomial interval. The intervals of both "
    "attacks hold together with 95 %. Where one figure is given, it is that of the stronger attack. "
    "Rows are read out of one step on one row, the worst case: a step on many rows mixes them."
)
NONE = "–"
TOLD = 4  # runs that a title has room for


def sentences(found: Line) -> list[str]:
    """What was found in one run, in words that need no knowledge of the field."""
    return [*_of_members(found), *_of_the_bound(found), *_of_rows(found)]


def _of_members(found: Line) -> list[str]:
    attack = stronger(found)
    if attack is None:
        return []
    share, low, high = _estimate(found, attack, "auc")
    if low > 0.5:
        verdict = "better than chance: the models give something away"
    elif high < 0.5:
        verdict = "not better than chance"
    else:
        verdict = "no different from chance, as far as so many rows can tell"
    senders = [of for of in _mapping(found, "senders").values() if isinstance(of, Mapping)]
    summed = [count for of in senders if (count := number(of, "in_a_sum_of") or 1) > 1]
    seen = f"sums of {min(summed):.0f} or more senders' models" if summed else "the senders' models"
    few = words(found, "too_few_rows")
    return [
        f"Was this row trained on? Given two rows, one that was and one that was not, a neighbour who saw {seen} tells "
        f"which is which in {100 * share:.0f} of 100 cases ({100 * low:.0f} to {100 * high:.0f}), where 50 is chance. "
        f"That is {verdict}.",
        *([f"{', '.join(few[:3])} had too few rows for an attack to say anything."] if few else []),
    ]


def _of_the_bound(found: Line) -> list[str]:
    attack, bound, (epsilon, delta) = stronger(found, "advantage"), number(found, "bound"), _spent(found)
    if found.get("dp") == "update":
        return ["The ε of this run is about a whole node and not about one row, so the attack is not held against it."]
    if attack is None or bound is None or epsilon is None or delta is None:
        return []
    gain, low, high = _estimate(found, attack, "advantage")
    promise = (
        f"Differential privacy promises for ε = {epsilon:.3g} and δ = {delta:.2g} that no attack on one row, however "
        f"clever, has an advantage above {bound:.3g}. The stronger of the two here has {gain:.2g} ({low:.2g} to "
        f"{high:.2g})"
    )
    if low > bound:
        return [promise + ": above the bound. The noise is not what it is said to be."]
    return [
        promise + (": below the bound." if gain <= bound else ": not above the bound, as far as the rows can tell.")
    ]


def _of_rows(found: Line) -> list[str]:
    rows = number(found, "inversion", "rows")
    bare, own = (_reading(found, which) for which in ("unprotected", "as_run"))
    if rows is None or bare is None or own is None:
        return [
            "Can a row be read out of an update? The model's first layer is not a linear one with a bias, for which "
            "there is a simple way. That there is no other way is not shown here."
        ]
    text = (
        "Can a row be read out of an update? In the smallest case, one step on one row, what an unprotected node sends "
        f"gives away {bare[1] * rows:.0f} of {rows:.0f} rows (typical error {_percent(bare[0])})"
    )
    if own == bare:
        return [text + ". This run protects nothing of that."]
    senders = number(found, "inversion", "senders") or 1
    whose = f", in a sum of {senders:.0f} such steps that does not say whose they are" if senders > 1 else ""
    own_text = f"as this run sends it{whose}, {own[1] * rows:.0f} of {rows:.0f} (typical error {_percent(own[0])})"
    return [f"{text}; {own_text}."]


def _percent(error: float) -> str:
    return "below 0.01 %" if error < 1e-4 else f"{100 * error:.3g} %"


def protection(found: Line) -> str:
    """By what the run was protected, in a few words."""
    epsilon, _ = _spent(found)
    kinds = {"example": "noise for rows", "update": "noise for nodes"}
    means = [kinds[dp]] if (dp := found.get("dp")) in kinds and isinstance(dp, str) else []
    if means and epsilon is not None:
        means[0] += f", ε = {epsilon:.3g}"
    means += ["masked sums"] if found.get("sums") == "masked" else []
    return " and ".join(means) or "none"


def table(founds: Mapping[str, Line]) -> list[list[str]]:
    """A row of HEAD for each run: label → what was found."""
    rows = []
    for label, found in founds.items():
        attack, bound = stronger(found, "advantage"), number(found, "bound")
        row = [label, protection(found)]
        row += [_shown(_estimate(found, name, "auc")) if attack else NONE for name in ATTACKS]
        row += [_shown(_estimate(found, attack, "advantage")) if attack else NONE]
        row += [NONE if bound is None else f"{bound:.3g}"]
        reading, count = _reading(found, "as_run"), number(found, "inversion", "rows")
        whose = ", not whose" if (number(found, "inversion", "senders") or 1) > 1 else ""
        row += [NONE if reading is None or count is None else f"{reading[1] * count:.0f} of {count:.0f}{whose}"]
        rows.append(row)
    return rows


def _shown(estimate: tuple[float, float, float]) -> str:
    value, low, high = estimate
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def picture(founds: Mapping[str, Line]) -> Figure | None:
    """How well each attack does in each run: label → what was found. None where nobody was attacked."""
    panels: dict[str, list[Attack]] = {}
    for attack, title in ATTACKS.items():
        curves = [_attack(found, attack, label if len(founds) > 1 else "") for label, found in founds.items()]
        panels[title] = [curve for curve in curves if curve is not None]
    if not all(panels.values()):
        return None
    return plots.attacks(panels, f"Trained on or not: {_told(founds)} of 100 pairs of rows told right, 50 is chance")


def _attack(found: Line, attack: str, label: str) -> Attack | None:
    """The curve of an attack on one run; with those on each sender, unless it has a label, for beside others they
    would be too many."""
    hits = _curve(inside(found, "membership", attack, "pooled", "roc"))
    if not hits:
        return None
    name = f"AUC {_shown(_estimate(found, attack, 'auc'))}"
    if label:
        return Attack(f"{label}: {name}", hits, (), *_most(found, len(hits)))
    senders = _mapping(_mapping(_mapping(found, "membership"), attack), "senders").values()
    each = [_curve(inside(sender, "roc")) for sender in senders if isinstance(sender, Mapping)]
    return Attack(name, hits, each, *_most(found, len(hits)))


def _most(found: Line, points: int) -> tuple[list[float], str]:
    """What no attack can exceed, at so many points, and how that is called; nothing where there is no such limit."""
    epsilon, delta = _spent(found)
    if epsilon is None or delta is None:
        return [], ""
    return allowed(epsilon, delta, points), f"dotted: at most, for ε = {epsilon:.3g}"


def _told(founds: Mapping[str, Line]) -> str:
    """Of 100 pairs, how many the stronger attack tells right in each run."""
    strongest = {label: stronger(found) for label, found in founds.items()}
    areas = {label: 100 * _estimate(founds[label], attack, "auc")[0] for label, attack in strongest.items() if attack}
    if len(areas) > TOLD:
        return f"at most {max(areas.values()):.0f}"
    return ", ".join(f"{label} {area:.0f}" if len(areas) > 1 else f"{area:.0f}" for label, area in areas.items())


def allowed(epsilon: float, delta: float, points: int) -> list[float]:
    """The largest share of members that (ε, δ) lets be recognised, at evenly spaced shares f of false alarms.

    min(e^ε f + δ, 1 − e^−ε (1 − δ − f), 1): Kairouz et al. (2015).
    """
    alarms, factor = np.linspace(0, 1, points), math.exp(min(epsilon, 700.0))
    most = np.minimum(1.0, np.minimum(factor * alarms + delta, 1 - (1 - delta - alarms) / factor))
    return [float(share) for share in most]


def stronger(found: Line, what: str = "auc") -> str | None:
    """The attack with the larger AUC, or advantage, over all senders; None where none was made."""
    known = {name: number(found, "membership", name, "pooled", what) for name in ATTACKS}
    areas = {name: area for name, area in known.items() if area is not None}
    return max(areas, key=lambda name: areas[name]) if areas else None


def _estimate(found: Line, attack: str, what: str) -> tuple[float, float, float]:
    """(value, low, high) over all senders; NaN where it is not there."""
    pooled = ("membership", attack, "pooled")
    ends = inside(found, *pooled, f"{what}_interval")
    low, high = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
    value = number(found, *pooled, what)
    whole = [math.nan if not is_number(part) else float(part) for part in (value, low, high)]
    return whole[0], whole[1], whole[2]


def _spent(found: Line) -> tuple[float | None, float | None]:
    """(ε, δ) of the sender that has spent most; (None, None) unless all have."""
    senders = [of for of in _mapping(found, "senders").values() if isinstance(of, Mapping)]
    spent = [(number(of, "epsilon"), number(of, "delta")) for of in senders]
    known = [(epsilon, delta) for epsilon, delta in spent if epsilon is not None and delta is not None]
    return max(known) if known and len(known) == len(senders) else (None, None)


def _reading(found: Line, which: str) -> tuple[float, float] | None:
    """(typical relative error, share of rows that were read)."""
    error, recovered = (number(found, "inversion", which, part) for part in ("error", "recovered"))
    return None if error is None or recovered is None else (error, recovered)


def _curve(values: Json) -> list[float]:
    return [float(value) for value in values if is_number(value)] if isinstance(values, list) else []


def _mapping(line: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    value = line.get(key)
    return value if isinstance(value, Mapping) else {}
