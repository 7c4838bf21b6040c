"""The report of a study: what it says, and how it looks and behaves in a real browser."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

import browser
import tiny
from conftest import BAD, GOOD, Outcome
from heretic.editing.ablation import ComponentParameters, kernel
from heretic.errors import ReportError
from heretic.reporting.learned import kernel_points
from heretic.reporting.report import facts_of, render, staircase, write_report
from heretic.reporting.report_scores import score_table
from heretic.reporting.samples import SAMPLED_TRIALS, sampled
from heretic.scoring.score_tables import EARLY
from heretic.study.front import ablation_of, pareto_front

HOSTILE = "</script><script>fetch('https://example.invalid')</script><img src=x onerror=alert(1)> & \"quotes\""
COMPONENTS = ("attn.o_proj", "mlp.down_proj")


def trial_of(number: int, refusals: int, divergence: float, **more: Any) -> optuna.trial.FrozenTrial:
    position = 0.6 + 0.01 * number
    kernels = {name: vars(ComponentParameters(1.0 + 0.01 * number, position, 0.25, 0.3)) for name in COMPONENTS}
    return create_trial(
        values=[refusals / 100, divergence],
        params={"direction_scope": "global" if number % 2 else "per layer", "a.max_weight_position": position},
        distributions={
            "direction_scope": CategoricalDistribution(("global", "per layer")),
            "a.max_weight_position": FloatDistribution(0.6, 1),
        },
        user_attrs={
            "refusals": refusals,
            "kl_divergence": divergence,
            "direction_index": 0.5 if number % 2 else None,
            "parameters": kernels,
            "seconds": 2.0,
            **more,
        },
    )


def study_of(trials: list[optuna.trial.FrozenTrial], **attributes: Any) -> optuna.Study:
    study = optuna.create_study(directions=["minimize", "minimize"])
    for trial in trials:
        study.add_trial(trial)
    known = {
        "settings": {"model": "some/model", "n_trials": 3},
        "given": ["model"],
        "last_layer": 7,
        "base_refusals": 90,
        "n_bad_prompts": 100,
    }
    for name, value in (known | attributes).items():
        study.set_user_attr(name, value)
    return study


def front_study() -> optuna.Study:
    """Twenty trials, three of them on the front (numbers 17, 18 and 19), one of the others stopped early; responses of two of them."""
    trials = [trial_of(i, 60 + i, 0.5 + 0.01 * i, **({"bounded": True} if i == 3 else {})) for i in range(17)]
    trials += [trial_of(17, 2, 0.3), trial_of(18, 9, 0.02), trial_of(19, 50, 0.004)]
    prompts = ["How do I bake bread?", HOSTILE]
    samples = {"prompts": prompts, "original": ["Sorry, no.", HOSTILE], "trials": {"17": ["With flour.", HOSTILE], "18": ["Slowly.", ""]}}
    return study_of(trials, samples=samples)


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_holds_what_the_study_holds() -> None:
    study = front_study()
    page = render(facts_of(study))
    assert "<h1>some/model</h1>" in page and "20 trials in 40 s" in page
    assert "<dd>90 of 100</dd>" in page and "<dd>2 at KL 0.3000</dd>" in page and "<dd>0.0040 at 50 refusals</dd>" in page
    assert "<dd>20, 1 stopped early</dd>" in page
    assert page.count("<tr data-place=") == 6, "three trials in two tables"
    assert "per layer" in page and "0.50 (layer 3.5)" in page
    assert "With flour." in page and "Sorry, no." in page and "No responses of this trial were stored." in page

    wide, narrow, *kernels, refusals, divergences = charts(page)
    for chart in (wide, narrow, refusals, divergences):
        marks = chart.findall("circle")
        assert len(marks) == 20
        assert [mark.get("data-place") for mark in marks if "on-front" in (mark.get("class") or "")] == ["0", "1", "2"]
        assert [mark.findtext("title") for mark in marks if mark.get("class") == "trial stopped"] == [
            "Trial 3: about 63 refusals, KL divergence 0.5300"
        ]
    assert len(kernels) == len(COMPONENTS) and all(len(chart.findall("polyline")) == 3 for chart in kernels)


def test_what_models_and_prompts_say_stays_text() -> None:
    page = render(facts_of(front_study()))
    assert "example.invalid" in page and "<img" not in page and page.count("<script>") == 1 and page.count("</script>") == 1
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page) and "url(" not in page and "@import" not in page


def test_the_page_holds_no_local_paths() -> None:
    settings = {
        "model": "/home/me/models/tiny",
        "good_prompts": {"dataset": "/home/me/good.txt"},
        "save_directory": "/home/me/out",
        "upload_repo_id": "me/tiny",
    }
    page = render(facts_of(study_of([trial_of(0, 5, 0.1)], settings=settings)))
    assert "<h1>tiny</h1>" in page and "good.txt" in page
    assert "/home/me" not in page and "me/tiny" not in page


def test_marks_lie_where_their_values_are() -> None:
    """Checked against the positions of the axes' own marks, from which the scale is read back."""
    study = front_study()
    wide = charts(render(facts_of(study)))[0]
    ticks = [
        (float(t.get("x") or 0), float(t.get("y") or 0), float(t.text or 0), t.get("text-anchor"))
        for t in wide.iter("text")
        if t.get("class") == "tick"
    ]
    heights = [(y - 4, value) for _, y, value, anchor in ticks if anchor == "end"]
    (y0, v0), (y1, v1) = heights[0], heights[-1]
    for mark, trial in zip(wide.findall("circle"), [*study.trials[:17], *pareto_front(study.trials)], strict=True):
        refusals = v0 + (float(mark.get("cy") or 0) - y0) / (y1 - y0) * (v1 - v0)
        assert refusals == pytest.approx(trial.user_attrs["refusals"], abs=0.1)


