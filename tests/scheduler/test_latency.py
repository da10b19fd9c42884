"""The latency model against synthetic laws: what it recovers, what it learns, and what it must not do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core import Contents, PassCost, UnitCost
from coserve.profiling.fit import (
    ProfilePoint,
    by_layer,
    fit,
    load_profile,
    needed_points,
    non_negative_least_squares,
    profile_points,
    row_layers,
    save_profile,
    sequence_length,
)
from coserve.scheduler.latency import TERMS, LatencyModel, kind_of

Law = Callable[[Contents], float]
DECODE = PassCost(8, 8, 8, 4096, 0, 0, 0, 0, 0)
PREFILL = PassCost(64, 1, 0, 0, 2080, 0, 0, 0, 1)
FUSED = PassCost(40, 8, 8, 4096, 0, 32, 528, 32, 1)
FORWARD = UnitCost(False, 256, 4, 32896, 0)
BACKWARD = UnitCost(True, 256, 4, 32896, 0)


def law(contents: Contents) -> float:
    """A small model on two cores: a pass has a jump from one row to several; backward is twice forward."""
    seconds = 4e-4
    cost = contents.inference
    if cost:
        seconds += 0.03 + 0.004 * (cost.rows > 1) + 1e-3 * cost.rows + 2e-4 * cost.head_rows + 1e-4 * cost.decode_rows
        seconds += 2e-7 * cost.decode_context + 5e-8 * cost.prefill_pairs + 1e-4 * cost.adapter_segments
        seconds += 2e-3 * cost.prefill_spans + 3e-4 * cost.fused_rows + 8e-8 * cost.fused_pairs + 6e-4 * cost.fused_labels
    for unit in contents.units:
        per_layer = 2e-4 + 2.5e-5 * unit.rows + 5e-6 * min(unit.rows, 128) + 2e-9 * unit.pairs
        seconds += (2 if unit.backward else 1) * (3e-4 + unit.layers * per_layer) + 6e-4 * unit.labels
    if contents.optimizer_elements:
        seconds += 1e-4 + 4e-9 * contents.optimizer_elements + contents.refresh_seconds
    return seconds


def profile(keep: Callable[[Contents], bool] = lambda contents: True, measure: Law = law) -> list[ProfilePoint]:
    return [(contents, measure(contents)) for contents in profile_points(12, 2048) if keep(contents)]


MODEL = fit(profile())


def fresh() -> LatencyModel:
    return LatencyModel(MODEL.coefficients)


@st.composite
def passes(draw: st.DrawFn) -> PassCost:
    decode, prefill, fused = draw(st.integers(0, 64)), draw(st.integers(0, 1500)), draw(st.integers(0, 1500))
    rows = max(1, decode + prefill + fused)
    return PassCost(
        rows, draw(st.integers(0, rows)), decode, decode * draw(st.integers(1, 2000)), prefill * draw(st.integers(1, 1000)),
        fused, fused * draw(st.integers(1, 1000)), draw(st.integers(0, fused)), draw(st.integers(0, 8)),
    )


@st.composite
def units(draw: st.DrawFn) -> UnitCost:
    rows = draw(st.integers(1, 4096))
    backward = draw(st.booleans())
    labels = 0 if backward else draw(st.sampled_from([0, rows]))
    return UnitCost(backward, rows, draw(st.integers(1, 12)), rows * draw(st.integers(1, max(1, rows // 2))), labels)


CONTENTS = st.builds(
    Contents, st.none() | passes(), st.lists(units(), max_size=3).map(tuple), st.sampled_from([0, 1, 50_000, 1_000_000]),
    st.sampled_from([0.0, 0.02]),
)


# What an iteration is called.


@pytest.mark.parametrize(("contents", "kind"), [
    (Contents(None, (), 0), "idle"),
    (Contents(DECODE, (), 0), "decode"),
    (Contents(PREFILL, (), 0), "prefill"),
    (Contents(PassCost(72, 9, 8, 4096, 2080, 0, 0, 0, 0), (), 0), "decode+prefill"),
    (Contents(FUSED, (), 0), "decode+fused"),
    (Contents(PassCost(32, 0, 0, 0, 0, 32, 528, 0, 1), (), 0), "fused"),
    (Contents(DECODE, (FORWARD,), 0), "decode+forward"),
    (Contents(None, (BACKWARD, FORWARD, BACKWARD), 0), "forward+backward"),
    (Contents(PassCost(72, 9, 8, 4096, 2080, 0, 0, 0, 0), (BACKWARD,), 9), "decode+prefill+backward+optimizer"),
    (Contents(None, (), 9), "optimizer"),
])
def test_kinds(contents: Contents, kind: str) -> None:
    assert kind_of(contents) == kind


def test_a_backward_unit_pays_for_what_it_runs_again() -> None:
    model = fresh()
    again = model.unit_seconds(BACKWARD._replace(recompute_fraction=0.75))
    assert again == pytest.approx(model.unit_seconds(BACKWARD) + 0.75 * model.unit_seconds(FORWARD))


def test_a_law_may_have_knots_of_its_own() -> None:
    model = LatencyModel({
        ("inference", "once", 0): 1.0, ("inference", "rows", 211): 0.5, ("inference", "rows", 100): 0.25,
        ("forward", "rows", 7): 0.125, ("forward", "rows", 0): 0.0,
    })
    assert model.knots("inference", "rows") == (100, 211) and model.knots("forward", "rows") == (0, 7)
    assert model.knots("backward", "rows") == MODEL.knots("backward", "rows") == (0, 32, 128, 512), "of what nothing was said"
    prompt = PassCost(1, 0, 0, 0, 0, 0, 0, 0, 0)
    seconds = {rows: model.pass_seconds(prompt._replace(rows=rows)) for rows in (1, 100, 104, 211, 213)}
    assert seconds == {1: 1.0, 100: 1.0, 104: 2.0, 211: 28.75, 213: 29.75}
    assert model.unit_seconds(UnitCost(False, 9, 2, 0, 0)) == 2 * 2 * 0.125
    assert fresh().knots("inference", "rows") == MODEL.knots("inference", "rows") == (1, 2, 4, 16, 64, 256, 1024)


def test_an_optimizer_slice_pays_for_what_follows_from_it() -> None:
    model, bare = fresh(), fresh().optimizer_seconds(5000)
    contents = Contents(DECODE, (), 5000, 0.02)
    assert model.optimizer_seconds(5000, 0.02) == pytest.approx(bare + 0.02)
    assert model.seconds(contents) == pytest.approx(model.seconds(Contents(DECODE, (), 5000)) + 0.02)
    for _ in range(100):
        model.observe(contents, law(contents) + 0.03)
    assert model.corrections["optimizer"] > 1.1, "what was measured when the job began is corrected too"


# Profile points.


@pytest.mark.parametrize("max_rows", [1, 7, 32, 100, 300, 2048, 100_000])
@pytest.mark.parametrize("num_layers", [1, 2, 30])
def test_points_keep_to_the_limits(num_layers: int, max_rows: int) -> None:
    points = profile_points(num_layers, max_rows)
    assert len(points) == len(set(points)) <= 45
    for contents in points:
        if contents.inference is not None:
            cost = contents.inference
            prefill = cost.rows - cost.decode_rows - cost.fused_rows
            assert 1 <= cost.rows <= max_rows and prefill >= 0
            for rows, pairs in ((prefill, cost.prefill_pairs), (cost.fused_rows, cost.fused_pairs)):
                assert pairs == whole_sequences(rows, pairs)
        for unit in contents.units:
            assert 1 <= unit.rows <= max_rows and 1 <= unit.layers <= num_layers
            assert unit.pairs == whole_sequences(unit.rows, unit.pairs)
    kinds = {kind_of(contents) for contents in points}
    assert kinds >= {"decode", "prefill", "forward", "backward", "optimizer", "decode+backward", "forward+backward"}
    assert max_rows < 32 or kinds >= {"decode+prefill", "decode+fused"}


@pytest.mark.parametrize("max_rows", [1, 32, 2048, 100_000])
@pytest.mark.parametrize("num_layers", [1, 2, 30])
def test_needed_points_are_among_the_points_and_small(num_layers: int, max_rows: int) -> None:
    points, needed = profile_points(num_layers, max_rows), needed_points(num_layers, max_rows)
    assert set(needed) <= set(points) and len(needed) == len(set(needed)) <= 20
    assert max(row_layers(point, num_layers) for point in needed) <= max(2048, 64 * num_layers)


LAYERS = 32


def without_adapters(contents: Contents) -> Contents:
    """As the profile runs it."""
    cost = contents.inference
    return contents if cost is None else contents._replace(inference=cost._replace(adapter_segments=0))


def large_law(contents: Contents) -> float:
    """A model of 8 billion parameters on the same cores: reading the weights takes as long as a dozen rows' products."""
    seconds, cost = 1e-3, contents.inference
    if cost:
        seconds += max(0.65, 0.2 + 0.034 * cost.rows) + 6e-3 * cost.head_rows + 2e-3 * cost.decode_rows
        seconds += 6e-6 * cost.decode_context + LAYERS * 6e-8 * (cost.prefill_pairs + cost.fused_pairs)
        seconds += 1e-3 * cost.fused_rows + 1.2e-2 * cost.fused_labels
    for unit in contents.units:
        per_layer = max(2e-2, 6e-3 + 1.05e-3 * unit.rows) + 6e-8 * unit.pairs
        seconds += unit.layers * (1.3 * per_layer + 0.1 if unit.backward else per_layer) + 1.2e-2 * unit.labels
    return seconds + (1e-4 + 4e-9 * contents.optimizer_elements if contents.optimizer_elements else 0)


