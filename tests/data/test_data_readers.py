"""Records of every kind from real files, and what happens to bad ones."""

import io
import json
import pickle
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from picture_files import encoded, pixels, reason_of, seed_of

from unipic2_jax.data.buckets import Bucket
from unipic2_jax.data.prepared import INDEX, PreparedExample, PreparedIndex, Shard, pack
from unipic2_jax.data.prompts import JSONLSource
from unipic2_jax.data.readers import fields
from unipic2_jax.data.records import Record, make_records
from unipic2_jax.pictures.decode import SUFFIXES, BadRecord, decode


def image_file(path, seed, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels(seed), kind))


# Sources. Each writer below makes records 0 to 4 with picture n and the text 'text n', or edits with pictures 10 + n, ...


def caption(n):
    return f"text {n} é"


def write_jsonl(folder, edit=False):
    for n in range(5):
        image_file(folder / "images" / f"{n}.png", n)
        image_file(folder / "images" / f"{10 + n}.png", 10 + n)
        image_file(folder / "images" / f"{20 + n}.png", 20 + n)
    picture = lambda n: f"images/{n}.png"
    lines = [{"image": picture(n), "caption": caption(n), "other": 1} for n in range(5)]
    if edit:
        sources = lambda n: [picture(10 + n), picture(20 + n)]
        lines = [{"input_images": sources(n), "instruction": caption(n), "output_image": picture(n)} for n in range(5)]
    (folder / "a.jsonl").write_text("\n\n" + "\n".join(json.dumps(line) for line in lines[:3]) + "\n  \n\n")
    (folder / "b.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines[3:]))
    return {"kind": "jsonl", "path": str(folder / "*.jsonl")}


def write_folder(folder, edit=False):
    for n in range(5):
        image_file(folder / f"part{n // 2}" / f"{n}.{'PNG' if n == 3 else 'jpg'}", n, "PNG" if n == 3 else "JPEG")
        (folder / f"part{n // 2}" / f"{n}.txt").write_text(caption(n) + "\n")
    (folder / "notes.txt").write_text("no caption")
    return {"kind": "folder", "path": str(folder)}


def write_imagefolder(folder, edit=False):
    write_folder(folder)
    names = [f"part{n // 2}/{n}.{'PNG' if n == 3 else 'jpg'}" for n in range(5)]
    lines = [{"file_name": name, "text": caption(n)} for n, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"kind": "folder", "path": str(folder)}


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_webdataset(folder, edit=False):
    shards = {"a.tar": [], "b.tar": [("dir/", b"")], "c.tar": []}  # the last one is empty
    for n in range(5):
        members = shards["a.tar" if n < 3 else "b.tar"]
        key = f"./v1.0/{n:06d}" + "\udcff" * (n == 4)  # a name that is no UTF-8
        if edit:
            members += [
                (f"{key}.input_1.png", encoded(pixels(20 + n))),
                (f"{key}.input_0.png", encoded(pixels(10 + n))),
            ]
            members += [(f"{key}.output.webp", encoded(pixels(n), "WEBP")), (f"{key}.cls", b"7")]
            members += [(f"{key}.json", json.dumps({"instruction": caption(n)}).encode())]
        else:
            text = (
                (f"{key}.txt", caption(n).encode())
                if n % 2
                else (f"{key}.json", json.dumps({"prompt": caption(n)}).encode())
            )
            members += [
                (f"{key}.{'JPG' if n else 'png'}", encoded(pixels(n), "JPEG" if n else "PNG", quality=95)),
                text,
            ]
    for name, members in shards.items():
        write_tar(folder / name, members)
    return {"kind": "webdataset", "path": str(folder)}


def write_parquet(folder, edit=False):
    struct_of = lambda n: {"bytes": encoded(pixels(n)), "path": f"{n}.png"}
    rows = [{"image": struct_of(n), "text": caption(n), "width": 20} for n in range(5)]
    if edit:
        rows = [
            {
                "edited_image": encoded(pixels(n)),
                "edit_prompt": caption(n),
                "input_images": [struct_of(10 + n), struct_of(20 + n)],
                "original_prompt": "x",
            }
            for n in range(5)
        ]
    pq.write_table(pa.Table.from_pylist(rows[:3]), folder / "a.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows[3:]), folder / "b.parquet", row_group_size=2)
    return {"kind": "parquet", "path": str(folder)}


def write_prepared(folder, edit=False):
    references = 2 if edit else 0
    shards = []
    for file, numbers in (("x.array_record", (0, 1, 2)), ("y.array_record", (3, 4))):
        writer = ArrayRecordWriter(str(folder / file), "group_size:1")
        for n in numbers:
            sources = tuple(encoded(pixels(10 * (i + 1) + n)) for i in range(references))
            arrays = {"mean": np.zeros((2, 2, 4), np.float32)}
            writer.write(pack(PreparedExample(encoded(pixels(n)), caption(n), sources, arrays, f"line {n}")))
        writer.close()
        shards.append(Shard(file, Bucket("1:1", references), len(numbers)))
    (folder / INDEX).write_text(PreparedIndex(16, 16, tuple(shards), ("mean",)).to_json())
    return {"kind": "prepared", "path": str(folder)}


def write_tfds(folder, edit=False):
    import tensorflow_datasets as tfds

    image = tfds.features.Image()
    features = {"image": image, "text": tfds.features.Text(), "unused": image}
    if edit:
        features = {
            "output_image": image,
            "instruction": tfds.features.Text(),
            "input_images": tfds.features.Sequence(image),
        }

    def examples():
        for n in range(5):
            picture = encoded(pixels(n))
            sources = [encoded(pixels(10 + n)), encoded(pixels(20 + n))]
            t2i = {"image": picture, "text": caption(n), "unused": b"no image"}
            yield n, {"output_image": picture, "instruction": caption(n), "input_images": sources} if edit else t2i

    write_tfds_data(folder, features, {"train": examples()})
    named = {} if edit else {"references": ()}  # what 'unused' is for is not known
    return {"kind": "tfds", "name": "toy", "data_dir": str(folder), **named}


def write_tfds_data(folder, features, splits):
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            found = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=found, disable_shuffling=True)

        def _split_generators(self, _):
            return splits

        def _generate_examples(self):
            raise NotImplementedError

    tfds.disable_progress_bar()
    Toy(data_dir=str(folder), file_format="array_record").download_and_prepare()


WRITERS = {
    "jsonl": write_jsonl,
    "folder": write_folder,
    "imagefolder": write_imagefolder,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "prepared": write_prepared,
    "tfds": write_tfds,
}
EDITS = [name for name in WRITERS if name not in ("folder", "imagefolder")]


def check(records: list[Record], references: int):
    assert [record.prompt for record in records] == [caption(n) for n in range(5)]
    assert [seed_of(record.image) for record in records] == list(range(5))
    wanted = [[10 * (i + 1) + n for i in range(references)] for n in range(5)]
    assert [[seed_of(source) for source in record.references] for record in records] == wanted
    assert len({record.name for record in records}) == 5 and all(record.name for record in records)


@pytest.mark.parametrize("kind", WRITERS)
def test_records_of_every_kind_in_threads_and_in_copies(kind, tmp_path):
    source = make_records(WRITERS[kind](tmp_path))
    assert len(source) == 5
    check([source[n] for n in range(5)], 0)
    check(list(pickle.loads(pickle.dumps(source))), 0)  # after files were opened; and iteration ends
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda n: source[n % 5], range(100)))
    check(many[:5], 0)
    assert [record.prompt for record in many] == [caption(n % 5) for n in range(100)]
    dataset = grain.MapDataset.source(source)
    check(list(dataset.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))), 0)
    assert source[np.int64(4)].prompt == caption(4)
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize("kind", EDITS)
def test_edits_of_every_kind_have_their_references_in_order(kind, tmp_path):
    source = make_records(WRITERS[kind](tmp_path, edit=True))
    check(list(pickle.loads(pickle.dumps(source))), 2)


