"""What can go wrong with pruning while the loss looks fine: one sentence for each fault that the record shows."""

from collections.abc import Callable, Sequence

from finllm_prune.pruning import Group, Schedule

Moment = list[dict[str, float]]

_LATE = 0.5  # a rule that has cut nothing when this part of its sparsity is due does not start
_FLOOR = 0.1  # a layer below this part of the density that its rule asks for has collapsed
_WINDOW, _CHURN = 0.05, 0.05  # settled masks get back less than 5 % of the kept units in the last 5 % of the run
_STILL, _PATIENCE = 1e-6, 3  # what is learned changes by less than this part of its spread, in so many moments in a row


def watch(moments: Sequence[Moment], groups: Sequence[Group], schedule: Schedule) -> dict[str, str]:
    """Kind of fault -> one sentence, as far as the last moment shows it.

    Args:
        moments: rows of the recorder, one per group each.
        groups: the Pruner's.
        schedule: the Pruner's.
    """
    faults = {kind: look(moments, groups, schedule) for kind, look in _LOOKS.items()}
    return {kind: sentence for kind, sentence in faults.items() if sentence is not None}


def _never_starts(moments: Sequence[Moment], groups: Sequence[Group], schedule: Schedule) -> str | None:
    now = moments[-1]
    progress, fraction = now[0]["progress"], schedule.fraction(now[0]["progress"])
    if now[0]["frozen"]:
        if progress >= schedule.begin or moments[0][0]["frozen"]:  # in one shot, before the first step
            return None
        return (
            f"The schedule never started: the run ended at {progress:.0%}, cutting begins at {schedule.begin:.0%}, so "
            "everything was cut at the end and nothing was trained after it; train longer or lower pruning.schedule.begin."
        )
    for rows, members in _rules(now, groups):
        if fraction >= _LATE and all(row["kept"] == row["units"] for row in rows):
            return (
                f"The schedule has not started to cut: {fraction:.0%} of the sparsity of target {members[0].rule.target} "
                f"is due at {progress:.0%} of the run and nothing is cut; check that gradients reach it and that its "
                "sparsity is at least one unit."
            )
    return None


def _collapses(moments: Sequence[Moment], groups: Sequence[Group], schedule: Schedule) -> str | None:
    low = []
    for row, group in zip(moments[-1], groups, strict=True):
        if group.rule.sparsity is None:
            continue  # a target wants uneven widths
        asked = 1.0 - group.rule.sparsity
        # One unit always stays; it is a fault only where the rule asks for clearly more, or for less than one.
        alone = row["kept"] == 1 < row["units"] and not 0.5 <= asked * row["units"] < 2
        if row["density"] < _FLOOR * asked or alone:
            low.append(f"{group.name} keeps {row['kept']:.0f} of {row['units']:.0f} units")
    if not low:
        return None
    return (
        f"{len(low)} of {len(groups)} layers collapsed at step {moments[-1][0]['step']:.0f} ({low[0]}); "
        "give the budget a floor, use a uniform one, or lower the sparsity."
    )


def _churns(moments: Sequence[Moment], groups: Sequence[Group], schedule: Schedule) -> str | None:
    now = moments[-1]
    if not now[0]["frozen"] or (len(moments) > 1 and moments[-2][0]["frozen"]):
        return None
    span = [moment for moment in moments if moment[0]["progress"] > now[0]["progress"] - _WINDOW]
    since = moments[-len(span) - 1][0]["progress"] if len(moments) > len(span) else 0.0
    for number, (rows, members) in enumerate(_rules(now, groups)):
        back = sum(row["regrown"] for moment in span for row in _rules(moment, groups)[number][0])
        share = back / sum(row["kept"] for row in rows)
        if share > _CHURN:
            return (
                f"The masks of target {members[0].rule.target} still churned when they froze: {share:.0%} of the kept units "
                f"came back since {since:.0%} of the run; raise pruning.schedule.freeze or train longer."
            )
    return None


def _stalls(moments: Sequence[Moment], groups: Sequence[Group], schedule: Schedule) -> str | None:
    last = moments[-_PATIENCE:]
    if len(last) < _PATIENCE or last[-1][0]["frozen"]:
        return None
    if last[-2][0]["progress"] <= schedule.begin:  # gates (l0) open then, and learn from the next step on
        return None
    still = [
        group.name
        for number, group in enumerate(groups)
        if all(moment[number]["learning"] <= _STILL for moment in last)  # NaN where gradients teach nothing
    ]
    if not still:
        return None
    return (
        f"The scores of {len(still)} of {len(groups)} layers ({still[0]}) have learned nothing in {_PATIENCE} records up to "
        f"step {last[-1][0]['step']:.0f}; check that finite gradients reach them and that their learning rate is not zero."
    )


def _rules(moment: Moment, groups: Sequence[Group]) -> list[tuple[Moment, list[Group]]]:
    """The rows and groups of each rule."""
    rules: dict[int, tuple[Moment, list[Group]]] = {}
    for row, group in zip(moment, groups, strict=True):
        rows, members = rules.setdefault(id(group.rule), ([], []))
        rows.append(row)
        members.append(group)
    return list(rules.values())


_LOOKS: dict[str, Callable[[Sequence[Moment], Sequence[Group], Schedule], str | None]] = {
    "start": _never_starts,
    "collapse": _collapses,
    "churn": _churns,
    "stall": _stalls,
}