def test_the_needed_points_make_a_law() -> None:
    """Two fifths of the points and a fifth of their time, without a long pass: the rest is predicted to a third, long prompts,
    decoding and units far better."""
    needed = [without_adapters(contents) for contents in needed_points(LAYERS, 2048)]
    samples = [(contents, large_law(contents)) for contents in needed]
    others = [each for each in map(without_adapters, profile_points(LAYERS, 2048)) if each not in needed]
    assert sum(seconds for _, seconds in samples) < 0.25 * sum(map(large_law, profile_points(LAYERS, 2048)))
    derived = [sample for sample in (by_layer(contents, samples, LAYERS) for contents in others) if sample is not None]
    assert len(derived) == 3
    model = fit(samples + derived)
    errors = [abs(model.seconds(contents) / large_law(contents) - 1) for contents in others]
    assert max(errors) < 0.33 and np.median(errors) < 0.05
    long = [PassCost(rows, 1, 0, 0, rows * (rows + 1) // 2, 0, 0, 0, 0, 1) for rows in (200, 512, 1024, 2048)]
    for contents in (*(Contents(cost, (), 0) for cost in long), Contents(None, (FORWARD,), 0), Contents(None, (BACKWARD,), 0)):
        assert model.seconds(contents) == pytest.approx(large_law(contents), rel=0.15)


def test_a_pass_by_layers() -> None:
    unit = UnitCost(False, 256, 2, 32896, 0)
    samples = [(Contents(None, (unit,), 0), 0.4), (Contents(None, (unit,), 0), 0.3), (Contents(DECODE, (), 0), 0.05)]
    prefill = PassCost(256, 1, 0, 0, 32896, 0, 0, 0, 0, 1)
    fused = PassCost(264, 8, 8, 4096, 0, 256, 32896, 0, 0)
    for cost, seconds in ((prefill, 12 * 0.15), (fused, 12 * 0.15 + 0.05)):
        contents = Contents(cost, (), 0)
        assert by_layer(contents, samples, 12) == (contents, pytest.approx(seconds))
    for unknown in (
        Contents(prefill._replace(rows=128, prefill_pairs=8256), (), 0), Contents(fused._replace(fused_labels=9), (), 0),
        Contents(fused._replace(decode_rows=4, rows=260), (), 0), Contents(prefill, (unit,), 0), Contents(None, (unit,), 0),
        Contents(prefill, (), 9), Contents(PassCost(8, 8, 8, 99, 0, 0, 0, 0, 0), (), 0),
        Contents(PassCost(520, 9, 8, 99, 32896, 256, 32896, 0, 0), (), 0),
    ):
        assert by_layer(unknown, samples, 12) is None
    short, unit = Contents(PassCost(32, 1, 0, 0, 528, 0, 0, 0, 0, 1), (), 0), UnitCost(False, 32, 1, 528, 0)
    assert by_layer(short, [(Contents(None, (unit,), 0), 0.1)], 12) is None


def test_row_layers() -> None:
    assert row_layers(Contents(DECODE, (FORWARD, BACKWARD), 9), 12) == 8 * 12 + 2 * 256 * 4
    assert row_layers(Contents(None, (), 9), 12) == 0


def whole_sequences(rows: int, pairs: int) -> int:
    """Query-key pairs, counted, of whole sequences of the length that is read from the point."""
    if not rows:
        return 0
    length = sequence_length(rows, pairs)
    assert rows % length == 0
    return rows // length * sum(range(1, length + 1))


def test_points_run_twice_are_a_matter_of_seconds_on_a_slow_machine() -> None:
    assert 2 * sum(seconds for _, seconds in profile()) < 12


# The fit.


def test_fit_recovers_a_law_from_its_profile() -> None:
    for contents, seconds in profile():
        assert MODEL.seconds(contents) == pytest.approx(seconds, rel=0.02)


@settings(max_examples=300, deadline=None)
@given(CONTENTS.filter(lambda contents: kind_of(contents) != "idle"))
def test_fit_holds_for_what_was_not_profiled(contents: Contents) -> None:
    assert MODEL.seconds(contents) == pytest.approx(law(contents), rel=0.03)


def test_parts_add_up() -> None:
    contents = Contents(DECODE, (FORWARD, BACKWARD), 5000)
    units = MODEL.unit_seconds(FORWARD) + MODEL.unit_seconds(BACKWARD)
    rest = MODEL.constant_seconds + MODEL.pass_seconds(DECODE) + MODEL.optimizer_seconds(5000)
    assert MODEL.seconds(contents) == pytest.approx(units + rest)
    assert MODEL.optimizer_seconds(0) == 0 < MODEL.optimizer_seconds(1)


def test_fit_bears_noise_and_stalls_in_the_profile() -> None:
    for seed in range(5):
        noise = random.Random(seed)
        samples = [(contents, seconds * noise.lognormvariate(0, 0.03)) for contents, seconds in profile() * 2]
        for stalled in (noise.randrange(len(samples)), noise.randrange(len(samples))):
            samples[stalled] = (samples[stalled][0], 5 * samples[stalled][1])
        model = fit(samples)
        errors = [abs(model.seconds(contents) / seconds - 1) for contents, seconds in profile()]
        assert np.median(errors) < 0.03 and np.quantile(errors, 0.95) < 0.1


def test_rows_beyond_the_profile_go_on_at_its_slope() -> None:
    few = fit(profile(lambda contents: contents.inference is None or contents.inference.rows <= 144))
    long = PassCost(2000, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert few.pass_seconds(long) == pytest.approx(law(Contents(long, (), 0)), rel=0.1)


def test_fused_rows_never_seen_cost_more_than_other_rows() -> None:
    model = fit(profile(lambda contents: not (contents.inference and contents.inference.fused_rows)))
    plain = FUSED._replace(fused_rows=0, fused_pairs=0, fused_labels=0)
    rows_only = FUSED._replace(fused_pairs=0, fused_labels=0)
    slope = (model.pass_seconds(plain._replace(rows=2000)) - model.pass_seconds(plain._replace(rows=1999)))
    assert model.pass_seconds(rows_only) - model.pass_seconds(plain) == pytest.approx(0.25 * slope * 32)
    labels = model.pass_seconds(FUSED) - model.pass_seconds(FUSED._replace(fused_labels=0))
    assert labels == pytest.approx(32 * 6e-4, rel=0.05), "the label rows of forward units say what those of fused rows cost"


def test_labels_never_seen_cost_twice_the_output_head() -> None:
    def without_labels(contents: Contents) -> bool:
        fused = contents.inference.fused_labels if contents.inference else 0
        return not fused and not any(unit.labels for unit in contents.units)

    model = fit(profile(without_labels))
    head = PREFILL._replace(rows=1000)
    slope = model.pass_seconds(head._replace(head_rows=1000)) - model.pass_seconds(head._replace(head_rows=999))
    assert slope > 0
    assert model.unit_seconds(FORWARD._replace(labels=10)) - model.unit_seconds(FORWARD) == pytest.approx(20 * slope)
    assert model.pass_seconds(FUSED) - model.pass_seconds(FUSED._replace(fused_labels=0)) == pytest.approx(64 * slope)


@pytest.mark.parametrize(("seen", "unseen", "factor"), [(FORWARD, BACKWARD, 2.0), (BACKWARD, FORWARD, 0.5)])
def test_a_direction_never_seen_costs_like_the_other(seen: UnitCost, unseen: UnitCost, factor: float) -> None:
    model = fit(profile(lambda contents: all(unit.backward == seen.backward for unit in contents.units)))
    assert model.unit_seconds(unseen) == pytest.approx(factor * model.unit_seconds(seen))


def test_fit_of_one_sample() -> None:
    model = fit([(Contents(DECODE, (), 0), 0.05)])
    assert model.seconds(Contents(DECODE, (), 0)) == pytest.approx(0.05, rel=1e-3)
    assert model.unit_seconds(FORWARD) == 0 and model.optimizer_seconds(1000) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CONTENTS, st.floats(1e-6, 1e3)), min_size=1, max_size=12), passes(), units(), st.integers(1, 3000))