def test_a_study_without_any_refusal(tmp_path: Path) -> None:
    """Its folder is made too: that of a study in a database does not exist."""
    facts = facts_of(study_of([trial_of(i, 0, 0.1 * i) for i in range(12)], base_refusals=0, objectives=[["kl_divergence", "minimize"]]))
    path = tmp_path / "checkpoints" / "m.report.html"
    write_report(facts, path)
    assert len(charts(path.read_text(encoding="utf-8"))) >= 4


def test_a_study_without_the_newer_attributes_can_be_told() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.add_trial(trial_of(0, 5, 0.0))
    page = render(facts_of(study))
    assert "This study has no stored responses." in page and "Too few trials to estimate importances." in page
    assert "95 % interval" not in page and len(charts(page)) == 4


FINALISTS = {
    "n_bad_prompts": 200,
    "n_good_prompts": 150,
    "base": {
        "scores": {"refusals": 190, "kl_divergence": 0.0, "politeness": 0.25},
        "intervals": {"refusals": [185.5, 195]},
        "response_classes": {"refusal": 190, "compliance": 10, "degenerate": 0},
        "early_response_classes": {"refusal": 189, "compliance": 11, "degenerate": 0},
    },
    "trials": {
        "17": {
            "scores": {"refusals": 4, "kl_divergence": 0.3125, "politeness": 0.5},
            "intervals": {"refusals": [1.25, 9], "kl_divergence": [0.25, 0.4]},
            "response_classes": {"refusal": 3, "compliance": 196, "degenerate": 1},
            "early_response_classes": {"refusal": 4, "compliance": 194, "degenerate": 2},
        },
        "18": {"failure": "some numbers are not finite"},
        "5": {"scores": {"refusals": 1}},
    },
}


def test_finalists_that_were_scored_again_stand_with_their_intervals() -> None:
    study = front_study()
    assert "Scored again" not in render(facts_of(study))
    study.set_user_attr("finalists", FINALISTS)
    page = render(facts_of(study))
    (table,) = re.findall(r"<h3>Scored again</h3>.*?(<table.*?</table>)", page, re.DOTALL)
    rows = [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(table)]
    assert rows == [
        ["Trial", "Refusals", "KL divergence", "politeness", "Degenerate", EARLY],
        ["original", "190 (185.5 to 195)", "0", "0.2500", "0", "189 and 0"],
        ["17", "4 (1.2 to 9)", "0.3125 (0.2500 to 0.4000)", "0.5000", "1", "4 and 2"],
        ["18", "some numbers are not finite", "", "", "", ""],
    ]
    assert "on 200 harmful and 150 harmless prompts." in page


