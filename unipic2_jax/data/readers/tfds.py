"""Data sets of tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.core.read_only_builder import builder_from_files

from unipic2_jax.core.addresses import local
from unipic2_jax.data.readers.fields import check_columns, check_edit, parse_text, pick_columns
from unipic2_jax.data.records import RECORDS, Record
from unipic2_jax.pictures.decode import BadRecord, Encoded


@RECORDS.register("tfds")
class TFDSRecords:
    """A split of a data set that lies in `data_dir` in the format array_record, which is read without TensorFlow.

    Pictures are its Image features, which stay encoded, or uint8 Tensors; a Sequence of them is several references. A
    prompt is a Text, or a ClassLabel, which becomes the name of its class with spaces for underscores.

    Attributes:
      name: as tensorflow-datasets has it: 'coco_captions', 'shapes_world/edit', 'name/config:1.0.0'.
      split: 'train', 'train[:10%]'.
      data_dir: by default that of tensorflow-datasets: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      image, prompt: features; by default the first usual name (`readers.fields`), for the prompt also 'label'.
      references: a feature or several; by default a usual name too, () for none.
      template: what becomes of a prompt: 'a photo of a {}'.
      download: whether tensorflow-datasets downloads and prepares what is not there (for most data sets with TensorFlow).

    Raises:
      FileNotFoundError: the data set is not there.
      ValueError: it is of another format, lacks a feature, or has no such split or no example in it.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        data_dir: str | os.PathLike[str] | None = None,
        image: str | None = None,
        prompt: str | None = None,
        references: str | Sequence[str] | None = None,
        template: str = "{}",
        download: bool = False,
    ):
        self.name, self.split, self.template = name, split, template
        builder = _builder(name, local(data_dir), download)
        features = builder.info.features
        fitting = lambda fits: [key for key in sorted(features) if fits(features[key])]
        pictures, where = fitting(_is_picture), f"the data set {name}"
        self.image, self.prompt, self.references = pick_columns(
            image, prompt, references, pictures, fitting(_is_text), where
        )
        columns = [self.image, self.prompt, *self.references]
        if unknown := [column for column in columns if column not in features]:
            raise ValueError(
                f"The data set {name} has no feature '{unknown[0]}'; name some of {', '.join(sorted(features))}."
            )
        if references is None:
            check_columns(pictures, (self.image, *self.references), where)
        # Only what is needed is parsed.
        self._features = tfds.features.FeaturesDict({column: features[column] for column in columns})
        self._decoders = {column: _KeepEncoded() for column in columns if _is_image(features[column])}
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self._source = builder.as_data_source(split, deserialize_method=raw)
        except ValueError as error:
            splits = ", ".join(sorted(builder.info.splits))
            raise ValueError(
                f"The data set {name} has no examples in the split '{split}'; use one of {splits}, or a part of it."
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: 'damaged-record', 'missing-image', 'missing-caption', 'missing-reference', 'not-text', 'empty-prompt'."""
        index = range(len(self))[index]
        where = f"example {index} of {self.name}, {self.split}"
        try:
            values = self._features.deserialize_example_np(self._source[index], decoders=self._decoders)
        except (RuntimeError, ValueError, KeyError, DecodeError) as error:
            raise BadRecord(
                "damaged-record", f"There is a damaged {where} ({error}); write the data set again."
            ) from error
        image = _pictures(values[self.image])
        if len(image) != 1:
            raise BadRecord("missing-image", f"There are {len(image)} pictures in {where}; one is needed.")
        references = tuple(picture for name in self.references for picture in _pictures(values[name]))
        if self.references:
            check_edit({self.image, self.prompt}, references, where)
        text = parse_text(self._text(values[self.prompt]), where)
        return Record(image[0], self.template.format(text), references, where)

    def _text(self, value: Any) -> Any:
        label = self._features[self.prompt]
        if not isinstance(label, tfds.features.ClassLabel):
            return value
        # -1 is how test splits withhold their labels.
        return None if value < 0 else label.int2str(int(value)).replace("_", " ")


class _KeepEncoded(tfds.decode.SkipDecoding):
    """For pictures in a Sequence too, where tensorflow-datasets' own class needs TensorFlow."""

    def decode_batch_example_np(self, serialized_example: Any) -> Any:
        return serialized_example


def _is_image(feature: tfds.features.FeatureConnector) -> bool:
    return isinstance(getattr(feature, "feature", feature), tfds.features.Image)  # itself, or what a Sequence holds


def _is_picture(feature: tfds.features.FeatureConnector) -> bool:
    return _is_image(feature) or (feature.np_dtype == np.uint8 and len(feature.shape) > 2)


def _is_text(feature: tfds.features.FeatureConnector) -> bool:
    return isinstance(feature, tfds.features.Text | tfds.features.ClassLabel)


def _pictures(value: Any) -> list[Encoded]:
    """The pictures of a feature: bytes or uint8 [H, W, C], or several of these."""
    if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.dtype != object and value.ndim < 4):
        return [value]
    return [picture for item in value for picture in _pictures(item)]


def _builder(name: str, data_dir: str | os.PathLike[str] | None, download: bool) -> tfds.core.DatasetBuilder:
    """By what lies on disk, since the code that made a data set may need TensorFlow and asks servers about it."""
    try:
        builder = builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        place = data_dir or "the folder of tensorflow-datasets"
        if not download:
            raise FileNotFoundError(
                f"There is no data set {name} in {place}; name its data_dir, or write it there with "
                f"`tfds build {name} --file_format=array_record`."
            ) from error
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    if "array_record" not in (formats := {found.value for found in builder.info.available_file_formats()}):
        raise ValueError(
            f"The data set {name} is kept as {' and '.join(sorted(formats))}, which needs TensorFlow to read; write it again "
            f"with `tfds build {name} --file_format=array_record`."
        )
    return builder