def test_any_profile_gives_costs_that_never_fall_with_rows(
    samples: list[ProfilePoint], cost: PassCost, unit: UnitCost, more: int,
) -> None:
    model = fit(samples)
    assert all(coefficient >= 0 for coefficient in model.coefficients.values())
    for contents, seconds in samples:
        assert model.seconds(contents) >= 0
        model.observe(contents, seconds)
    assert all(0.25 <= factor <= 4 for factor in model.corrections.values())
    serving = cost._replace(rows=cost.rows - cost.fused_rows, fused_rows=0, fused_pairs=0, fused_labels=0)
    assert 0 <= model.pass_seconds(serving) <= model.pass_seconds(serving._replace(rows=serving.rows + more))
    assert 0 <= model.unit_seconds(unit) <= model.unit_seconds(unit._replace(rows=unit.rows + more))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_least_squares_meets_the_optimality_conditions(seed: int, num_rows: int, num_columns: int, collinear: bool) -> None:
    """At the least, the residual's gradient is 0 where the solution is positive, and doesn't pull a 0 upwards."""
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(num_rows, num_columns)) * 10.0 ** generator.integers(-3, 4, num_columns)
    if collinear:
        matrix[:, -1] = 2 * matrix[:, 0]
        matrix[:, num_columns // 2] = 0
    target = generator.normal(size=num_rows)
    solution = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ solution) / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    assert (solution >= 0).all()
    assert gradient.max() < 1e-7 and np.abs(gradient[solution > 0]).max(initial=0) < 1e-7


