"""A small prepared folder written by hand, so that the loader's tests do not depend on launch.prepare_data."""

import io

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from unipic2_jax.data.buckets import Bucket, bucket_size
from unipic2_jax.data.prepared import INDEX, PreparedExample, PreparedIndex, Shard, pack


def picture(number, height, width):
    """A PNG file's bytes; its first pixel tells the number."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[0, 0] = (number // 256, number % 256, 7)
    pixels[-1, :, 1] = 200
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def number_of(pixels):
    """The inverse of `picture`."""
    return int(pixels[0, 0, 0]) * 256 + int(pixels[0, 0, 1])


def write_prepared(folder, counts, resolution, multiple, arrays=lambda number, bucket: {}):
    """A prepared folder with `counts` {Bucket: examples}; example n has the prompt 'n' and pictures that tell n."""
    folder.mkdir(parents=True)
    shards, number, names = [], 0, ()
    for bucket, count in counts.items():
        height, width = bucket_size(bucket.aspect, resolution, multiple)
        # Two shards, so that an order across files is seen.
        for part, size in enumerate((count - count // 2, count // 2)):
            name = f"{bucket}-{part:05d}.array_record"
            writer = ArrayRecordWriter(str(folder / name), "group_size:1")
            for _ in range(size):
                made = arrays(number, bucket)
                names = tuple(made)
                references = tuple(picture(number + 1000 * r, height, width) for r in range(1, bucket.references + 1))
                example = PreparedExample(picture(number, height, width), str(number), references, made, f"no {number}")
                writer.write(pack(example))
                number += 1
            writer.close()
            shards.append(Shard(name, bucket, size))
    index = PreparedIndex(resolution, multiple, tuple(shards), names)
    (folder / INDEX).write_text(index.to_json())
    return folder


BUCKETS = {Bucket("1:1"): 20, Bucket("4:3"): 10, Bucket("1:1", 1): 12, Bucket("3:4", 2): 6}
