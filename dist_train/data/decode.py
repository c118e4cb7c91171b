"""From encoded images to normalised tensors with DALI: the only file that imports it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils.dlpack

from dist_train.config import DataConfig
from dist_train.data.augment import RAND_AUGMENT_OPERATIONS
from dist_train.errors import DeviceError

Columns = Mapping[str, Any]
"""``raw``, a list of uint8 arrays (one encoded image each), and the arrays of :func:`dist_train.data.augment.parameters`."""


_MEMORY = re.compile(r"memory|bad_alloc", re.IGNORECASE)
"""What DALI's errors speak of when there is no memory, on the host or on a GPU."""
_DEVICE = re.compile(r"cuda|nvjpeg|nvml|driver", re.IGNORECASE)
"""What they speak of when the machine is at fault."""


class Decoder:
    """A DALI pipeline that decodes, crops, mirrors and normalises micro batches, some ahead of their use.

    Args:
        data: input size, mean and standard deviation.
        steps: the columns that every micro batch has besides ``raw``; they decide what is done, see ``parameters``.
        batch: largest micro batch.
        device: where the tensors are wanted; on a GPU the images are decoded there, unless ``data.decoder`` is ``cpu``.
        threads: decoding threads.
        depth: micro batches made ahead.
    """

    def __init__(
        self, data: DataConfig, steps: Iterable[str], batch: int, device: torch.device, threads: int, depth: int
    ) -> None:
        self._data = data
        self._names = ("raw", *steps)
        self._options = {"batch_size": batch, "num_threads": threads, "prefetch_queue_depth": depth}
        self._device = device
        self.on_gpu = device.type == "cuda" and data.decoder != "cpu"
        """Whether the GPU decodes."""
        self._source: Iterator[Columns] = iter(())
        self._pipeline: Any = None

    def run(self, batches: Iterable[Columns]) -> Generator[torch.Tensor | RuntimeError, None, None]:
        """Yield float32 [N, 3, S, S] in channels_last for every micro batch, in order, up to ``depth`` ahead.

        A micro batch in which an image cannot be decoded yields the error instead, and the others are not touched by it.
        So does one for which memory runs out, because an image whose header is damaged can claim any size.

        Raises:
            DeviceError: DALI's error is about the machine.
        """
        self._source = iter(batches)
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline, self._pipeline = self._pipeline, None
        pipeline.reset()
        pipeline.schedule_run()
        while True:
            result: torch.Tensor | RuntimeError
            try:
                result = self._tensor(pipeline)
            except StopIteration:
                break
            except RuntimeError as error:
                if _DEVICE.search(words_of(error)) and not is_out_of_memory(error):
                    raise DeviceError(machine_fault(error)) from None
                result = error
            pipeline.release_outputs()
            pipeline.schedule_run()
            yield result
        # Only a pipeline that was run to its end is used again: one that is left midway still holds micro batches.
        self._pipeline = pipeline

    def _tensor(self, pipeline: Any) -> torch.Tensor:
        if self._device.type == "cuda":
            (images,) = pipeline.share_outputs(cuda_stream=torch.cuda.current_stream(self._device))
        else:
            (images,) = pipeline.share_outputs()
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        return tensor.permute(0, 3, 1, 2)

    def _feed(self) -> tuple[Any, ...]:
        columns = next(self._source)
        return tuple(columns[name] for name in self._names)

    def define(self) -> Any:
        """The pipeline, which knows its graph and has no memory and no threads yet."""
        # Recorded, because DALI's notices of its own deprecated operators get past a filter.
        with warnings.catch_warnings(record=True):
            from nvidia.dali import pipeline_def

            on_gpu = self._device.type == "cuda"
            # Where no operation is chosen per image the graph is defined plainly, which is quicker.
            define = pipeline_def(enable_conditionals="operations" in self._names)(self._graph)
            return define(device_id=self._device.index or 0 if on_gpu else None, **self._options)

    def _build(self) -> Any:
        pipeline = self.define()
        try:
            with warnings.catch_warnings(record=True):
                pipeline.build()
        except RuntimeError as error:
            if self._device.type == "cuda":
                raise DeviceError(machine_fault(error)) from None
            raise
        return pipeline

    def _graph(self) -> Any:
        fn, types = _operators()
        kinds = {"raw": (types.UINT8, 1), "mirror": (types.INT32, 0)}
        kinds |= dict.fromkeys(("size", "color", "erased_anchor", "erased_shape"), (types.FLOAT, 1))
        chosen = [kinds.get(name, (types.INT32, 1)) for name in self._names]
        fed = fn.external_source(
            source=self._feed,
            num_outputs=len(chosen),
            dtype=[kind for kind, _ in chosen],
            ndim=[dimensions for _, dimensions in chosen],
        )
        inputs = dict(zip(self._names, fed))
        size = self._data.image_size
        images = self._decoded(inputs)
        if "operations" in inputs:
            images = self._rand_augment(images, inputs["operations"], inputs["signs"])
        if "color" in inputs:
            color = inputs["color"]
            images = fn.color_twist(images, brightness=color[0], contrast=color[1], saturation=color[2], hue=color[3])
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="HWC",
            mirror=inputs.get("mirror", 0),
            # In levels of 0 to 255, as they are decoded.
            mean=[255 * value for value in self._data.mean],
            std=[255 * value for value in self._data.std],
        )
        if "anchor" in inputs and "shape" not in inputs:
            # After the normalisation, so that what lies outside of the image is the mean colour exactly.
            # The shape by name: as a positional constant it would be put on the GPU, and be waited for in every batch.
            window = {"start": inputs["anchor"], "shape": (size, size), "axis_names": "HW"}
            images = fn.slice(images, out_of_bounds_policy="pad", fill_values=0, **window)
        if "erased_shape" in inputs:
            place = {"anchor": inputs["erased_anchor"], "shape": inputs["erased_shape"]}
            images = fn.erase(images, axis_names="HW", fill_value=0, **place)
        return images

    def _decoded(self, inputs: dict[str, Any]) -> Any:
        fn, types = _operators()
        size = self._data.image_size
        # Orientation tags are not applied, as PIL and torchvision do not: the sizes in the index are those as stored.
        options = {"output_type": types.RGB, "adjust_orientation": False, "device": "mixed" if self.on_gpu else "cpu"}
        if self.on_gpu:
            width, height = self._data.preallocate
            options["hw_decoder_load"] = self._data.hw_decoder_load
            options |= {"preallocate_width_hint": width, "preallocate_height_hint": height}
            # As libjpeg does on the CPU; nvJPEG's default differs by some levels at edges of colour.
            options["jpeg_fancy_upsampling"] = True
        window = {"axis_names": "HW"}
        if "shape" not in inputs:
            images = fn.decoders.image(inputs["raw"], **options)
        elif self.on_gpu:
            # Decoding only the window fails or crashes on some GPUs (nvImageCodec issue 55), so it is cut afterwards.
            images = fn.slice(fn.decoders.image(inputs["raw"], **options), inputs["anchor"], inputs["shape"], **window)
        else:
            images = fn.decoders.image_slice(inputs["raw"], inputs["anchor"], inputs["shape"], **window, **options)
        if self._device.type == "cuda" and not self.on_gpu:
            images = images.gpu()
        if "shape" in inputs:
            images = fn.resize(images, size=(size, size))
        elif "size" in inputs:
            images = self._resized(images, inputs)
        return images

    def _resized(self, images: Any, inputs: dict[str, Any]) -> Any:
        """Resize the middle of the images, of which the input's window is cut; its anchor becomes one in that middle.

        An image of 20,000 x 1 pixels, resized as a whole, would take gigabytes.  What is left out at both ends is the
        same, so that the middle of a mirrored image is the mirrored middle.
        """
        from nvidia.dali import math

        fn, types = _operators()
        size, target = inputs["size"], self._data.image_size
        # As far as a shifted window, or what RandAugment turns and moves into it, can reach.
        reach = target if "operations" in inputs else self._data.crop_padding + 1
        margin = math.floor(math.max((size - target) / 2 - reach, 0.0))
        inputs["anchor"] = inputs["anchor"] - fn.cast(margin, dtype=types.INT32)
        start = margin / size
        return fn.resize(images, size=size - 2 * margin, roi_start=start, roi_end=1 - start, roi_relative=True)

    def _rand_augment(self, images: Any, operations: Any, signs: Any) -> Any:
        from nvidia.dali.auto_aug.core import signed_bin
        from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

        assert self._data.rand_augment is not None
        count, strength = self._data.rand_augment
        # The largest shift is that of DALI's default, 100 of 224 pixels.
        suite = get_rand_augment_suite(max_translate_abs=round(self._data.image_size * 100 / 224))
        assert len(suite) == RAND_AUGMENT_OPERATIONS
        bins = signed_bin(strength, random_sign=signs)
        for place in range(count):
            images = _choose(suite, operations[place], images, bins[place])
        return images