# Learning from iterations.


def slowed(backward: float) -> Law:
    def measure(contents: Contents) -> float:
        units = sum(law(Contents(None, (unit,), 0)) - 4e-4 for unit in contents.units if unit.backward)
        return law(contents) + (backward - 1) * units

    return measure


def workload(number: int, seed: int) -> list[Contents]:
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        decode = draw.randint(1, 32)
        inference = PassCost(decode, decode, decode, decode * draw.randint(50, 800), 0, 0, 0, 0, 1)
        windows = tuple(
            UnitCost(draw.random() < 0.6, draw.choice([64, 128, 512]), draw.randint(1, 6), 20_000, 0)
            for _ in range(draw.choice([0, 1, 1, 2]))
        )
        made.append(Contents(inference if draw.random() < 0.8 or not windows else None, windows, 0))
    return made


def test_a_slower_group_is_learnt_without_hurting_the_others() -> None:
    model, measure, noise = fresh(), slowed(backward=1.4), random.Random(1)
    for contents in workload(400, seed=0):
        model.observe(contents, measure(contents) * noise.lognormvariate(0, 0.02))
    corrections = model.corrections
    assert corrections["backward"] == pytest.approx(1.4, rel=0.06)
    assert corrections["decode"] == pytest.approx(1, abs=0.05)
    assert corrections["forward"] == pytest.approx(1, abs=0.08)
    assert corrections["optimizer"] == 1
    errors = [abs(model.seconds(contents) / measure(contents) - 1) for contents in workload(100, seed=9)]
    assert np.median(errors) < 0.03 and max(errors) < 0.1


