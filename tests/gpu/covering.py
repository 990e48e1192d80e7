"""Few cases that try many combinations of options."""

from itertools import combinations, product
from typing import Any


def covering(options: dict[str, tuple], strength: int = 2) -> list[dict[str, Any]]:
    """Cases in which each combination of values of any `strength` options occurs at least once.

    With a strength of 2 that is every pair of values, with 3 every triple.
    """
    missing = dict.fromkeys(
        frozenset(zip(names, values, strict=True))
        for names in combinations(options, strength)
        for values in product(*(range(len(options[name])) for name in names))
    )
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for name in [name for name in options if name not in case]:
            others = list(combinations(case.items(), strength - 1))
            gains = [
                sum(frozenset({(name, value), *met}) in missing for met in others)
                for value in range(len(options[name]))
            ]
            case[name] = gains.index(max(gains))
        for met in combinations(case.items(), strength):
            missing.pop(frozenset(met), None)
        cases.append({name: options[name][case[name]] for name in options})
    return cases
