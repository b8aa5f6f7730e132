"""Infinities that quantisers saturate leave finite figures: results say that there were some."""

from __future__ import annotations

import math

import pytest
import torch

from evals.chips import TransformList, Trials, text_over_chips
from evals.models import load_model
from evals.results import print_results
from evals.text import choose_protocol, protocol_record
from transforms.specs import BitflipSpec, CellFaults, Quantised, QuantiseSpec

INT8 = QuantiseSpec(kind="quantise", weight=Quantised(format="int8"), input=Quantised(format="int8"))
FAULTS = BitflipSpec(kind="bitflip", storage="int8", weight=CellFaults(mantissa=1e-4))


@pytest.mark.parametrize(("specs", "chips"), [([INT8], 1), ([FAULTS], 2)])
def test_infinite_weights_are_counted_chip_by_chip_and_file_by_file(real_inputs, tmp_path, capsys, specs, chips):
    model = load_model(str(real_inputs / "stories260K"), "cpu")
    text = (real_inputs / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")
    files = [tmp_path / "long.txt", tmp_path / "short.txt"]
    for file, size in zip(files, (1500, 300), strict=True):
        file.write_text(text[:size], encoding="utf-8")
    protocol = choose_protocol(model.context, 128, None)
    noisy = TransformList(list(specs), [""]).attach(model)
    layers = [m for m in model.model.modules() if hasattr(m, "input_effects") and m.in_features == m.out_features]
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(noisy.noise.clean))

    def measured() -> dict:
        forwards.clear()
        return text_over_chips(model, noisy, Trials("chip", chips), files, protocol, 2)

    assert all("non_finite_inputs_per_chip" not in row for row in measured().values())
    weight = layers[0].parametrizations.weight.original
    with torch.no_grad():
        weight[3, 5], weight[3, 6], weight[7, 0] = torch.inf, -torch.inf, torch.inf
    found = measured()
    counts = [row["non_finite_inputs_per_chip"] for row in found.values()]
    assert [len(per_chip) for per_chip in counts] == [chips, chips]
    assert all(len(set(per_chip)) == 1 for per_chip in counts)
    assert counts[0][0] > counts[1][0] > 0
    assert sum(map(sum, counts)) == 2 * forwards.count(False), "two output channels in every forward"
    for row in found.values():
        assert row["non_finite_chips"] == 0
        assert math.isfinite(row["perplexity"])
        assert not math.isfinite(row["perplexity_clean"]), "the model itself cannot be run"
    result = {"model": "m", "text": found, "tasks": {}, "protocol": protocol_record(protocol), "chips": chips}
    print_results(result)
    assert f"per chip: {', '.join([str(counts[0][0])] * chips)}" in " ".join(capsys.readouterr().out.split())