def test_a_lasting_change_of_one_kind_is_learnt_in_a_few_dozen_iterations() -> None:
    model, contents = fresh(), Contents(DECODE, (), 0)
    for _ in range(40):
        model.observe(contents, 1.4 * law(contents))
    assert model.seconds(contents) == pytest.approx(1.4 * law(contents), rel=0.02)
    assert model.corrections["backward"] == 1


def test_a_lone_stall_hardly_moves_predictions() -> None:
    model, contents = fresh(), Contents(DECODE, (BACKWARD,), 0)
    for _ in range(10):
        model.observe(contents, law(contents))
    before = model.seconds(contents)
    model.observe(contents, 100 * before)
    assert before < model.seconds(contents) < 1.03 * before
    model.observe(contents, law(contents))
    assert model.seconds(contents) < 1.03 * before


def test_corrections_stay_within_bounds_and_come_back() -> None:
    model, contents = fresh(), Contents(DECODE, (), 0)
    for factor, bound in ((1000.0, 4.0), (0.0, 0.25)):
        for _ in range(200):
            model.observe(contents, factor * law(contents))
        assert model.corrections["decode"] == bound
    for _ in range(200):
        model.observe(contents, law(contents))
    assert model.corrections["decode"] == pytest.approx(1, rel=0.01)