@pytest.mark.parametrize("kind", WRITERS)
def test_records_of_every_kind_at_an_address(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC2_CACHE", str(tmp_path / "cache"))
    store, here = fsspec.filesystem("memory"), tmp_path / "here"
    here.mkdir()
    try:
        config = WRITERS[kind](here, edit=kind in EDITS)
        store.put(str(here), f"/{kind}/data", recursive=True)
        shutil.rmtree(here)
        there = {k: v.replace(str(here), f"memory://{kind}/data") if type(v) is str else v for k, v in config.items()}
        check(list(make_records(there)), 2 if kind in EDITS else 0)
        if kind == "jsonl":  # a file of its own has its pictures too
            one = make_records({**there, "path": f"memory://{kind}/data/b.jsonl"})
            assert [seed_of(record.image) for record in one] == [3, 4]
            store.pipe_file("/jsonl/data/tasks.jsonl", b'{"prompt": "draw", "image": "images/3.png"}')
            (record,) = JSONLSource(f"memory://{kind}/data/tasks.jsonl").batch(0, 1)
            assert seed_of(encoded(record.image)) == 3
    finally:
        store.store.clear()


@pytest.mark.parametrize("kind", ["jsonl", "folder", "webdataset", "parquet", "prepared", "tfds"])
def test_what_is_missing_or_empty_is_one_sentence(kind, tmp_path):
    config = {"kind": kind, "path": str(tmp_path / "none")}
    if kind == "tfds":
        config = {"kind": kind, "name": "none", "data_dir": str(tmp_path)}
    with pytest.raises(FileNotFoundError) as caught:
        make_records(config)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    if kind in ("jsonl", "webdataset", "parquet"):
        with pytest.raises(FileNotFoundError, match="check the path"):
            make_records({"kind": kind, "path": [str(tmp_path / "*.none")]})
        with pytest.raises(ValueError, match=r"There is no .* file in \[\]; "):
            make_records({"kind": kind, "path": []})
    if kind == "tfds":
        return
    if kind == "prepared":
        (tmp_path / INDEX).write_text(PreparedIndex(16, 16, ()).to_json())
    with pytest.raises(ValueError, match=r"^There is no .*; .*\.$"):
        make_records({"kind": kind, "path": str(tmp_path)})
    empty = {"jsonl": "\n\n", "webdataset": bytes(10240), "parquet": None}
    if kind not in empty:
        return
    file = tmp_path / f"a.{ {'webdataset': 'tar'}.get(kind, kind) }"
    if kind == "parquet":
        pq.write_table(pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), file)
    else:
        file.write_bytes(empty[kind].encode() if isinstance(empty[kind], str) else empty[kind])
    with pytest.raises(ValueError, match=r"^There is no (line|row|example) in .*; .*\.$"):
        make_records({"kind": kind, "path": str(file)})


