"""Tables and the progress bar."""

from types import SimpleNamespace

from vitreg.printing import progress_bar, text_table


def test_columns_are_aligned_and_no_line_ends_in_spaces():
    rows = [["a", "1.5", "-"], ["longer [name]", "10.25", ""]]
    assert text_table(rows, ["", "norm", "more"]).splitlines() == [
        "                norm  more",
        "a                1.5     -",
        "longer [name]  10.25",
    ]
    assert text_table(rows, left=2).splitlines() == ["a              1.5    -", "longer [name]  10.25"]


def test_in_a_notebook_a_table_is_text_as_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert text_table([["a", "1.5"]]) == "a  1.5"
    assert capsys.readouterr().out == ""


def test_the_bar_has_loss_speed_and_the_time_that_is_left_of_this_run(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("rich.console.monotonic", lambda: clock.now)
    with progress_bar(True, 200, 100, elapsed=True, period=600) as show:
        for step in range(101, 111):
            clock.now += 40.0
            show(step, "loss 1.250")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loss 1.250" in shown.err
    assert "110/200" in shown.err
    assert "1:00:00" in shown.err  # 90 steps of 40 s


def test_no_bar_unless_asked_for(capfd):
    with progress_bar(False, 10) as show:
        show(1, "loss 1.0")
    assert capfd.readouterr() == ("", "")