def test_a_model_that_knows_nothing_learns_nothing() -> None:
    model = LatencyModel({})
    model.observe(Contents(DECODE, (FORWARD,), 10), 1.0)
    assert model.seconds(Contents(DECODE, (FORWARD,), 10)) == 0 and model.errors() == {}


# How wrong it has been.


def test_reserve_is_the_95th_percentile_of_finetuning_iterations() -> None:
    model = LatencyModel({("iteration", "once", 0): 1.0})  # no group can be corrected: residuals are what is given
    finetuning = [Contents(FUSED, (), 0), Contents(None, (BACKWARD,), 0), Contents(DECODE, (), 5)]
    for index in range(19):
        model.observe(finetuning[index % 3], 2.0)
        model.observe(Contents(DECODE, (), 0), 2.0)
    assert model.reserve() == 0.1, "19 iterations held finetuning work, as many did not"
    model.observe(finetuning[0], 2.0)
    assert model.reserve() == 0.5
    for index in range(200):
        model.observe(finetuning[index % 3], 1.0 + index / 1000)
    assert model.reserve() == pytest.approx(0.18905), "between the 190th and 191st of 200; what came before is forgotten"
    for _ in range(200):
        model.observe(finetuning[1], 0.5)
    assert model.reserve() == 0.005


def test_large_errors_don_t_keep_finetuning_away_for_good() -> None:
    """A reserve of half lets no unit in, so that no later error could replace those that raised it."""
    model = LatencyModel({("iteration", "once", 0): 1.0})
    for _ in range(30):
        model.observe(Contents(None, (BACKWARD,), 0), 2.0)
    for _ in range(360):
        assert model.reserve() == 0.5
        model.observe(Contents(DECODE, (), 0), 1.0)
    for _ in range(60):
        model.observe(Contents(DECODE, (), 0), 1.0)
    assert model.reserve() == 0.1, "as at the start"


def test_errors_are_those_of_predictions_made_before_the_update() -> None:
    model, contents = fresh(), Contents(DECODE, (), 0)
    before = model.seconds(contents)
    model.observe(contents, 1.3 * before)
    assert model.seconds(contents) > before
    (summary,) = model.errors().values()
    assert summary == (1, pytest.approx(0.3), pytest.approx(0.3))


def test_errors_by_kind_over_the_last_thousand() -> None:
    model = LatencyModel({("iteration", "once", 0): 1.0})
    for _ in range(30):
        model.observe(Contents(DECODE, (), 0), 9.0)
    for index in range(1000):
        model.observe(Contents(DECODE, (), 0), 1.0 + (-1) ** index * index / 1000)
    model.observe(Contents(None, (BACKWARD,), 0), 1.25)
    errors = model.errors()
    assert set(errors) == {"decode", "backward", "finetuning"}
    assert errors["decode"] == (1000, pytest.approx(0.4995), pytest.approx(0.94905))
    assert errors["backward"] == errors["finetuning"] == (1, 0.25, 0.25)