def words_of(error: RuntimeError) -> str:
    """What went wrong in DALI's words, in one line without the places in our files that it quotes."""
    text = str(error).rpartition("encountered:")[2].partition("Stacktrace")[0]
    text = re.sub(r"Current pipeline object is no longer valid\.|C\+\+ context: \[[^]]*\]", "", text)
    return " ".join(text.split())[:500]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether DALI had no memory for a micro batch."""
    return _MEMORY.search(words_of(error)) is not None


def machine_fault(error: RuntimeError) -> str:
    """The text of the error with which a run ends when the machine cannot decode."""
    return (
        f"DALI cannot decode here, and the images are not to blame: {words_of(error)}; look at the driver and at the memory "
        "(`dist-train doctor`), lower train.micro_batch or data.decode_threads, or decode on the CPU with data.decoder: cpu"
    )


def _operators() -> tuple[Any, Any]:
    """DALI's operators and types, imported where they are used, and untyped: their stubs do not take option dicts."""
    from nvidia.dali import fn, types

    return fn, types


def _choose(suite: Sequence[Any], operation: Any, images: Any, strength: Any) -> Any:
    """Each image by its own operation of the suite; a tree of conditions, of which DALI makes parts of the batch."""
    if len(suite) == 1:
        return suite[0](images, magnitude_bin=strength, num_magnitude_bins=31, fill_value=128, interp_type=None)
    half = len(suite) // 2
    if operation < half:
        images = _choose(suite[:half], operation, images, strength)
    else:
        images = _choose(suite[half:], operation - half, images, strength)
    return images