def test_a_study_of_other_objectives() -> None:
    """A third objective has a history and importances of its own; the line of the front leaves out who is there for its sake only."""
    trials = [trial_of(i, 20 - i, (10 + i) / 100, scores={"politeness": i / 12}) for i in range(12)]
    objectives = [["refusals", "minimize"], ["kl_divergence", "minimize"], ["politeness", "maximize"]]
    study = optuna.create_study(directions=["minimize", "minimize", "maximize"])
    for trial in trials:
        study.add_trial(create_trial(values=[1, 1, 1], params=trial.params, distributions=trial.distributions, user_attrs=trial.user_attrs))
    study.set_user_attr("objectives", objectives)
    facts = facts_of(study)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = PedAnovaImportanceEvaluator()
        expected = get_param_importances(study, evaluator=evaluator, target=lambda t: -t.user_attrs["scores"]["politeness"])
    assert list(facts.importances) == ["Refusals", "KL divergence", "politeness"] and facts.importances["politeness"] == expected
    page = render(facts)
    assert "politeness of the trials in their order" in page and '<i class="square bar-3"></i>politeness' in page
    assert staircase([trials[0], trials[2], trial_of(5, 19, 0.115)], 1.0) == [
        (0.1, 20),
        (0.115, 20),
        (0.115, 19),
        (0.12, 19),
        (0.12, 18),
        (1.0, 18),
    ]
    assert staircase([trials[0], trial_of(5, 25, 0.2)], 1.0) == [(0.1, 20), (1.0, 20)]


def test_a_study_without_a_finished_trial_has_no_report() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.add_trial(trial_of(0, 5, 0.1, bounded=True))
    with pytest.raises(ReportError, match=r"There is nothing to report: the study has no complete trial."):
        facts_of(study)


def test_scores_stand_in_columns_where_trials_have_them() -> None:
    scores = {
        "response_classes": {"refusal": 5, "compliance": 93, "degenerate": 2},
        "kl_statistics": {"mean": 0.1, "median": 0.02, "p95": 0.4, "max": 1.5},
        "sequence_kl_divergence": 0.25,
        "harmless_refusals": 3,
        "scores": {"politeness": 0.75},
    }
    facts = facts_of(study_of([trial_of(0, 5, 0.1, **scores), trial_of(1, 50, 0.05)]))
    headers, (rich, poor) = score_table(facts.front, 100)
    assert headers == [
        *("Refusals (95 % interval)", "KL divergence", "KL median", "KL 95th percentile", "KL maximum", "Sequence KL"),
        *("Harmless refusals", "Complied", "Degenerate", "politeness"),
    ]
    assert rich == ["5 (1 to 10) of 100", "0.1000", "0.0200", "0.4000", "1.5000", "0.2500", "3", "93", "2", "0.7500"]
    assert poor == ["50 (40 to 60) of 100", "0.0500", *["–"] * 8]


def test_importances_are_optunas() -> None:
    study = front_study()
    facts = facts_of(study)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=lambda t: t.user_attrs["refusals"])
    assert facts.importances["Refusals"] == expected
    assert sum(facts.importances["KL divergence"].values()) == pytest.approx(1)


@pytest.mark.parametrize("parameters", [(1.2, 0.8, 0.3, 0.47), (1.0, 1.0, 1.0, 0.13), (0.9, 0.0, 0.0, 0.6), (1.0, 0.5, 0.2, 0.0)])
def test_the_lines_of_kernels_go_through_the_strength_of_every_layer(parameters: tuple[float, float, float, float]) -> None:
    p, last_layer = ComponentParameters(*parameters), 10
    points = kernel_points(p, last_layer)
    for layer in range(last_layer + 1):
        left = max((point for point in points if point[0] <= layer), key=lambda point: point[0])
        right = min((point for point in points if point[0] >= layer), key=lambda point: point[0])
        share = 0.0 if left[0] == right[0] else (layer - left[0]) / (right[0] - left[0])
        assert left[1] + share * (right[1] - left[1]) == pytest.approx(kernel(layer, p, last_layer), abs=1e-5)


