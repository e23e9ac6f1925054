"""Our figures are those of scikit-learn, rouge-score, sacrebleu and lm-evaluation-harness on the same predictions."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from eval.asking import Likelihood, Prompt, Reply
from eval.examples import Example
from eval.scoring import METRICS
from eval.scoring.code import pass_at
from eval.scoring.text import extracted

WORDS = ["some", "cat", "may", "sit", "on", "that", "mat", "and", "every", "red", "bird", "near", "two", "old", "trees"]
RANDOM = random.Random(6)


def sentence(low, high):
    return " ".join(RANDOM.choices(WORDS, k=RANDOM.randint(low, high)))


def spoiled(text):
    """Some words left out, some capitals, some punctuation."""
    kept = [word.title() if RANDOM.random() < 0.3 else word for word in text.split() if RANDOM.random() < 0.8]
    return " ".join(kept) + RANDOM.choice(["", ".", "!"])


RIGHT = [sentence(4, 12) for _ in range(60)]
SAID = [RANDOM.choice([text, text.title(), f"{text}.", spoiled(text), sentence(4, 12)]) for text in RIGHT]


def scores(name, said=SAID, right=RIGHT):
    return [METRICS[name].score(of(answer), Reply(texts=(text,))) for text, answer in zip(said, right, strict=True)]


def of(*answers, **fields):
    return Example(id="t/0", task="t", prompt=Prompt(text="?"), answers=answers, **fields)


@pytest.fixture(scope="module")
def harness():
    """lm-evaluation-harness's metrics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api import metrics
    return metrics


def test_exact_match_is_the_harness_s_and_scikit_learn_s_accuracy(harness):
    from sklearn.metrics import accuracy_score

    found = fmean(scores("exact_match"))
    assert 0 < found < 1
    assert found == pytest.approx(accuracy_score(RIGHT, SAID))
    assert found == pytest.approx(harness.exact_match_fn(predictions=SAID, references=RIGHT)["exact_match"])


def test_loose_exact_match_is_the_harness_s_without_case_and_punctuation(harness):
    options = {"ignore_case": True, "ignore_punctuation": True}
    theirs = harness.exact_match_fn(predictions=SAID, references=RIGHT, **options)["exact_match"]
    assert fmean(scores("exact_match")) < theirs
    assert fmean(scores("exact_match_loose")) == pytest.approx(theirs)


def test_numbers_are_found_as_in_the_harness_s_gsm8k(harness):
    from lm_eval.filters.extraction import RegexFilter

    said = ["so 5 of them, 12 in all", "$1,250.", "She has 7", "-3 degrees", "about 40, or 41"]
    right = ["12", "1250", "8", "-3", "40"]
    flexible = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    found = [each[0] for each in flexible.apply([[text] for text in said], [])]
    theirs = harness.exact_match_fn(
        predictions=found, references=right, ignore_case=True, regexes_to_ignore=[",", r"\$", r"(?s).*#### ", r"\.$"]
    )["exact_match"]
    assert fmean(scores("number", said, right)) == pytest.approx(theirs)