def test_bad_lines_of_a_manifest_are_bad_records_of_their_own(tmp_path):
    image_file(tmp_path / "a.png", 1)
    lines = [
        ("not-json", '{"image": "a.png", "caption"'),
        ("not-json", "[1, 2]"),
        ("not-json", "[" * 100_000),
        ("missing-field", '{"image": "a.png"}'),
        ("missing-field", '{"caption": "x"}'),
        ("missing-field", '{"caption": "x", "image": 3}'),
        ("missing-image", '{"image": "none.png", "caption": "x"}'),
        ("missing-image", '{"output_image": "a.png", "input_images": ["none.png"], "instruction": "x"}'),
        ("missing-image", '{"image": "\\u0000", "caption": "x"}'),
        ("missing-reference", '{"output_image": "a.png", "caption": "x"}'),
        ("missing-reference", '{"image": "a.png", "instruction": "x", "input_images": []}'),
        ("unknown-picture", '{"image": "a.png", "before": "b.png", "prompt": "x"}'),
        ("unknown-picture", '{"image": "a.png", "others": ["b.PNG"], "prompt": "x"}'),
        ("two-sources", '{"image": "a.png", "control_image": "a.png", "input": "a.png", "prompt": "x"}'),
        ("not-unicode", '{"image": "a.png", "prompt": "half of \\ud83d"}'),
        ("empty-prompt", '{"image": "a.png", "caption": "  "}'),
        ("not-text", '{"image": "a.png", "caption": 3}'),
        ("", '{"image": "a.png", "prompt": " x "}'),
    ]
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\n" + "\n".join(line for _, line in lines).encode())
    source = make_records({"kind": "jsonl", "path": str(tmp_path / "m.jsonl")})
    assert len(source) == len(lines) + 1
    assert reason_of(lambda: source[0]) == "not-json"
    for number, (reason, line) in enumerate(lines[:-1], 1):
        assert reason_of(lambda number=number: source[number]) == reason, line
    with pytest.raises(BadRecord, match=r"line 2 of .*m\.jsonl"):
        source[1]
    assert source[len(lines)].prompt == "x"