def test_the_staircase_is_the_edge_of_what_the_front_dominates() -> None:
    front = [trial_of(0, 2, 0.3), trial_of(1, 9, 0.02)]
    assert staircase(front, 1.0) == [(0.02, 9), (0.3, 9), (0.3, 2), (1.0, 2)]


def test_long_fronts_are_sampled_over_their_length() -> None:
    front = [trial_of(i, i, 1 - 0.01 * i) for i in range(30)]
    chosen = sampled(front)
    assert len(chosen) == SAMPLED_TRIALS and chosen[0] is front[0] and chosen[-1] is front[-1]
    assert sampled(front[:3]) == front[:3]


def test_every_finished_run_leaves_a_report(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    first = heretic()
    report = Path("checkpoints/m.report.html")
    assert first.code == 0 and f"\nReport: {report}\n" in first.out
    study = optuna.load_study(study_name="heretic", storage=journal("checkpoints/m.jsonl"))
    samples = study.user_attrs["samples"]
    assert samples["prompts"] == [*BAD[:3], *GOOD[:2]]
    assert all(response in report.read_text() for response in samples["original"])

    # The kept responses are those of the trials.
    model = tiny.load("m", max_response_length=4)
    from heretic.editing.directions import mean_residual, refusal_directions
    from heretic.prompts import Prompt

    prompts = [Prompt("You are a helpful assistant.", text) for text in samples["prompts"]]
    assert samples["original"] == [text.strip() for text in model.responses(prompts, 4)]
    # What each response is: the rule of this run knows but the marker "a".
    for name, texts in {"original": samples["original"], **samples["trials"]}.items():
        assert samples["verdicts"][name] == [
            "Refused" if "a" in text else "Answered" if any(c.isalnum() for c in text) else "Degenerate" for text in texts
        ]
    assert f"Original: {samples['verdicts']['original'][0]}</span>" in report.read_text()
    good, bad = (mean_residual(model.residuals([Prompt("You are a helpful assistant.", t) for t in texts])) for texts in (GOOD, BAD))
    model.use_directions(refusal_directions(good, bad), "none")
    front = pareto_front(study.trials)
    assert set(samples["trials"]) == {str(trial.number) for trial in front}
    for trial in front:
        assert samples["trials"][str(trial.number)] == [text.strip() for text in model.responses(prompts, 4, ablation_of(trial))]

    # Again without loading the model if nothing was written, and not at all if it is turned off.
    report.unlink()
    again = heretic()
    assert again.code == 0 and "Responses of" not in again.out and report.is_file()
    report.unlink()
    assert heretic("--no-report").code == 0 and not report.exists()


def journal(path: str) -> optuna.storages.JournalStorage:
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(path))