@pytest.mark.parametrize("pattern", [r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", r"\(([A-D])\)"])
def test_expressions_take_what_the_harness_s_filter_takes(pattern):
    from lm_eval.filters.extraction import RegexFilter

    texts = ["#### 5 and #### 72", "it is 7, or 12", "(A) no, (C)", "nothing"]
    theirs = [each[0] for each in RegexFilter(pattern, group_select=-1, fallback="").apply([[t] for t in texts], [])]
    assert [extracted(text, pattern) for text in texts] == theirs


def test_token_f1_is_that_of_bags_of_words():
    def slow(said, right):
        said, right = (text.lower().translate(str.maketrans("", "", ".!")).split() for text in (said, right))
        same = sum((Counter(said) & Counter(right)).values())
        return 2 * same / (len(said) + len(right))

    assert scores("f1") == pytest.approx([slow(*pair) for pair in zip(SAID, RIGHT, strict=True)])


def test_rouge_l_is_rouge_score_s_and_the_textbook_s():
    from rouge_score.rouge_scorer import RougeScorer

    def slow(said, right):
        said, right = (text.lower().translate(str.maketrans("", "", ".!")).split() for text in (said, right))
        longest = np.zeros((len(said) + 1, len(right) + 1), int)
        for i, a in enumerate(said):
            for j, b in enumerate(right):
                longest[i + 1, j + 1] = longest[i, j] + 1 if a == b else max(longest[i, j + 1], longest[i + 1, j])
        return 2 * longest[-1, -1] / (len(said) + len(right))

    scorer = RougeScorer(["rougeL"])
    pairs = list(zip(SAID, RIGHT, strict=True))
    assert scores("rouge_l") == pytest.approx([scorer.score(right, said)["rougeL"].fmeasure for said, right in pairs])
    assert scores("rouge_l") == pytest.approx([slow(*pair) for pair in pairs])


def test_bleu_is_sacrebleu_s_and_the_harness_s_of_one_sentence(harness):
    import sacrebleu

    ours = scores("bleu")
    theirs = [sacrebleu.sentence_bleu(said, [right]).score for said, right in zip(SAID, RIGHT, strict=True)]
    assert [100 * each for each in ours] == pytest.approx(theirs)
    long = [i for i, said in enumerate(SAID) if len(said.split()) > 3]  # shorter ones have no 4-grams: effective order
    assert [100 * ours[i] for i in long] == pytest.approx([harness.bleu([(RIGHT[i], SAID[i])]) for i in long])


def test_the_mean_of_sentence_bleu_is_not_corpus_bleu(harness):
    """As the documentation says. The harness reports the corpus figure."""
    assert abs(100 * fmean(scores("bleu")) - harness.bleu(list(zip(RIGHT, SAID, strict=True)))) > 1


@pytest.fixture(scope="module")
def multiple_choice(tmp_path_factory):
    """A task of the harness, by its own classes, and its documents."""
    folder: Path = tmp_path_factory.mktemp("task")
    rows = [{"question": RIGHT[i], "options": RIGHT[i : i + 4], "gold": i % 4} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.task import ConfigurableTask

        task = ConfigurableTask(
            config={
                "task": "moerge_choices",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder)},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{options}}",
                "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )
    return task, rows


def test_accuracy_and_its_normed_form_are_the_harness_s_and_scikit_learn_s(multiple_choice):
    from sklearn.metrics import accuracy_score

    task, rows = multiple_choice
    found = {"accuracy": [], "accuracy_norm": []}
    theirs = {"accuracy": [], "accuracy_norm": []}
    picked = []
    chance = random.Random(0)
    for row in rows:
        logprobs = [-chance.uniform(0.5, 1.5) * len(option) for option in row["options"]]
        example = of(choices=tuple(f" {option}" for option in row["options"]), gold=row["gold"])
        reply = Reply(likelihoods=tuple(Likelihood(logprob=each, tokens=1) for each in logprobs))
        for name in found:
            found[name].append(METRICS[name].score(example, reply))
        result = task.process_results(row, [(each, False) for each in logprobs])
        theirs["accuracy"].append(result["acc"])
        theirs["accuracy_norm"].append(result["acc_norm"])
        picked.append(int(np.argmax(logprobs)))
    assert found == theirs
    assert found["accuracy"] != found["accuracy_norm"]
    assert fmean(found["accuracy"]) == pytest.approx(accuracy_score([row["gold"] for row in rows], picked))


def test_pass_at_k_is_the_harness_s():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.tasks.cruxeval.utils import _pass_at_k

    for n, k in ((1, 1), (10, 1), (10, 5), (20, 10)):
        for c in range(n + 1):
            assert pass_at(k, n, c) == pytest.approx(_pass_at_k(n, c, k))