def test_a_manifest_whose_pictures_have_unknown_names_is_refused_by_name(tmp_path):
    line = '{"image": "a.png", "before": "b.png", "prompt": "x"}\n'
    (tmp_path / "m.jsonl").write_text(line)
    with pytest.raises(
        ValueError, match=r"picture under 'before' in line 1 of .*m\.jsonl, and what it is for is not known"
    ):
        make_records({"kind": "jsonl", "path": str(tmp_path / "m.jsonl")})
    (tmp_path / "a.jsonl").write_text(
        '{"image": "a.png", "mask": "b.png", "metadata": {"x": "b.png"}, "prompt": "x"}\n'
    )
    with pytest.raises(ValueError, match=r"'before' in line 1 of .*m\.jsonl"):
        make_records({"kind": "jsonl", "path": str(tmp_path)})
    assert len(make_records({"kind": "jsonl", "path": str(tmp_path / "a.jsonl")})) == 1


def test_the_documentation_lists_every_name():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    names = {*fields.RESULTS, *fields.SOURCES, *fields.EDIT_TEXTS, *fields.UNUSED, *fields.PICTURES}
    suffixes = {suffix.removeprefix(".") for suffix in SUFFIXES}  # 'in a tar the extension'
    assert [name for name in sorted(names - suffixes) if f"`{name}`" not in page] == []


def test_captions_of_a_folder_may_be_in_caption_files_and_have_windows_lines(tmp_path):
    for name in ("a", "b", "scan.001"):
        image_file(tmp_path / f"{name}.png", 1)
    (tmp_path / "a.caption").write_bytes("\ufeffone\r\ntwo\u2028\r\n".encode())
    (tmp_path / "b.caption").write_text("not this")
    (tmp_path / "b.txt").write_text("this")
    (tmp_path / "scan.001.txt").write_text("a scan")
    source = make_records({"kind": "folder", "path": str(tmp_path)})
    assert [record.prompt for record in source] == ["one\ntwo", "this", "a scan"]


def test_a_folder_of_results_has_its_sources_in_other_folders(tmp_path):
    for name, seed in {"a.png": 1, "x/b.png": 2, "a.2.png": 3, "control/a.jpg": 11, "control/x/b_1.png": 22}.items():
        image_file(tmp_path / name, seed)
    image_file(tmp_path / "control/x/b_0.png", 12)
    for name in ("a", "x/b", "a.2"):
        (tmp_path / f"{name}.txt").write_text(f"edit {name}")
    make = lambda **options: make_records({"kind": "folder", "path": str(tmp_path), **options})
    source = make(references=str(tmp_path / "control"))
    found = [source[n] for n in (1, 2)]
    assert [record.prompt for record in found] == ["edit a", "edit x/b"] and len(source) == 3
    assert [[seed_of(picture) for picture in record.references] for record in found] == [[11], [12, 22]]
    assert reason_of(lambda: source[0]) == "missing-reference"  # a.2
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*none; check the path"):
        make(references=[str(tmp_path / "none")])


