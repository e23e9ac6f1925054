"""Many systems at once, against SciPy one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test

from eval.figures import Parts, Sampled, _by_search, _by_sums, gains, over_tasks, pooled, quantiles
from eval.intervals import FEW, Draws, Groups, estimate, flipped

MANY = [f"t{n % 12}" for n in range(60)]  # tasks are drawn
SOME = [f"t{n % 3}" for n in range(24)]  # prompts are


def scores(tasks: list[str], systems: int = 3, missing: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    found = rng.random((len(tasks), systems)) + rng.random((len(tasks), 1))
    found[rng.random(found.shape) < missing] = np.nan
    return found


def of_task(values: np.ndarray, tasks: list[str], task: str) -> np.ndarray:
    return values[np.array(tasks) == task]


def scipy_interval(samples: list[np.ndarray], statistic, seed: int = 0) -> tuple[float, float]:
    found = bootstrap(
        samples,
        statistic,
        n_resamples=500,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(seed),
    )
    return tuple(found.confidence_interval)


def test_a_mean_over_many_tasks_draws_tasks() -> None:
    values = scores(MANY)
    found = over_tasks(Parts.of(values), Draws(MANY, resamples=500)).estimates()
    for system, each in enumerate(found):
        means = [of_task(values[:, system], MANY, f"t{n}").mean() for n in range(12)]
        assert each.value == pytest.approx(np.mean(means))
        assert (each.low, each.high) == pytest.approx(scipy_interval([np.array(means)], np.mean))


def test_a_mean_over_few_tasks_draws_prompts_within_them() -> None:
    values = scores(SOME)
    found = over_tasks(Parts.of(values), Draws(SOME, resamples=500)).estimates()
    for system, each in enumerate(found):
        samples = [of_task(values[:, system], SOME, f"t{n}") for n in range(3)]
        mean = lambda *drawn: np.mean([one.mean() for one in drawn])  # noqa: E731
        assert each.value == pytest.approx(mean(*samples))
        assert (each.low, each.high) == pytest.approx(scipy_interval(samples, mean))


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("tasks", [MANY, SOME])
def test_a_share_of_the_oracle_is_drawn_with_the_oracle(tasks: list[str], missing: float) -> None:
    values = scores(tasks, missing=missing)
    draws = Draws(tasks, resamples=500)
    ours, oracle = Parts.of(values[:, :1]), Parts.of(values[:, 1:2])
    found = over_tasks(ours, draws, oracle).estimates()[0]
    samples = [of_task(values, tasks, task) for task in dict.fromkeys(tasks)]
    share = lambda drawn: np.mean([np.divide(*np.nanmean(one, axis=0)[:2]) for one in drawn])  # noqa: E731
    assert found.value == pytest.approx(share(samples))
    assert found.low < found.value < found.high
    assert over_tasks(oracle, draws, oracle).estimates()[0] == over_tasks(oracle, draws, oracle).estimates()[0]
    assert over_tasks(oracle, draws, oracle).estimates()[0].low == pytest.approx(1)
    if draws.by_task:
        shares = np.array([share([one]) for one in samples])
        assert (found.low, found.high) == pytest.approx(scipy_interval([shares], np.mean))


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_a_share_of_prompts_is_as_eval_intervals_has_it(missing: float) -> None:
    values = scores(MANY, missing=missing)
    found = pooled(Parts.of(values), Draws(MANY, resamples=500)).estimates()
    for system, each in enumerate(found):
        twin = estimate(lambda rows, s=system: np.nanmean(values[rows, s]), [Groups(MANY)], resamples=500)
        assert (each.value, each.low, each.high) == pytest.approx((twin.value, twin.low, twin.high))


def test_prompts_of_few_tasks_are_drawn_task_by_task() -> None:
    values = scores(SOME)
    found = pooled(Parts.of(values), Draws(SOME, resamples=500)).estimates()[0]
    samples = [of_task(values[:, 0], SOME, f"t{n}") for n in range(3)]
    low, high = scipy_interval(samples, lambda *drawn: np.concatenate(drawn).mean())
    assert (found.low, found.high) == pytest.approx((low, high))


def test_draws_in_chunks_are_as_many_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.intervals.CHUNK", 240)
    draws = Draws(SOME, resamples=35)
    chunks = list(draws)
    assert [len(chunk) for chunk in chunks] == [10, 10, 10, 5]
    counts = np.concatenate(chunks)
    np.testing.assert_array_equal(counts, np.concatenate(list(draws)))
    for task in range(3):
        assert (counts[:, draws.members(task)].sum(axis=1) == 8).all()
    assert Draws(["a"] * FEW).by_task is False
    assert Draws(range(FEW)).by_task is True


def test_systems_without_anything_say_nothing() -> None:
    values = scores(MANY)
    values[:, 1] = np.nan
    for found in (over_tasks(Parts.of(values), Draws(MANY)), pooled(Parts.of(values), Draws(MANY))):
        assert np.isnan(found.value).tolist() == [False, True, False]
        told = found.estimates()
        assert np.isnan([told[1].value, told[1].low, told[1].high]).all()
        assert not np.isnan([told[0].low, told[2].high]).any()


@pytest.mark.parametrize("tasks", [MANY, SOME])
def test_quantiles_are_of_drawn_values(tasks: list[str]) -> None:
    values = np.random.default_rng(1).gamma(2, 50, 2 * len(tasks))  # two of every prompt
    prompts = np.tile(np.arange(len(tasks)), 2)
    draws = Draws(tasks, resamples=200)
    found = quantiles(values, prompts, (0.5, 0.95), draws).estimates()
    counts = np.concatenate(list(draws))[:, draws.of[prompts]].astype(int)
    for share, each in zip((0.5, 0.95), found, strict=True):
        drawn = [np.percentile(np.repeat(values, row), 100 * share, method="inverted_cdf") for row in counts]
        assert each.value == pytest.approx(np.percentile(values, 100 * share, method="inverted_cdf"))
        assert (each.low, each.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_searching_finds_what_adding_up_finds() -> None:
    rng = np.random.default_rng(0)
    ascending, units = np.sort(rng.integers(0, 30, 100).astype(float)), rng.integers(0, 7, 100)
    counts = rng.integers(0, 3, (50, 7)).astype(float)
    counts[0] = 0
    shares = np.array([0.01, 0.5, 0.95, 1.0])
    found = _by_search(ascending, units, counts, shares)
    np.testing.assert_array_equal(found, _by_sums(ascending, units, counts, shares))
    assert np.isnan(found[0]).all()


def test_no_values_have_no_quantiles() -> None:
    found = quantiles(np.zeros(0), np.zeros(0, int), (0.5, 0.95), Draws(SOME))
    assert np.isnan(found.value).all()


@pytest.mark.parametrize("tasks", [MANY, SOME])
def test_gains_add_up_to_the_figure(tasks: list[str]) -> None:
    parts, draws = Parts.of(scores(tasks, missing=0.3)), Draws(tasks)
    np.testing.assert_allclose(gains(parts, draws).sum(axis=0), over_tasks(parts, draws).value)


def test_p_values_are_of_the_exact_permutation_test() -> None:
    rng = np.random.default_rng(0)
    gained = rng.normal(0.3, 1, (11, 4))
    found = flipped(gained)
    for system in range(4):
        twin = permutation_test(
            (gained[:, system], np.zeros(11)),
            lambda a, b, axis: (a - b).mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        assert found[system] == pytest.approx(twin.pvalue)


def test_p_values_of_many_units_are_near_the_normal_ones() -> None:
    gained = np.random.default_rng(3).normal(0.1, 1, (400, 3))
    from scipy.stats import norm

    expected = 2 * norm.sf(np.abs(gained.sum(axis=0)) / np.sqrt((gained**2).sum(axis=0)))
    assert flipped(gained) == pytest.approx(expected, abs=0.015)


def test_equal_systems_do_not_differ() -> None:
    assert flipped(np.zeros((30, 2))).tolist() == [1, 1]
    assert flipped(np.zeros((3, 2))).tolist() == [1, 1]
    told = Sampled.certain(np.array([1.0, 1.0])).gained([0], [1]).estimates()[0]
    assert (told.value, told.low, told.high) == (0, 0, 0)
