"""Reports of conversions are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clover_peft.convert import ConversionReport, SlicingReport, card, convert_to_mla
from tests.support.tiny import VOCAB, build

SIZES = {"parameters": (10, 8), "tokens": 9}
REPORTS = [
    ConversionReport(
        "clover", 4, 8, [0, 5], [1.0, 0.1], "default", [], cache_bytes=(4, 2), seconds={"latent": 1.0}, **SIZES
    ),
    SlicingReport("shared", True, (48, 36), {"model.norm": 0.9}, seconds=1.0, **SIZES),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_a_failed_write_keeps_the_earlier_report(report, tmp_path, monkeypatch):
    path, write = tmp_path / "report.json", Path.write_text
    report.save(path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report.to_dict()))
    before = path.read_bytes()

    def full_disk(self, text, **options):
        write(self, text[:5], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report.save(path)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.filterwarnings("ignore:calibration. .* tokens .*are few")
@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({}, "vLLM's own class fits."),
        ({"tie_word_embeddings": True}, "vLLM's own class fits."),
        ({"attention_bias": True}, "because it has biases: pass `model_impl=transformers`"),
    ],
)
def test_the_card_names_what_vllms_class_lacks(choices, said):
    batches = [{"input_ids": torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))}]
    result, report = convert_to_mla(build("llama", **choices), batches, rope_dims=6, cache_reduction=0.5)
    assert report.rope_type == "default"
    assert said in card._servers(result, report)