def test_keys_of_a_shard_may_have_dots_and_folders(tmp_path):
    picture = lambda n: encoded(pixels(n))
    numbered = [
        (f"scan.{n:03}.{kind}", data) for n in range(5) for kind, data in (("jpg", picture(n)), ("txt", b"%d" % n))
    ]
    plain = [("x/a.jpg", picture(5)), ("y/a.jpg", picture(6)), ("y/a.txt", b"6"), ("x/a.caption", b"5")]
    edit = [("e.7.output.png", picture(7)), ("e.7.input_1.png", picture(9)), ("e.7.input_0.png", picture(8))]
    more = [("e.7.json", b'{"instruction": "7"}'), ("y/a.seg.npy", b"unused"), ("y/a.mask.png", b"unused")]
    write_tar(tmp_path / "a.tar", [*numbered, *plain, *edit, *more])
    source = make_records({"kind": "webdataset", "path": str(tmp_path / "a.tar")})
    assert [record.prompt for record in source] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert [seed_of(record.image) for record in source] == list(range(8))
    assert [len(record.references) for record in source] == [0] * 7 + [2]
    assert [seed_of(picture) for picture in source[7].references] == [8, 9]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], "member a.jpg of .*a.tar is not the only one for 'jpg' of 'a'"),
        (["a.jpg", "a.JPG", "a.txt"], "member a.JPG of .*a.tar is not the only one"),
        (["a.1.jpg", "a.1.txt", "a.1.jpg"], "member a.1.jpg of .*a.tar is not the only one for 'jpg' of 'a.1'"),
        (["a.jpg", "a.txt", "a.1.jpg", "a.1.txt"], r"member a.1.jpg of .*a.tar has the key 'a' of other members"),
        (["a.jpg", "a.txt", "a.before.jpg"], r"a picture of unknown use \('before'\)"),
    ],
)
def test_members_that_could_belong_to_several_examples_are_refused(names, words, tmp_path):
    write_tar(tmp_path / "a.tar", [(name, encoded(pixels(1))) for name in names])
    with pytest.raises(ValueError, match=words):
        make_records({"kind": "webdataset", "path": str(tmp_path / "a.tar")})


def test_bad_captions_of_a_folder(tmp_path):
    for name in "abcd":
        image_file(tmp_path / f"{name}.png", 1)
    image_file(tmp_path / ".cache" / "hidden.png", 2)
    image_file(tmp_path / "._a.png", 2)
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "d.txt").write_bytes("\ufefffine".encode())
    source = make_records({"kind": "folder", "path": str(tmp_path)})
    assert len(source) == 4
    assert [reason_of(lambda n=n: source[n]) for n in range(3)] == ["missing-caption", "empty-prompt", "not-text"]
    assert source[3].prompt == "fine"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n{"file_name": "a.png"}')
    listed = make_records({"kind": "folder", "path": str(tmp_path)})
    assert [reason_of(lambda n=n: listed[n]) for n in range(2)] == ["missing-image", "missing-field"]


def test_bad_examples_of_a_shard(tmp_path):
    picture = encoded(pixels(1))
    members = [
        ("a.txt", b"x"),
        ("b.jpg", picture),
        ("c.jpg", picture),
        ("c.json", b"{"),
        ("d.png", picture),
        ("d.txt", b""),
        ("e.output.png", picture),
        ("e.txt", b"x"),
        ("f.png", picture),
        ("f.json", b'{"instruction": "x"}'),
        ("g.input.png", picture),
        ("g.txt", b"x"),
        ("h.png", b""),
        ("h.txt", b"x"),
    ]
    write_tar(tmp_path / "a.tar", members)
    source = make_records({"kind": "webdataset", "path": str(tmp_path / "a.tar")})
    reasons = "missing-image missing-caption not-json empty-prompt missing-reference missing-reference missing-image"
    assert [reason_of(lambda n=n: source[n]) for n in range(7)] == reasons.split()
    assert reason_of(lambda: decode(source[7].image, source[7].name)) == "empty-file"


