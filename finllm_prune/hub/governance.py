"""What people alone can say of a model, and what the licenses say that it is made under."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Governance:
    """For those who approve a model and answer for it; what nobody has said the card shows as open.

    Args:
        owner: who answers for the model.
        contact: where to ask.
        intended_use: the decision that it serves, and whose.
        out_of_scope: what it must not be used for.
        monitoring: what is watched in use, and at which thresholds somebody acts.
        data_license: of the data, where its own card does not tell, as cc-by-nc-sa-3.0.
        language: of the data, as its code in ISO 639: en, de.
    """

    owner: str | None = None
    contact: str | None = None
    intended_use: str | None = None
    out_of_scope: str | None = None
    monitoring: str | None = None
    data_license: str | None = None
    language: str | None = None


_TERMS = {
    "non-commercial": re.compile(r"(^|-)nc(-|$)|non-?commercial|research", re.IGNORECASE),
    "share-alike": re.compile(r"(^|-)sa(-|$)|^[al]?gpl|^odbl|^cdla-sharing", re.IGNORECASE),
    "no derivatives": re.compile(r"(^|-)nd(-|$)", re.IGNORECASE),
}
_WORDS = {
    "non-commercial": "forbids commercial use; do not use this model so unless the owner of {source} has permitted it",
    "share-alike": "asks that what is derived be passed on under the same terms alone",
    "no derivatives": "forbids passing on what is derived, as a fine-tuned model may be",
}


def restrictions(license: str | None) -> list[str]:
    """Of licenses by their Hub ids; what is not known to restrict is not said to be free either."""
    return [term for term, sign in _TERMS.items() if license is not None and sign.search(license)]


def license_notes(sources: dict[str, str | None]) -> list[str]:
    """A sentence for each restriction of ``the base model`` or ``the data``."""
    return [
        f"{term[0].upper()}{term[1:]}: {source} is under {license}, which {_WORDS[term].format(source=source)}."
        for source, license in sources.items()
        for term in restrictions(license)
    ]


def license_conflict(declared: str | None, sources: dict[str, str | None]) -> str | None:
    """Where the license that a card declares allows what that of the base model or the data forbids."""
    found = [
        f"{source} is under {license} ({', '.join(restrictions(license))})"
        for source, license in sources.items()
        if declared is not None and set(restrictions(license)) - set(restrictions(declared))
    ]
    return f"LICENSE CONFLICT: {declared} is declared for this model, but {' and '.join(found)}." if found else None
