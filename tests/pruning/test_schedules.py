import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finllm_prune.errors import InputError
from finllm_prune.pruning import SCHEDULES, Constant, Cubic, Cyclic, Exponential, Linear, Schedule

fractions = st.floats(0.0, 1.0)


@st.composite
def spans(draw: st.DrawFn) -> tuple[float, float, float]:
    begin, end, freeze = sorted((draw(fractions), draw(fractions), draw(fractions)))
    assume(begin < end)
    return begin, end, freeze


def due_steps(schedule: Schedule, steps: int) -> list[int]:
    return [step for step in range(steps) if schedule.due(step / steps, (step + 1) / steps)]


@pytest.mark.parametrize("name", SCHEDULES)
@given(span=spans(), one=fractions, other=fractions)
def test_the_part_due_never_falls_and_stays_between_0_and_1(
    name: str, span: tuple[float, float, float], one: float, other: float
):
    schedule = SCHEDULES[name](*span)
    early, late = (schedule.fraction(progress) for progress in sorted((one, other)))
    assert 0.0 <= early <= late + 1e-12
    assert late <= 1.0


@pytest.mark.parametrize("name", SCHEDULES)
@given(span=spans(), progress=fractions)
def test_nothing_is_due_before_begin_and_all_from_end_on(name: str, span: tuple[float, float, float], progress: float):
    schedule = SCHEDULES[name](*span)
    if progress < schedule.begin:
        assert schedule.fraction(progress) == 0.0
    if progress >= schedule.end:
        assert schedule.fraction(progress) == 1.0
    assert schedule.fraction(schedule.end) == 1.0


@pytest.mark.parametrize("schedule", [Cubic(0.25, 0.75, 1.0), Linear(0.25, 0.75, 1.0)])
def test_a_gradual_schedule_starts_from_zero_at_begin(schedule: Schedule):
    assert schedule.fraction(0.25) == 0.0
    assert schedule.fraction(0.26) > 0.0


@pytest.mark.parametrize(
    ("schedule", "half"), [(Cubic(0.2, 0.6, 1.0), 0.875), (Linear(0.2, 0.6, 1.0), 0.5), (Constant(0.2, 0.6, 1.0), 1.0)]
)
def test_half_way_the_part_due_is_that_of_the_formula(schedule: Schedule, half: float):
    assert schedule.fraction(0.4) == pytest.approx(half)


@given(x=fractions, rate=st.floats(0.1, 20.0))
def test_the_exponential_ramp_is_its_formula(x: float, rate: float):
    expected = (1.0 - math.exp(-rate * x)) / (1.0 - math.exp(-rate))
    assert Exponential(0.2, 0.6, 1.0, rate=rate).fraction(0.2 + 0.4 * x) == pytest.approx(expected, abs=1e-9)


@given(number=st.integers(0, 3), into=fractions)
def test_each_round_of_the_cyclic_ramp_cuts_first_and_stands_still_for_the_rest(number: int, into: float):
    """Four rounds from 0.2 to 0.6, a quarter of each at rest: cubic stairs."""
    schedule = Cyclic(0.2, 0.6, 1.0, rounds=4, recover=0.25)
    stair = (number + min(1.0, into / 0.75)) / 4
    found = schedule.fraction(min(0.6, 0.2 + 0.1 * (number + 0.999 * into)))
    assert found == pytest.approx(1.0 - (1.0 - stair) ** 3, abs=2e-3)
    rest = [schedule.fraction(0.2 + 0.1 * (number + part)) for part in (0.76, 0.9, 0.99)]
    assert rest == pytest.approx([1.0 - (1.0 - (number + 1) / 4) ** 3] * 3)


@pytest.mark.parametrize(
    ("schedule", "knobs", "message"),
    [
        (Exponential, {"rate": 0.0}, "rate must be above 0"),
        (Exponential, {"rate": math.inf}, "rate must be above 0"),
        (Cyclic, {"rounds": 0}, "rounds must be at least 1 and recover at least 0 and below 1, not 0"),
        (Cyclic, {"recover": 1.0}, r"not 4 and 1\.0"),
    ],
)
def test_a_knob_out_of_range_is_refused(schedule: type[Schedule], knobs: dict[str, float], message: str):
    with pytest.raises(InputError, match=message):
        schedule(**knobs)


@pytest.mark.parametrize("name", SCHEDULES)
@given(span=spans(), updates=st.integers(1, 100), steps=st.integers(1, 120))
def test_masks_are_chosen_within_begin_and_freeze_and_at_freeze_always(
    name: str, span: tuple[float, float, float], updates: int, steps: int
):
    schedule = SCHEDULES[name](*span, updates)
    due = due_steps(schedule, steps)
    assert all((step + 1) / steps >= schedule.begin for step in due), "chosen before begin"
    assert all(step / steps < schedule.freeze for step in due), "chosen after freeze"
    reaching_freeze = next(step for step in range(steps) if (step + 1) / steps >= schedule.freeze)
    assert reaching_freeze in due
    assert len(due) <= updates + 1


@pytest.mark.parametrize("name", SCHEDULES)
@given(span=spans(), before=fractions, now=fractions)
def test_the_step_that_reaches_freeze_is_due_however_short_it_is(
    name: str, span: tuple[float, float, float], before: float, now: float
):
    schedule = SCHEDULES[name](*span)
    assert schedule.due(math.nextafter(schedule.freeze, 0.0), schedule.freeze)
    assert schedule.due(min(before, math.nextafter(schedule.freeze, 0.0)), max(now, schedule.freeze))


@pytest.mark.parametrize("updates", [1, 7, 64])
def test_a_long_run_has_all_its_updates_one_at_begin_and_the_last_at_freeze(updates: int):
    due = due_steps(Cubic(begin=0.1, end=0.7, freeze=0.9, updates=updates), 1000)
    assert len(due) == updates + 1
    assert due[0] == 99
    assert due[-1] == 899
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert max(gaps) - min(gaps) <= 1


def test_a_short_run_updates_in_every_step_from_begin_to_freeze():
    assert due_steps(Cubic(begin=0.2, end=0.7, freeze=0.9, updates=64), 10) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "span",
    [(0.5, 0.5, 0.9), (0.7, 0.1, 0.9), (0.1, 0.9, 0.7), (-0.1, 0.7, 0.9), (0.1, 0.7, 1.1), (float("nan"), 0.7, 0.9)],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_spans_that_are_not_in_order_are_refused(name: str, span: tuple[float, float, float]):
    with pytest.raises(InputError, match="0 <= begin < end <= freeze <= 1"):
        SCHEDULES[name](*span)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_without_updates_is_refused(name: str):
    with pytest.raises(InputError, match="updates must be at least 1"):
        SCHEDULES[name](updates=0)