def test_a_shard_that_is_cut_off_or_damaged_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{n}.{kind}", bytes(700)) for n in range(4) for kind in ("jpg", "txt")])
    sound = (tmp_path / "a.tar").read_bytes()
    member = 512 + 1024
    flipped = bytearray(sound)
    flipped[2 * member + 150] ^= 255  # in the third header's checksum
    bad = {
        "in a picture": sound[: 2 * member + 800],
        "in a header": sound[: 2 * member + 100],
        "header": bytes(flipped),
        "gzip": b"\x1f\x8b\x08" + bytes(2000),
        "nothing": b"",
    }
    assert len(make_records({"kind": "webdataset", "path": str(tmp_path / "a.tar")})) == 4
    for data in bad.values():
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(
            ValueError, match=r"bad.tar is no sound uncompressed tar file \(.*\); copy or write it again\.$"
        ):
            make_records({"kind": "webdataset", "path": str(tmp_path)})


def test_columns_of_parquet_are_named_or_found_by_type(tmp_path):
    image_file(tmp_path / "img" / "3.png", 3)
    table = pa.Table.from_pylist(
        [
            {"pic": "img/3.png", "image": encoded(pixels(1)), "text": 7, "words": "x", "input": "text", "old": None},
            {"pic": "none.png", "image": None, "text": 7, "words": None, "input": "text", "old": encoded(pixels(2))},
        ]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    make = lambda **options: make_records({"kind": "parquet", "path": str(tmp_path / "a.parquet"), **options})
    with pytest.raises(
        ValueError, match=r"usual name of the prompt in .*a\.parquet; set prompt to one of pic, words, input"
    ):
        make()
    with pytest.raises(ValueError, match=r"has no column 'none'; name one of pic, image"):
        make(prompt="none")
    with pytest.raises(ValueError, match=r"column 'old' with pictures in .*a\.parquet, .*; set references"):
        make(prompt="words")
    source = make(prompt="words", references=())
    assert source.references == () and seed_of(source[0].image) == 1
    assert reason_of(lambda: source[1]) == "missing-image"
    other = make(image="pic", prompt="input", references="old")
    assert seed_of(other[0].image) == 3 and other[0].references == () and seed_of(other[1].references[0]) == 2
    assert reason_of(lambda: decode(other[1].image)) == "missing-image"
    assert reason_of(lambda: make(image="pic", prompt="words", references=())[1]) == "missing-caption"
    assert reason_of(lambda: make(image="text", prompt="words", references=())[0]) == "missing-image"

    columns = {"edited_image": [b"y"], "edit_prompt": ["z"], "caption": ["of the result"]}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    edits = lambda **options: make(path=str(tmp_path / "b.parquet"), **options)
    with pytest.raises(ValueError, match="edits but no usual column of what was edited"):
        edits()
    assert edits(references=())[0].references == ()
    pq.write_table(pa.table({"image": [b"x"], **columns}), tmp_path / "b.parquet")
    assert edits(references="image")[0].references == edits()[0].references == (b"x",)
    assert edits()[0].prompt == "z" and edits()[0].image == b"y" and edits(references=())[0].image == b"y"
    omni = {"src_img": [b"x"], "edited_img": [b"y"], "edited_prompt_list": [["short", "long"]], "task": ["t"]}
    pq.write_table(pa.table(omni), tmp_path / "b.parquet")
    found = edits()[0]
    assert (found.image, found.references, found.prompt) == (b"y", (b"x",), "long")


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is no sound Parquet file \([^\n]*\); copy"):
        make_records({"kind": "parquet", "path": str(tmp_path)})
    table = pa.table({"image": [np.random.default_rng(n).bytes(5000) for n in range(4)], "text": list("abcd")})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:60] = b"\xff" * 56  # the first page's header
    (tmp_path / "a.parquet").write_bytes(data)
    source = make_records({"kind": "parquet", "path": str(tmp_path)})
    assert reason_of(lambda: source[0]) == "damaged-record" and source[2].prompt == "c"


def test_damaged_prepared_data(tmp_path):
    config = write_prepared(tmp_path)
    data = bytearray((tmp_path / "x.array_record").read_bytes())
    place = data.index(b"text 1")
    data[place : place + 4] = b"xxxx"
    (tmp_path / "x.array_record").write_bytes(data)
    source = make_records(config)
    assert reason_of(lambda: source[1]) == "damaged-record" and source[2].prompt == caption(2)
    (tmp_path / "x.array_record").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"A shard in .* is damaged"):
        make_records(config)


