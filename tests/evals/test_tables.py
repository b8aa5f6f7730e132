"""Tables as a person sees them: every number whole at any width, on a terminal and in a pipe."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from evals import tables
from evals.results import percent_over, print_comparison, print_results
from evals.tables import ResultTable

PROTOCOL = {"context": 512, "stride": 511, "first_token_scored": True, "bos_added": True, "bos": [1]}
FILE = "/a/very/long/folder/of/texts/that/nobody/would/shorten/wikitext-2-valid.txt"


def over_chips(mean: float, std: float, clean: float) -> dict:
    found = {"non_finite_chips": 3, "tokens": 1_234_567}
    for name, scale in (("perplexity", 1.0), ("bits_per_byte", 0.01)):
        found |= {name: mean * scale, f"{name}_std": std * scale, f"{name}_clean": clean * scale}
    return found | {"perplexity_per_chip": [mean], "bits_per_byte_per_chip": [mean * 0.01]}


ROW = over_chips(17907.571234, 1234.567891, 206.331234)
LANGUAGE = ROW | {"degradation": 85.789, "degradation_std": 12.3456, "nats_rise": 1.23456, "nats_rise_std": 0.5}
LANGUAGE |= {"perplexity_ratio": 12345.678, "perplexity_ratio_std": 123.4}
HARDWARE = {"table": ["1. bitflip: 35 layers"], "mode": "chip", "noise_seed": 1234, "chips": 5, "first_chip": 1}
DISPARITY = {"ratio": None, "undefined": "a disparity needs two languages", "note": None}
RESULT = {
    "model": "model",
    **HARDWARE,
    "protocol": PROTOCOL,
    "text": {FILE: ROW},
    "tasks": {"arc_challenge_of_a_long_name": {"acc_norm,none": 0.25, "acc_norm,none_std": 0.012, "acc_norm,none_clean": 0.5,
                                               "acc_norm,none_per_chip": [0.25], "non_finite_chips": 12}},
    "languages": {"de": LANGUAGE, "a language with a long name": LANGUAGE},
    "disparity": DISPARITY,
}  # fmt: skip
SET = {**HARDWARE, "text": {FILE: ROW}, "tasks": RESULT["tasks"]}
COMPARISON = {
    "model": "model",
    "protocol": PROTOCOL,
    "text": {FILE: {"perplexity": 206.331234, "bits_per_byte": 2.06331234}},
    "tasks": {"arc_challenge_of_a_long_name": {"acc_norm,none": 0.5}},
    "sets": [SET | {"name": "optical_shot_noise"}, SET | {"name": "configs/transforms/of/a/folder/int4.toml"}],
}
NUMBERS = ("17907.5712", "1234.5679", "206.3312", "+8579.04%", "2.0633")


@pytest.fixture
def terminal(monkeypatch):
    def of(width: int) -> None:
        monkeypatch.setattr(
            tables, "Console", lambda **how: Console(**({"force_terminal": True, "width": width} | how))
        )

    return of


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [60, 80, 140, 400])
def test_numbers_are_whole_at_any_width_of_a_terminal(terminal, capsys, width):
    terminal(width)
    print_results(RESULT)
    print_comparison(COMPARISON)
    printed = plain(capsys.readouterr().out)
    assert "…" not in printed
    cells = printed.split()
    for number in (*NUMBERS, "1,234,567", "-50.00%", "12"):
        assert number in cells, number
    for number in ("+8578.90%", "1234.56%", "+1.2346", "x12345.6780"):
        assert number in printed, number


@pytest.mark.parametrize("width", [80, 140])
def test_usual_tables_fit_the_terminal(terminal, capsys, width):
    terminal(width)
    row = over_chips(219.52, 12.47, 213.67) | {"non_finite_chips": 0, "tokens": 12_574}
    print_results({"model": "model", "protocol": PROTOCOL, "text": {FILE: row}, "tasks": {}, "chips": 5})
    print_comparison(COMPARISON)
    lines = [line for line in plain(capsys.readouterr().out).splitlines() if not line.startswith(("text", "ranges"))]
    assert max(map(cell_len, lines)) <= width


def test_a_pipe_has_whole_names_whatever_its_columns(monkeypatch, capsys):
    printed = []
    for columns in ("20", "80", "140"):
        monkeypatch.setenv("COLUMNS", columns)
        print_results(RESULT)
        print_comparison(COMPARISON)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert "\x1b" not in printed[0]
    assert printed[0].count(FILE) == 3
    assert "configs/transforms/of/a/folder/int4.toml  " in printed[0]


def test_names_wrap_and_lose_nothing(terminal, capsys):
    terminal(60)
    table = ResultTable("title", ["file"], ["value"])
    table.add(FILE, "1234567.8901")
    table.print()
    lines = plain(capsys.readouterr().out).splitlines()
    assert "".join(line.split()[0] for line in lines[5:]) == FILE
    assert lines[5].split()[1] == "1234567.8901"


def test_over_clean():
    assert percent_over(3.0, 2.0) == "+50.00%"
    assert percent_over(1.0, 2.0) == "-50.00%"
    assert percent_over(None, 2.0) == percent_over(1.0, 0.0) == percent_over(1.0, float("nan")) == "-"
