"""Scores of answers: `METRICS[example.metric].score(example, reply)`.

One figure to an example, as intervals and slices need it, from 0 to 1 (a log-likelihood: at most 0), higher is better.
A task's figure is their mean. That is what the literature calls accuracy, exact match, token F1, ROUGE-L and
pass@k; corpus BLEU, which divides sums instead of averaging quotients, is another number (`eval.scoring.text.bleu`).
"""

from __future__ import annotations

from eval.scoring.choices import Choice, LogLikelihood
from eval.scoring.code import PassAt
from eval.scoring.metric import CannotScore, Metric, Nothing
from eval.scoring.text import TextMetric, bleu, exact, f1, loose, number, rouge_l

__all__ = ["KS", "METRICS", "CannotScore", "Metric", "scorers"]

#: pass@k for these k.
KS = (1, 2, 5, 10, 20, 50, 100)


def scorers(*, allow_code: bool = False) -> dict[str, Metric]:
    """Metrics by name. pass@k refuses to score unless `allow_code`: it runs programs that a model has written."""
    metrics: list[Metric] = [
        TextMetric("exact_match", exact),
        TextMetric("exact_match_loose", loose),
        TextMetric("number", number),
        TextMetric("f1", f1),
        TextMetric("rouge_l", rouge_l),
        TextMetric("bleu", bleu),
        Choice("accuracy"),
        Choice("accuracy_norm", by_length=True),
        LogLikelihood(),
        *(PassAt(k, allowed=allow_code) for k in KS),
        Nothing(),
    ]
    return {metric.name: metric for metric in metrics}


METRICS = scorers()
