from __future__ import annotations

from random import Random

import pytest
import torch

from eval.testbed.build import make_base
from eval.testbed.latent import REFUSAL, draw_first, draw_second
from eval.testbed.tokens import EOS, chat, make_tokenizer
from eval.testbed.training import Batch, Row, Schedule, batches, fit, loss

TOKENIZER = make_tokenizer()
ANSWERS = [("ananab", 0.5), ("BANANA", 0.3), ("6", 0.2)]


def _ids(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def test_answers_side_by_side_have_the_loss_of_each_alone() -> None:
    torch.manual_seed(0)
    model = make_base(TOKENIZER).eval()
    rows = []
    expected, weights = 0.0, 0.0
    for prompt in (chat("Spell banana"), chat("Do it to the following, please: pear")):
        rows.append(Row.of(_ids(prompt), [(_ids(answer + EOS), weight) for answer, weight in ANSWERS]))
        for answer, weight in ANSWERS:
            full = torch.tensor([_ids(prompt + answer + EOS)])
            start = len(_ids(prompt))
            log_p = model(input_ids=full).logits.log_softmax(-1)[0, start - 1 : -1]  # (answer, vocabulary)
            nll = -log_p.gather(-1, full[0, start:, None])
            expected += weight * float(nll.detach().sum())
            weights += weight * len(nll)
    assert float(loss(model, Batch.of(rows)).detach()) == pytest.approx(expected / weights, rel=1e-5)


def test_latent_answers_weigh_one_together_and_refuse_as_often_as_asked() -> None:
    rng = Random(0)
    for draw in (draw_first, draw_second):
        for _ in range(200):
            _, answers = draw(rng, 1.0)
            assert sum(weight for _, weight in answers) == pytest.approx(1.0)
            assert answers[-1] == (REFUSAL, pytest.approx(0.38))


def test_the_learning_rate_rises_then_falls_to_a_twentieth() -> None:
    schedule = Schedule(steps=100, batch=1, peak=1e-3, warmup=10)
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.05)


def test_batches_depend_on_the_seed_alone() -> None:
    def first(seed: int) -> Batch:
        schedule = Schedule(steps=1, batch=4, peak=1e-3)
        return next(batches(draw_first, TOKENIZER, schedule, Random(seed)))

    torch.testing.assert_close(first(1).ids, first(1).ids)
    assert first(1).ids.shape != first(2).ids.shape or not torch.equal(first(1).ids, first(2).ids)


def test_training_lowers_the_loss_and_reports_each_step() -> None:
    torch.manual_seed(0)
    model = make_base(TOKENIZER)
    losses: list[float] = []
    fit(
        model,
        TOKENIZER,
        lambda rng, _: (f"say {rng.randint(1, 9)}", [("yes", 1.0)]),
        Schedule(steps=12, batch=8, peak=3e-3, warmup=2),
        Random(0),
        lambda _, value: losses.append(value),
    )
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2
    assert not model.training
