"""An error of the machine ends the run in DALI's words; an image that is damaged does not, whatever DALI says of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.data.decode import Decoder
from dist_train.data.pipeline import NO_ID, Loader
from dist_train.errors import DeviceError
from shards.index import Index
from tests.dist_train.data.test_faults import NVJPEG, expected_order, flat, ids, order_of_epoch_0

MakeLoader = Callable[..., Loader]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
        "nvJPEG error (5): The execution failed",
        "std::bad_alloc",
        "CUDA driver version is insufficient for CUDA runtime version",
    ],
)
def test_an_error_of_the_machine_stops_with_the_words_of_dali_and_is_no_bad_image(
    digits: Path, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def fail(self: Decoder, pipeline: Any) -> torch.Tensor:
        raise RuntimeError(NVJPEG.format(text))

    loader = make_loader(digits / "train")
    monkeypatch.setattr(Decoder, "_tensor", fail)
    with pytest.raises(DeviceError) as caught:
        flat(loader.epoch(0))
    assert " ".join(text.split()) in str(caught.value)
    assert "data.decoder: cpu" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not loader.bad


@pytest.mark.parametrize("train", [True, False])
def test_an_image_that_claims_more_pixels_than_fit_into_memory_is_a_bad_image(
    digits: Path, tmp_path: Path, make_loader: MakeLoader, train: bool
) -> None:
    folder = tmp_path / "train"
    shutil.copytree(digits / "train", folder)
    index = Index.load(folder)
    sample = order_of_epoch_0(folder)[100]
    with open(folder / index.shards[index.shard[sample]].name, "r+b") as file:
        file.seek(int(index.offset[sample]) + 16)  # width and height of a PNG
        file.write((1 << 19).to_bytes(4, "big") * 2)
    loader = make_loader(folder, train=train)
    read = ids(flat(loader.epoch(0)) if train else list(loader.evaluation()))
    assert loader.bad.keys() == {sample}
    if train:
        assert read == expected_order(
            ids(flat(make_loader(digits / "train").epoch(0))), {sample}, order_of_epoch_0(folder)
        )
    else:
        assert sorted(read) == [NO_ID, *sorted(set(range(len(index))) - {sample})]