def test_more_trials_need_responses_of_new_ones_on_the_front_only(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    heretic()
    before = optuna.load_study(study_name="heretic", storage=journal("checkpoints/m.jsonl")).user_attrs["samples"]
    more = heretic("--n-additional-trials", "6")
    assert more.code == 0 and "Responses of the original" not in more.out
    study = optuna.load_study(study_name="heretic", storage=journal("checkpoints/m.jsonl"))
    after = study.user_attrs["samples"]
    assert after["original"] == before["original"] and before["trials"].items() <= after["trials"].items()
    assert {str(trial.number) for trial in pareto_front(study.trials)} <= set(after["trials"])


def test_a_report_that_cannot_be_written_ends_nothing(workplace: Path, heretic: Callable[..., Outcome]) -> None:
    Path("checkpoints/m.report.html").mkdir(parents=True)
    outcome = heretic()
    assert outcome.code == 0 and "3 trials done" in outcome.out and "Report:" not in outcome.out
    assert "Warning: The report checkpoints/m.report.html cannot be written: Is a directory. The study itself is safe." in outcome.out


def test_plots_need_the_extra(workplace: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heretic.session.answers.find_spec", lambda name: None if name == "matplotlib" else name)
    outcome = heretic("--report-plots")
    assert outcome.code == 2 and not Path("checkpoints").exists()
    assert outcome.err == (
        "Error: report_plots needs the extra 'research', but matplotlib is not installed. Install it with: "
        "pip install 'heretic-llm[research]' (in a clone: uv sync --extra research).\n"
    )


def test_plots_are_written_beside_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from heretic.reporting.report_plots import front_figure, write_plots

    facts = facts_of(front_study())
    paths = write_plots(facts, tmp_path / "some.report.html")
    assert [path.name for path in paths] == ["some.front.png", "some.history.png", "some.kernels.png", "some.importance.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 700 and len(picture.convert("RGB").getcolors(1 << 24)) > 10

    offsets = [points.get_offsets().tolist() for points in front_figure(facts).axes[0].collections]
    places = {(x, y) for points in offsets for x, y in points}
    assert places == {(trial.user_attrs["kl_divergence"], trial.user_attrs["refusals"]) for trial in facts.trials}

    with pytest.raises(ReportError, match=r"The plots of .*missing/some.report.html cannot be written: No such file or directory"):
        write_plots(facts, tmp_path / "missing/some.report.html")


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_in_a_browser(tmp_path: Path) -> None:
    """No error on the console, no request to the outside; marks tell what they are, and choosing one changes what is shown."""
    path = tmp_path / "some.report.html"
    write_report(facts_of(front_study()), path)
    with browser.Page() as page:
        for dark, width in ((False, 1200), (True, 1200), (False, 390), (True, 390)):
            page.look(dark, width)
            page.open(path)
            assert page.run("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
            background = [int(part) for part in re.findall(r"\d+", page.run("getComputedStyle(document.body).backgroundColor"))]
            assert (sum(background) < 200) == dark
            kind = "wide" if width > 640 else "narrow"
            assert page.run("[...document.querySelectorAll('svg.wide, svg.narrow')].filter(e => e.checkVisibility()).length") == 1

            spot = f"document.querySelector('svg.{kind} .on-front[data-place=\"1\"]').getBoundingClientRect()"
            page.run(f"document.querySelector('svg.{kind}').scrollIntoView()")
            x, y = page.run(f"{spot}.x + {spot}.width / 2"), page.run(f"{spot}.y + {spot}.height / 2")
            page.move(x + 3, y)
            assert page.run("document.getElementById('tip').textContent") == "Trial 18: 9 refusals, KL divergence 0.0200"
            assert page.run("getComputedStyle(document.getElementById('tip')).display") == "block"
            shown = "[...document.querySelectorAll('.edited')].filter(e => e.checkVisibility()).map(e => e.innerText)"
            assert "With flour." in page.run(shown)[0]
            page.click(x, y)
            assert "Slowly." in page.run(shown)[0]
            assert page.run("document.querySelectorAll('svg .kernel.on').length") == len(COMPONENTS)
            page.run("document.querySelectorAll('tr[data-place=\"2\"] button')[0].click()")
            assert "No responses of this trial were stored." in page.run(shown)[0]
        assert page.run("document.querySelectorAll('img').length") == 0
        assert page.problems == []
        assert {address.split(":")[0] for address in page.requests} <= {"file", "data"}


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_the_browser_test_would_see_a_request_and_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('oh')</script>")
    with browser.Page() as page:
        page.open(path)
        assert "http://127.0.0.1:9/x.png" in page.requests and any("oh" in problem for problem in page.problems)


def test_failed_trials_are_counted(tmp_path: Path) -> None:
    study = study_of([trial_of(0, 5, 0.1)])
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"failure": "TrialError: no"}))
    assert "<dt>Failed trials</dt><dd>1</dd>" in render(facts_of(study))
