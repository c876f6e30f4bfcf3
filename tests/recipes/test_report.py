"""The report says what came out, and the page of the docs too."""

import json
import re

import pytest
from lamina.recipes import RecipeError
from lamina.recipes.report import (
    newest,
    read_runs,
    save_results,
    show_mean,
    show_number,
    verdict,
    write_replications,
    write_report,
)


def change(finished, **values):
    (path,) = finished.glob("*/*/result.json")
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | values))
    return result | values


def test_the_page_holds_everything_and_needs_nothing(finished):
    (result,) = read_runs(finished)["lstm_digits"]
    html = (finished / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', html)
    assert html.count("data:image/png;base64,") == 2
    for text in (
        "An LSTM reads handwritten digits row by row",
        "Hochreiter",
        show_mean(result),
        "≥ 96.00 %",
        result["command"],
        result["versions"]["torch"],
        result["machine"]["cpu"],
        "Not the recipe as it stands",
        "2 (changed)",
        "7 (changed)",
        "Learning curves",
        "Confusion matrix",
    ):
        assert text in html, text


def test_a_miss_is_shown_as_a_miss(finished):
    html = write_report(finished).read_text()
    assert "This run missed its bar." in html
    assert '"badge missed"' in html
    assert '"badge reached"' not in html
    change(finished, met=True)
    html = write_report(finished).read_text()
    assert "missed its bar" not in html
    assert '"badge reached"' in html


def test_an_unfinished_run_is_shown_as_one(finished):
    change(finished, complete=False, met=False, value=None, std=None, results=[], pictures={})
    html = write_report(finished).read_text()
    assert "This run is unfinished." in html


def test_what_is_written_in_a_recipe_is_no_html(finished):
    change(finished, notes="<script>alert(1)</script>")
    assert "<script>" not in write_report(finished).read_text()


def test_a_paper_number_stands_beside_ours(finished):
    metric = change(finished)["metric"]
    change(finished, metric=metric | {"paper": 12.345, "paper_source": "Table 7"})
    html = write_report(finished).read_text()
    assert "the paper: Table 7" in html
    assert html.count("12.35 %") + html.count("12.34 %") == 2


def test_a_deleted_picture_and_a_damaged_result_do_not_stop_the_report(finished):
    (picture,) = finished.glob("*/*/learning_curves.png")
    picture.unlink()
    broken = finished / "vit_digits" / "2026-01-01T00-00-00Z" / "result.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"recipe": ')
    assert write_report(finished).read_text().count("data:image/png;base64,") == 1


def test_no_result_no_report(tmp_path, lamina):
    with pytest.raises(RecipeError, match="no results in"):
        write_report(tmp_path)
    assert "no results in" in lamina("report", "--out", tmp_path).line


def test_the_command_writes_the_same_page(finished, lamina):
    before = (finished / "index.html").read_text()
    (finished / "index.html").unlink()
    assert lamina("report", "--out", finished).status == 0
    date = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert date.sub("", (finished / "index.html").read_text()) == date.sub("", before)


def test_the_result_holds_mean_spread_and_origin(finished):
    (result,) = read_runs(finished)["lstm_digits"]
    values = [seed["value"] for seed in result["results"]]
    assert result["value"] == pytest.approx(sum(values) / 2)
    assert result["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert [seed["seed"] for seed in result["results"]] == result["seeds"] == [1, 2]
    assert result["complete"] is True
    assert result["met"] is False
    assert result["changed"] == {"epochs": 2, "model.hidden_dim": 7}
    assert result["model"]["config"]["hidden_dim"] == 7
    for seed in result["results"]:
        assert len(seed["history"]["val/accuracy"]) == 2
        assert sum(map(sum, seed["evidence"]["confusion"])) == 360
        right = sum(row[i] for i, row in enumerate(seed["evidence"]["confusion"]))
        assert seed["value"] == pytest.approx(100 * right / 360)


def test_the_saved_model_is_the_first_seeds(finished):
    from lamina.models import RecurrentClassifier
    from lamina.recipes.resume import load_checkpoint

    (folder,) = finished.glob("*/*/model")
    model = RecurrentClassifier.from_pretrained(folder)
    trained = load_checkpoint(folder.parent / "seed-1" / "last.ckpt")["state_dict"]
    for name, value in model.state_dict().items():
        assert value.equal(trained[f"model.{name}"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345, "12,345"), (True, "True"), (0.00012345, "0.0001234"), (float("nan"), "–"), ("gelu", "gelu")],
)
def test_a_value_is_shown_at_a_readable_length(value, text):
    assert show_number(value) == text


def test_newest_prefers_what_is_complete():
    runs = [{"complete": False, "n": 3}, {"complete": True, "n": 2}, {"complete": True, "n": 1}]
    assert newest(runs)["n"] == 2
    assert newest(runs[:1])["n"] == 3
    assert verdict({"complete": True, "met": False}) == "missed"


def test_only_the_recipe_as_it_stands_is_saved(finished, tmp_path):
    with pytest.raises(RecipeError, match="no complete run with its recipe's own settings"):
        save_results(finished, tmp_path / "results")
    change(finished, is_default=True)
    (path,) = save_results(finished, tmp_path / "results")
    assert re.fullmatch(r"lstm_digits-cpu-torch[\d.]+\.json", path.name)
    saved = json.loads(path.read_text())
    assert saved["results"][0].keys() == {"seed", "value", "minutes", "metrics"}
    assert str(tmp_path) not in path.read_text()


def test_replications_name_what_was_missed_and_what_was_not_run(finished, tmp_path):
    result = change(finished, is_default=True)
    save_results(finished, tmp_path / "results")
    page = write_replications(tmp_path / "page.md", tmp_path / "results").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| `lstm_digits`"))
    assert show_mean(result) in row
    assert "**missed**" in row
    assert f"| {result['torch'].partition('+')[0]} |" in row
    save_results(finished, tmp_path / "results")  # again: the file is replaced
    (row,) = (line for line in page.splitlines() if line.startswith("| `vit_digits`"))
    assert "not yet run" in row
    with pytest.raises(RecipeError, match="the docs are in a clone"):
        write_replications(tmp_path / "none" / "page.md", tmp_path / "results")