def test_labels_tensors_and_empty_sequences_of_tensorflow_datasets(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Tensor(shape=(None, None, 3), dtype=np.uint8, encoding="zlib"),
        "label": tfds.features.ClassLabel(names=["apple_pie", "sushi"]),
        "input_images": tfds.features.Sequence(tfds.features.Image()),
    }
    sources = lambda n: [encoded(pixels(10 + n))] * (n % 2)
    rows = [{"image": pixels(n), "label": n if n < 2 else -1, "input_images": sources(n)} for n in range(3)]
    write_tfds_data(tmp_path, features, {"train": enumerate(rows), "test": enumerate(rows[:1])})
    make = lambda **options: make_records({"kind": "tfds", "name": "toy", "data_dir": str(tmp_path), **options})
    source = make(template="a photo of {}")
    assert [source[n].prompt for n in range(2)] == ["a photo of apple pie", "a photo of sushi"]
    assert [len(source[n].references) for n in range(2)] == [0, 1] and seed_of(source[1].references[0]) == 11
    assert isinstance(source[1].references[0], bytes)  # not decoded, so that what is wrong with it is found later
    np.testing.assert_array_equal(source[1].image, pixels(1))
    assert reason_of(lambda: source[2]) == "missing-caption"
    assert len(make(split="test")) == 1 and make(references=())[1].references == ()
    with pytest.raises(ValueError, match=r"no examples in the split 'val'; use one of test, train"):
        make(split="val")
    with pytest.raises(ValueError, match="no feature 'x'; name some of image, input_images, label"):
        make(image="x")
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"kept as tfrecord, which needs TensorFlow .*--file_format=array_record`\.$"):
        make()


def test_the_shapes_world_as_records():
    source = make_records({"kind": "shapes", "task": "edit", "count": 6, "seed": 3})
    assert len(list(source)) == 6 and source[2].image.shape == source[2].references[0].shape == (48, 48, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[5].image, source[5].image)
    plain = make_records({"kind": "shapes", "task": "t2i", "count": 2, "weights": {"counting": 1000}})
    assert plain[0].references == () and plain[0].prompt
    for options, words in (({"task": "image"}, "no records for the task 'image'"), ({"count": 0}, "at least 1")):
        with pytest.raises(ValueError, match=words):
            make_records({"kind": "shapes", "task": "t2i", "count": 1, **options})


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_the_shapes_world_as_tensorflow_dataset_without_tensorflow(task, tmp_path):
    import tensorflow_datasets as tfds

    from unipic2_jax.shapes.tfds_builder import ShapesConfig, ShapesWorld

    assert {config.name for config in ShapesWorld.BUILDER_CONFIGS} == {"t2i", "edit"}
    tfds.disable_progress_bar()
    config = ShapesConfig(name=f"{task}_small", task=task, train=12, heldout=8, seed=3)
    ShapesWorld(config=config, data_dir=str(tmp_path)).download_and_prepare()
    expected = make_records({"kind": "shapes", "task": task, "count": 12, "seed": 3})

    raw = tfds.data_source(f"shapes_world/{task}_small", split="train", data_dir=str(tmp_path))
    image, text = ("output_image", "instruction") if task == "edit" else ("image", "caption")
    np.testing.assert_array_equal(raw[7][image], expected[7].image)
    assert raw[7][image].dtype == np.uint8 and raw[7][text].decode() == expected[7].prompt

    options = {"kind": "tfds", "name": f"shapes_world/{task}_small", "data_dir": str(tmp_path)}
    source, held = make_records(options), make_records({**options, "split": "heldout"})
    assert len(source) == 12 and len(held) == 8 and len(make_records({**options, "split": "train[:25%]"})) == 3
    for found, wanted in zip(source, expected):
        assert found.prompt == wanted.prompt and len(found.references) == (task == "edit")
        for one, other in zip((found.image, *found.references), (wanted.image, *wanted.references)):
            np.testing.assert_array_equal(decode(one), other)
    assert "tensorflow" not in sys.modules