def test_errors_of_all_kinds_with_finetuning_are_pooled() -> None:
    model = LatencyModel({("iteration", "once", 0): 1.0})
    model.observe(Contents(DECODE, (), 0), 9.0)
    for contents, seconds in zip(((), (BACKWARD,), (BACKWARD,)), (1.2, 1.4, 1.6), strict=True):
        model.observe(Contents(FUSED, contents, 0), seconds)
    assert model.errors()["finetuning"] == (3, pytest.approx(0.4), pytest.approx(0.58))


# The profile's file.


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "made" / "profile.json"
    samples = [*profile(), (Contents(None, (), 0), 1e-4)]
    save_profile(path, "model cpu float32", samples)
    assert load_profile(path, "model cpu float32") == samples
    assert load_profile(path, "model cpu bfloat16") is None
    save_profile(path, "other", samples[:1])
    assert load_profile(path, "other") == samples[:1]
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"], "no temporary file is left"


def test_a_failed_write_leaves_the_old_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(path, "key", profile())
    with pytest.raises(TypeError):
        save_profile(path, "key", [(Contents(None, (), 0), object())])  # type: ignore[list-item]
    assert load_profile(path, "key") == profile()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"version": 1, "key": "key"}',
                                  '{"version": 1, "key": "key", "samples": []}', '{"version": 1, "key": "key", "samples": [7]}',
                                  '{"version": 0, "key": "key", "samples": []}', "\ud800"])
def test_a_damaged_file_is_no_profile(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    assert load_profile(path, "key") is None
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert load_profile(path, "key") is None
    assert load_profile(tmp_path, "key") is None


@pytest.mark.parametrize(("field", "value"), [
    ("seconds", 0), ("seconds", -1.0), ("seconds", float("nan")), ("seconds", float("inf")), ("seconds", "1"),
    ("seconds", True), ("seconds", 10**400),
    ("optimizer_elements", -1), ("optimizer_elements", 1.5), ("inference", {"rows": 1}), ("inference", [1]),
    ("inference", {**DECODE._asdict(), "rows": "8"}), ("inference", {**DECODE._asdict(), "rows": -8}),
    ("inference", {**DECODE._asdict(), "columns": 8}), ("units", 3), ("units", [{**FORWARD._asdict(), "backward": 1}]),
    ("units", [{**FORWARD._asdict(), "rows": None}]), ("units", None),
])
def test_a_sample_with_a_wrong_field_is_no_profile(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "profile.json"
    save_profile(path, "key", [(Contents(DECODE, (FORWARD,), 9), 0.5)])
    data = json.loads(path.read_text())
    assert load_profile(path, "key") is not None
    data["samples"][0][field] = value
    path.write_text(json.dumps(data))
    assert load_profile(path, "key") is None


def test_an_older_format_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(path, "key", profile())
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "version": data["version"] - 1}))
    assert load_profile(path, "key") is None


# A GPU: passes that only decode are captured, others are not.

GPU_LAYERS, STEP_S = 32, 4.2e-3


def gpu_law(contents: Contents) -> float:
    """8 billion parameters on an H100: rows are free up to the ridge of 211, a captured pass starts at once, and the layers of
    a unit take at least as long as their launches."""
    seconds, cost, ridge, row = 2e-4, contents.inference, 211, 23e-6
    if cost:
        seconds += 3e-4 + row * max(ridge, cost.rows) + 4e-4 + 3e-8 * cost.decode_context + 1.6e-9 * cost.prefill_pairs
        seconds += STEP_S * (cost.rows > cost.decode_rows) + 1e-6 * max(0, cost.head_rows - ridge)
        seconds += (5e-4 if cost.fused_rows else 0) + 1e-6 * cost.fused_rows + 1.6e-9 * cost.fused_pairs
        seconds += 3e-6 * cost.fused_labels
    for unit in contents.units:
        launched, factor = (5e-4, 1.05) if unit.backward else (2e-4, 1.0)
        products = factor * row * max(ridge, unit.rows) / GPU_LAYERS + (2.5 if unit.backward else 1) * 5e-11 * unit.pairs
        seconds += 3e-5 + unit.layers * max(launched, products) + 3e-6 * unit.labels
    return seconds + (2e-5 + 1e-11 * contents.optimizer_elements if contents.optimizer_elements else 0)


