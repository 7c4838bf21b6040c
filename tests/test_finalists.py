"""Finalists: which trials are scored again, on what, and where it is kept and shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, create_trial

import tiny
from conftest import BAD, GOOD, Outcome
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.errors import CheckpointError
from heretic.evaluator import Evaluator
from heretic.prompts import Prompt
from heretic.scoring.divergence import OriginalAnswers
from heretic.scoring.measured import measure_original
from heretic.scoring.responses import RefusalRule
from heretic.scoring.score_tables import (
    EARLY,
    Baseline,
    degenerate,
    finalist_rows,
    format_figure,
    format_interval,
    refused,
    score_rows,
    verdicts_text,
)
from heretic.study.front import front_of
from heretic.study.learned_edits import LearnedEdits

Heretic = Callable[..., Outcome]
JOURNAL = Path("checkpoints/m.jsonl")


def study() -> optuna.Study:
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(JOURNAL))))


def known() -> dict[str, Any]:
    found: dict[str, Any] = study().user_attrs["finalists"]
    return found


def test_the_best_of_the_front_are_scored_again(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--n-trials", "6", "--n-finalists", "2")
    assert outcome.code == 0, outcome.err
    front = front_of(study())
    assert list(known()["trials"]) == [str(trial.number) for trial in front[:2]]
    assert "Scored again on 5 harmful and 5 harmless prompts, at most 4 tokens (95 % bootstrap intervals in brackets)" in outcome.out
    for trial in front[:2]:
        entry = known()["trials"][str(trial.number)]
        # On the same prompts the figures are the same.
        assert entry["scores"]["refusals"] == trial.user_attrs["refusals"]
        assert entry["scores"]["kl_divergence"] == pytest.approx(trial.user_attrs["kl_divergence"], rel=1e-4)
        assert entry["response_classes"] == trial.user_attrs["response_classes"]
        assert 0 <= entry["scores"]["harmless_refusals"] <= 5
        for name, value in entry["scores"].items():
            low, high = entry["intervals"][name]
            assert low <= value <= high
    base = known()["base"]
    assert base["scores"]["refusals"] == study().user_attrs["base_refusals"]
    assert "harmless_refusals" in base["scores"]


def test_what_the_search_took_of_the_original_serves_again_for_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.load(tiny.save(tmp_path / "m", tiny.build()))
    model.use_directions(tiny.unit_directions(3, 32), "full")
    good, bad = ([Prompt("", text) for text in texts] for texts in (GOOD, BAD))
    settings = tiny.settings(tmp_path / "m", max_response_length=4, refusal_markers=["a"])
    first = measure_original(settings, model, good, bad)
    longer = settings.model_copy(update={"max_response_length": 8})
    asked = []
    record = OriginalAnswers.record
    monkeypatch.setattr(OriginalAnswers, "record", lambda self, *rest: asked.append(1) or record(self, *rest))
    again, anew = (measure_original(longer, model, good, bad, all_scorers=True, like=like) for like in (first, None))
    assert (len(asked), again.answers is first.answers) == (1, True)
    trial = Ablation(None, {name: ComponentParameters(1.2, 0.5, 1.0, 1.0) for name in ("attn.o_proj", "mlp.down_proj")})
    assert again.scores == anew.scores
    a, b = (Evaluator(longer, model, original).score(trial) for original in (again, anew))
    assert {name: a.scores[name] for name in a.scores} == pytest.approx({name: b.scores[name] for name in b.scores}, abs=1e-6)
    other_prompts = measure_original(longer, model, good[1:], bad, like=first)
    other_tokens = measure_original(settings.model_copy(update={"kl_tokens": 3}), model, good, bad, like=first)
    assert len(asked) == 3 and first.answers not in (other_prompts.answers, other_tokens.answers)


def test_a_finished_study_is_shown_without_the_model(heretic: Heretic, workplace: Path) -> None:
    first = heretic()
    content = JOURNAL.read_bytes()
    again = heretic()
    assert "Loading m" in first.out and "Loading m" not in again.out
    table = first.out[first.out.index("Scored again") :]
    assert table in again.out
    assert JOURNAL.read_bytes() == content


def test_what_is_missing_is_made_up_for(heretic: Heretic, workplace: Path) -> None:
    """A run killed while it scored them again, more trials, and other conditions."""
    assert heretic("--n-finalists", "0").code == 0
    assert "finalists" not in study().user_attrs
    outcome = heretic("--n-finalists", "2")
    assert "Search: 3 trials, 3 done" in outcome.out and len(known()["trials"]) >= 1
    before = known()
    outcome = heretic("--n-finalists", "2", "--final-response-length", "9")
    assert "at most 9 tokens" in outcome.out
    assert known()["conditions"]["max_response_length"] == 9 != before["conditions"]["max_response_length"]
    outcome = heretic("--n-finalists", "2", "--final-response-length", "9")
    assert "Loading m" not in outcome.out and "at most 9 tokens" in outcome.out


def test_other_prompts_and_longer_answers(heretic: Heretic, workplace: Path) -> None:
    Path("more.txt").write_text("bake my bike\nfix the cat\nhello hello\n", encoding="utf-8")
    outcome = heretic("--final-bad-prompts.dataset", "more.txt", "--final-kl-tokens", "2", "--refusal-markers", '["a", "e", "o"]')
    assert outcome.code == 0, outcome.err
    assert "Scored again on 3 harmful and 5 harmless prompts" in outcome.out
    conditions = known()["conditions"]
    assert conditions["bad_evaluation_prompts"]["dataset"] == "more.txt" and conditions["kl_tokens"] == 2
    assert sum(known()["base"]["response_classes"].values()) == 3
    for trial in front_of(study()):
        entry = known()["trials"].get(str(trial.number))
        assert entry is None or sum(entry["response_classes"].values()) == 3


def test_prompts_that_are_missing_or_too_long_are_told_first(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--final-bad-prompts.dataset", "none.txt")
    assert outcome.code == 1 and "none.txt" in outcome.err and "Loading m" not in outcome.out
    Path("long.txt").write_text("cat " * 250, encoding="utf-8")
    outcome = heretic("--final-bad-prompts.dataset", "long.txt")
    assert outcome.code == 1
    assert "final_bad_prompts: prompt 1 has" in outcome.err
    assert "or decrease final_response_length and final_kl_tokens" in outcome.err
    assert "Search" not in outcome.out


def test_finalists_that_cannot_be_scored_leave_the_front_as_it_is(heretic: Heretic, workplace: Path) -> None:
    outcome = heretic("--final-response-length", "300")
    assert outcome.code == 0
    assert "Warning: The finalists were not scored again: final_good_prompts: prompt 1 has" in outcome.out
    assert "Pareto front" in outcome.out and "Scored again" not in outcome.out


def test_final_prompts_that_the_original_does_not_refuse(heretic: Heretic, workplace: Path) -> None:
    rule, model = RefusalRule([]), tiny.load("m")
    asked = {text: model.responses([Prompt("You are a helpful assistant.", text)], 4)[0] for text in [*BAD, *GOOD]}
    mild = next(text for text in GOOD if rule.classify(asked[text], True) == "compliance")
    marker = next(word for text in BAD for word in asked[text].split() if word not in asked[mild])
    Path("mild.txt").write_text(mild, encoding="utf-8")
    outcome = heretic("--final-bad-prompts.dataset", "mild.txt", "--refusal-markers", json.dumps([marker]))
    assert outcome.code == 0
    assert "Warning: The finalists were not scored again: The model refuses none of the 1 harmful evaluation prompts" in outcome.out


def test_an_interrupted_scoring_goes_on_to_the_front(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("heretic.study.finalists.measure_original", interrupt)
        outcome = heretic()
    assert outcome.code == 0
    assert "Interrupted: the finalists were not scored again." in outcome.out and "Pareto front" in outcome.out
    assert "Scored again on 5" in heretic().out


def test_a_finalist_whose_edit_is_missing_is_left_to_a_later_run(
    heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heretic("--n-trials", "6", "--n-finalists", "0", "--no-report").code == 0
    first, second, *_ = front_of(study())
    ablation_of = LearnedEdits.ablation_of

    def without_second(edits: LearnedEdits, trial: FrozenTrial) -> Ablation:
        if trial.number == second.number:
            raise CheckpointError("The file is missing.")
        return ablation_of(edits, trial)

    scoring = ["--n-trials", "6", "--n-finalists", "2", "--no-report"]
    with monkeypatch.context() as patch:
        patch.setattr(LearnedEdits, "ablation_of", without_second)
        outcome = heretic(*scoring)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"Warning: Trial {second.number} was not scored again: The file is missing." in outcome.out
    assert list(known()["trials"]) == [str(first.number)]
    assert heretic(*scoring).code == 0
    assert list(known()["trials"]) == [str(first.number), str(second.number)]


def test_the_record_has_them(heretic: Heretic, workplace: Path) -> None:
    saving = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
    assert heretic(*saving).code == 0
    record = json.loads(Path("out/heretic.json").read_text())
    number = str(record["trial"]["number"])
    again = record["measurements"]["again"]
    assert {name: again[name] for name in known()["trials"][number]} == json.loads(json.dumps(known()["trials"][number]))
    assert again["n_bad_prompts"] == 5 and again["base"] == json.loads(json.dumps(known()["base"]))
    assert record["measurements"]["response_classes"] == study().trials[int(number)].user_attrs["response_classes"]


def test_the_record_names_no_path_of_this_machine(heretic: Heretic, workplace: Path) -> None:
    place = workplace / "elsewhere"
    place.mkdir()
    (place / "more.txt").write_text("bake my bike\nfix the cat\n", encoding="utf-8")
    (place / "mine.py").write_text(
        "from heretic.scoring.scorers import Scorer\n\nclass One(Scorer):\n    def score(self, outputs):\n        return 1\n",
        encoding="utf-8",
    )
    saving = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
    scorers = json.dumps({"one": {"use": f"{place / 'mine.py'}:One"}})
    outcome = heretic(*saving, "--final-good-prompts.dataset", place / "more.txt", "--scorers", scorers)
    assert outcome.code == 0, outcome.err
    text = Path("out/heretic.json").read_text()
    assert str(workplace) not in text and str(workplace) not in Path("out/README.md").read_text()
    record = json.loads(text)
    assert record["measurements"]["again"]["conditions"]["good_evaluation_prompts"]["dataset"] == "more.txt"
    assert record["settings"]["scorers"]["one"]["use"] == "mine.py:One"


def test_scores_by_one_command(heretic: Heretic, workplace: Path) -> None:
    """Without a terminal: all figures of a trial of the front, and the prompts with the largest divergence."""
    assert heretic().code == 0
    outcome = heretic("--trial-index", "0", "--model-action", "scores")
    assert outcome.code == 0, outcome.err
    chosen = front_of(study())[0]
    assert f"Scores of trial {chosen.number}" in outcome.out and "Scored again (95 % interval)" in outcome.out
    assert f"│ {chosen.user_attrs['kl_statistics']['max']:.4f}" in outcome.out
    moved = outcome.out[outcome.out.index("Prompts with the largest KL divergence") :]
    assert [moved.count(f"│ {text} ") for text in GOOD] == [1] * len(GOOD)
    divergences = [float(line.split("│")[2]) for line in moved.splitlines() if line.startswith("│")]
    assert divergences == sorted(divergences, reverse=True)
    assert np.mean(divergences) == pytest.approx(chosen.user_attrs["kl_divergence"], abs=1e-4)
    outcome = heretic("--model-action", "scores")
    assert (outcome.code, outcome.err) == (
        2,
        "Error: --model-action scores needs --trial-index if there is no terminal to ask at.\n",
    )


def test_scores_of_another_model(heretic: Heretic, workplace: Path) -> None:
    saving = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
    assert heretic(*saving).code == 0
    number = str(front_of(study())[0].number)
    entry = known()["trials"][number]
    outcome = heretic("--evaluate-model", "out")
    assert outcome.code == 0, outcome.err
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if line.startswith("│")]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["Refusals"] == [
        format_interval(described["scores"]["refusals"], described["intervals"]["refusals"]) for described in (known()["base"], entry)
    ]
    harmless = known()["base"]["scores"]["harmless_refusals"], entry["scores"]["harmless_refusals"]
    assert [cell.split(" ")[0] for cell in rows["Harmless refusals"]] == [f"{count:.0f}" for count in harmless]
    assert float(rows["Sequence KL"][1].split(" ")[0]) == pytest.approx(entry["scores"]["sequence_kl_divergence"], abs=1e-4)
    assert float(rows["KL divergence, maximum"][1]) == pytest.approx(entry["kl_statistics"]["max"], abs=1e-4)
    assert int(rows["Responses: compliance"][1]) == entry["response_classes"]["compliance"]
    assert "Prompts with the largest KL divergence" in outcome.out


def test_the_card_has_them(heretic: Heretic, workplace: Path) -> None:
    saving = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
    assert heretic(*saving).code == 0
    chosen = front_of(study())[0]
    again, base = known()["trials"][str(chosen.number)], known()["base"]
    card = Path("out/README.md").read_text()
    before = study().user_attrs["base_response_classes"]["degenerate"]
    after = chosen.user_attrs["response_classes"]["degenerate"]
    assert f"| degenerate responses to them (empty, repetitive or cut short) | {before} | {after} |\n" in card
    sequence = chosen.user_attrs["sequence_kl_divergence"]
    assert f"| KL divergence along the original's responses, 16 tokens (nats) | 0 | {sequence:.4f} |\n" in card
    before, after = base["scores"]["harmless_refusals"], again["scores"]["harmless_refusals"]
    assert f"| refusals on 5 harmless prompts | {before:.0f} | {after:.0f} |\n\n" in card


# Tables


def trial(**attributes: Any) -> Any:
    return create_trial(values=[0.0, 0.0], user_attrs={"refusals": 9, "kl_divergence": 0.5, **attributes})


def test_texts_of_figures() -> None:
    assert [format_figure(value) for value in (3, 3.0, 0.12345, 1e-9)] == ["3", "3", "0.1235", "0.0000"]
    assert format_interval(7.0, (3.0, 12.5)) == "7 (3 to 12.5)"
    assert format_interval(0.01, (0.0, 0.02)) == "0.0100 (0.0000 to 0.0200)"
    assert format_interval(0.25, None) == "0.2500"


def attributes(**more: Any) -> dict[str, Any]:
    return dict(trial(**more).user_attrs)


def test_verdicts_beside_the_originals() -> None:
    original = Baseline(100, 30, {"refusal": 30, "compliance": 65, "degenerate": 5})
    classes = {"refusal": 9, "compliance": 86, "degenerate": 5}
    assert verdicts_text(attributes(response_classes=classes), original) == "9 of 100 refused (original 30), 5 degenerate (original 5)"
    classes = {"refusal": 7, "compliance": 90, "degenerate": 3}
    told = attributes(response_classes=classes)  # 9 count: 7 refused, and 2 degenerate while the original's are not
    assert verdicts_text(told, original) == "7 of 100 refused (original 30), 3 degenerate (original 5; 2 new)"
    assert (refused(told), degenerate(told)) == ("7", "3 (2 new)")
    assert verdicts_text(attributes(response_classes=classes, bounded=True), original) == "about 9 of 100 refused (original 30)"
    whole = {"refusal": 9, "compliance": 91, "degenerate": 0}
    assert verdicts_text(attributes(response_classes=whole), original) == "9 of 100 refused (original 30), 0 degenerate (original 5)"
    assert verdicts_text(attributes(response_classes=whole), Baseline(100, 30)) == "9 of 100 refused (original 30)"
    assert verdicts_text(attributes(), Baseline()) == "9 refused"
    assert original.described() == "refuses 30 of 100, 5 degenerate"
    assert Baseline(None, 30).described() == "refuses 30" and Baseline().described() == ""
    assert Baseline.of(original.attributes()) == original


def entry(refusals: float, degenerate: int = 0) -> dict[str, Any]:
    return {
        "scores": {"refusals": refusals, "harmless_refusals": 0.0},
        "intervals": {"refusals": [1.0, 12.0]},
        "response_classes": {"refusal": 8, "compliance": 90, "degenerate": degenerate},
        "early_response_classes": {"refusal": 7, "compliance": 93, "degenerate": 0},
        "kl_statistics": {"median": 0.1, "p95": 0.2, "max": 0.3},
    }


def test_tables_of_finalists_and_of_one_trial() -> None:
    number = trial().number
    stored = {"base": entry(100), "trials": {str(number): entry(10, 2)}}
    headers, rows = finalist_rows([trial()], stored)
    assert headers == ["Trial", "Refusals", "Harmless refusals", "Degenerate", EARLY]
    assert rows == [["original", "100 (1 to 12)", "0", "0", "7 and 0"], [str(number), "10 (1 to 12)", "0", "2", "7 and 0"]]
    assert finalist_rows([trial()], {}) == ([], [])
    failed = {"base": entry(100), "trials": {str(number): {"failure": "not finite"}}}
    assert finalist_rows([trial()], failed)[1][1] == [str(number), "not finite", "", "", ""]

    attributes = {"scores": {"refusals": 9, "kl_divergence": 0.5, "mine": 2.5}, "kl_statistics": {"median": 0.4, "p95": 1.5, "max": 2.0}}
    headers, rows = score_rows(trial(**attributes), {"refusals": 100.0, "kl_divergence": 0.0, "mine": 1.5}, stored)
    assert headers == ["", "Original", f"Trial {number}", "Scored again (95 % interval)"]
    assert rows[:4] == [
        ["Refusals", "100", "9", "10 (1 to 12)"],
        ["KL divergence", "0", "0.5000", ""],
        ["mine", "1.5000", "2.5000", ""],
        ["Harmless refusals", "0", "", "0"],
    ]
    assert rows[4] == ["KL divergence, median", "0.1000", "0.4000", "0.1000"]
    assert rows[-4] == ["Responses: degenerate (empty, repetitive or cut short)", "0", "", "2"]
    assert rows[-3:] == [
        ["Early verdicts: refusal", "7", "", "7"],
        ["Early verdicts: compliance", "93", "", "93"],
        ["Early verdicts: degenerate (empty, repetitive or cut short)", "0", "", "0"],
    ]
    assert score_rows(trial(), {}, {})[1] == [["Refusals", "", "9", ""], ["KL divergence", "", "0.5000", ""]]
