"""Tables on standard error."""

from tomoe_training.tables import print_facts, print_table


def test_table_goes_to_standard_error_and_shows_every_fact(capsys):
    print_facts(
        {"kind": "checkpoint", "active_ratio": 0.49876, "total": 1234567, "widths": [32, 64], "read": {"flops": 10}}
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("ToMoE checkpoint", "active ratio", "0.4988", "1,234,567", "32 to 64, mean 48.0", "flops: 10"):
        assert text in captured.err


def test_rows_go_under_their_columns(capsys):
    print_table("scores", ["task", "value"], [["piqa", "0.7000"]])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(text in captured.err for text in ("scores", "task", "value", "piqa", "0.7000"))