def gpu_profile() -> list[ProfilePoint]:
    return [(point, gpu_law(point)) for point in map(without_adapters, profile_points(GPU_LAYERS, 8192, gpu_seqs=512))]


def test_what_is_not_captured_costs_a_step() -> None:
    terms = {("inference", "once", 0): 1.0, ("inference", "uncaptured", 0): 4.0, ("inference", "fused_rows", 0): 0.25}
    model, bare = LatencyModel(terms), LatencyModel({("inference", "once", 0): 1.0})
    assert model.uncaptured_seconds == 4.0 and bare.uncaptured_seconds == 0.0
    mixed = DECODE._replace(rows=72, prefill_spans=1)
    assert [model.pass_seconds(cost) for cost in (DECODE, PREFILL, mixed, FUSED)] == [1.0, 5.0, 5.0, 13.0]
    assert [bare.pass_seconds(cost) for cost in (DECODE, PREFILL, mixed, FUSED)] == [1.0] * 4
    model.corrections.update(decode=2.0, prefill=3.0, fused=0.5)
    assert model.pass_seconds(DECODE) == 2.0
    assert model.pass_seconds(mixed) == 2.0 + 3 * 4.0, "it belongs to the prompts"
    assert model.pass_seconds(FUSED) == 2.0 + 0.5 * (4.0 + 32 * 0.25), "or to the rows that ride"
    assert model.pass_seconds(mixed._replace(rows=104, fused_rows=32)) == 2.0 + 3 * 4.0 + 0.5 * 8.0, "but once"


def test_a_cpu_has_no_such_step() -> None:
    """Its fit names the terms that it always did, at the knots that it always did."""
    assert set(MODEL.coefficients) == {
        (group, term.field, knot) for group, terms in TERMS.items() for term in terms for knot in term.knots
    } - {("inference", "uncaptured", 0)}
    assert MODEL.uncaptured_seconds == 0.0


@pytest.mark.parametrize("max_rows", [1, 100, 2048, 8192])
def test_points_of_a_gpu(max_rows: int) -> None:
    points = profile_points(GPU_LAYERS, max_rows, gpu_seqs=300)
    costs = [point.inference for point in points if point.inference is not None]
    assert set(profile_points(GPU_LAYERS, max_rows)) <= set(points) and len(points) <= 100
    assert max(cost.rows for cost in costs) == max_rows == max(unit.rows for point in points for unit in point.units)
    assert max(cost.decode_rows for cost in costs) == min(300, max_rows)
    assert max_rows < 8192 or max(cost.fused_rows for cost in costs) == 2048


def test_a_fit_of_a_gpu_finds_the_step() -> None:
    model = fit(gpu_profile(), gpu=True)
    assert model.uncaptured_seconds == pytest.approx(STEP_S, rel=0.1)
    errors = [abs(model.seconds(point) / seconds - 1) for point, seconds in gpu_profile()]
    assert max(errors) < 0.04 and np.median(errors) < 0.01


def test_a_fit_of_a_gpu_holds_for_what_was_not_profiled() -> None:
    model, on_cpu = fit(gpu_profile(), gpu=True), fit(gpu_profile())
    contents = [
        *(Contents(PassCost(rows, rows, rows, 300 * rows, 0, 0, 0, 0, 0), (), 0) for rows in (1, 24, 50, 150, 211, 400)),
        *(Contents(PassCost(100 + rows, 101, 100, 30_000, rows * (rows + 1) // 2, 0, 0, 0, 0, 1), (), 0)
          for rows in (10, 90, 300, 1500, 6000)),
        *(Contents(PassCost(150 + rows, 150, 150, 45_000, 0, rows, rows * 400, 0, 0), (), 0) for rows in (16, 61, 300, 1500)),
        *(Contents(None, (UnitCost(back, rows, 8, rows * 300, 0),), 0)
          for back in (False, True) for rows in (24, 100, 211, 300, 700, 1500, 6000)),
    ]
    errors = {point: abs(model.seconds(point) / gpu_law(point) - 1) for point in contents}
    assert max(errors.values()) < 0.1 and np.median(list(errors.values())) < 0.02
    assert max(abs(on_cpu.seconds(point) / gpu_law(point) - 1) for point in contents) > 0.2, "a CPU's terms can't say it"
