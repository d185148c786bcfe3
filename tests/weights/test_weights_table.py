"""The table and its files, on small artificial networks: streaming, sharding, dtypes, sentences."""

import json
import struct
import subprocess
import sys
import textwrap

import eight_devices
import jax
import ml_dtypes
import numpy as np
import pytest

from unipic2_jax.weights import io, native, table
from unipic2_jax.weights.table import Rule

BF16 = np.dtype(ml_dtypes.bfloat16)
RULES = (
    Rule("embed.weight", "embed/embedding"),
    Rule("conv.weight", "conv/kernel", "conv"),
    Rule("blocks.{i}.fc.weight", "blocks/fc/kernel", "linear", range(2, 5)),
    Rule("blocks.{i}.fc.bias", "blocks/fc/bias", "copy", range(2, 5)),
    Rule("position_ids", ""),
)
SHAPES = {"embed": {"embedding": (6, 4)}, "conv": {"kernel": (3, 3, 2, 8)}}
SHAPES["blocks"] = {"fc": {"kernel": (3, 8, 16), "bias": (3, 16)}}
ABSTRACT = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def tensors(dtypes=(np.float32, np.float16, BF16), seed=0):
    rng = np.random.default_rng(seed)
    shapes = table.expected_shapes(RULES, ABSTRACT)
    return {name: rng.normal(size=s).astype(dtypes[i % len(dtypes)]) for i, (name, s) in enumerate(shapes.items())}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def test_both_directions_by_hand():
    source = tensors([np.float32])
    params = table.to_flax(RULES, source, ABSTRACT)
    np.testing.assert_array_equal(params["blocks"]["fc"]["kernel"][1], source["blocks.3.fc.weight"].T)
    np.testing.assert_array_equal(params["blocks"]["fc"]["bias"][2], source["blocks.4.fc.bias"])
    np.testing.assert_array_equal(params["conv"]["kernel"][0, 1, 1, 5], source["conv.weight"][5, 1, 0, 1])
    same(source, dict(table.to_torch(RULES, params)))


@pytest.mark.parametrize("dtypes", [[np.float32], [np.float16], [BF16], [np.float16, BF16], [np.float32, BF16]])
def test_dtypes(dtypes):
    source = tensors(dtypes)
    params = table.to_flax(RULES, source, ABSTRACT)
    mixed = len(dtypes) > 1
    assert params["blocks"]["fc"]["kernel"].dtype == (np.float32 if mixed else dtypes[0])
    same(source, dict(table.to_torch(RULES, params, {name: t.dtype for name, t in source.items()})))
    cast = table.to_flax(RULES, source, ABSTRACT, dtype=BF16)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {BF16}
    assert {t.dtype for _, t in table.to_torch(RULES, cast, np.float16)} == {np.dtype(np.float16)}


def test_the_narrowest_dtype_that_holds_all():
    assert table.promote([BF16, BF16]) == BF16
    assert table.promote([BF16, np.float16]) == np.float32
    assert table.promote([np.float64, BF16]) == np.float64


class Logged(dict):
    """Counts what is read of each tensor."""

    def __init__(self, source):
        self.read = {}
        super().__init__({name: _Logged(name, t, self.read) for name, t in source.items()})


class _Logged:
    def __init__(self, name, array, read):
        self.name, self.array, self.read = name, array, read
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, index):
        part = self.array[index]
        self.read[self.name] = self.read.get(self.name, 0) + part.size
        return part


def test_each_device_reads_its_own_slices_once():
    devices = np.array(jax.devices())
    count = len(devices)
    if 16 % count or 8 % count:
        pytest.skip(f"{count} devices do not divide the test's shapes")
    mesh = jax.sharding.Mesh(devices, ("data",))
    spread = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    shardings = {
        "embed": {"embedding": spread()},
        "conv": {"kernel": spread(None, None, None, "data")},
        "blocks": {"fc": {"kernel": spread(None, "data"), "bias": spread(None, "data")}},
    }
    plain = tensors([np.float32])
    source = Logged(plain)
    params = table.to_flax(RULES, source, ABSTRACT, shardings)
    assert params["blocks"]["fc"]["kernel"].sharding == shardings["blocks"]["fc"]["kernel"]
    same(plain, dict(table.to_torch(RULES, params)))
    for name, tensor in plain.items():
        assert source.read[name] == tensor.size, f"{name} must be read once over all devices"


def test_eight_devices_in_a_process_of_their_own():
    test = "tests/weights/test_weights_table.py::test_each_device_reads_its_own_slices_once"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", test]
    done = subprocess.run(command, capture_output=True, text=True, env=eight_devices.ENVIRONMENT)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("embed.weight"), r"^The source lacks the tensor 'embed.weight' of shape \(6, 4\)"),
        (
            lambda s: s.update({"blocks.2.fc.weights": s.pop("blocks.2.fc.weight")}),
            r"lacks the tensor 'blocks.2.fc.weight' of shape \(16, 8\) \(nearest: 'blocks.2.fc.weights'\)\.$",
        ),
        (lambda s: s.update({"embd.weight": s["embed.weight"]}), r"'embd.weight'.*\(nearest: 'embed.weight'\)\.$"),
        (lambda s: s.update({"blocks.3.fc.bias": np.zeros(15)}), r"'blocks.3.fc.bias' with shape \(15,\).*\(16,\)"),
        (lambda s: s.update({"embed.weight": np.zeros((6, 4), np.int8)}), r"'embed.weight' as int8"),
    ],
)
def test_sentences(change, sentence):
    source = tensors()
    change(source)
    with pytest.raises(ValueError, match=sentence) as error:
        table.to_flax(RULES, source, ABSTRACT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        (RULES[:-2], "No rule fills the leaf 'blocks/fc/bias'"),
        ((*RULES, Rule("x", "embed/embeding")), r"does not have \(nearest: 'embed/embedding'\)"),
        ((*RULES, Rule("x", "embed/embedding")), "Two rules fill the leaf 'embed/embedding'"),
        ((Rule("embed.weight", "embed/embedding", "conv"), *RULES[1:]), "does not fit leaf"),
        ((*RULES[:3], Rule("blocks.{i}.fc.bias", "blocks/fc/bias", "copy", range(4))), "does not fit leaf"),
    ],
)
def test_a_wrong_table_is_told(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        table.expected_shapes(rules, ABSTRACT)


def test_a_wrong_rule_is_told():
    with pytest.raises(ValueError, match="transform 'lineal'"):
        Rule("a", "b", "lineal")
    with pytest.raises(ValueError, match=r"\{i\}"):
        Rule("a", "b", "copy", range(2))


@pytest.mark.parametrize("limit", [10**9, 300])
def test_files_both_ways_with_the_safetensors_package(tmp_path, limit):
    safetensors = pytest.importorskip("safetensors.numpy")
    source = {**tensors(), "ids": np.arange(3), "scalar": np.array(2.5, np.float32), "none": np.zeros((0, 3), BF16)}
    files = io.write_folder(tmp_path / "ours", "model", source.items(), limit)
    assert (len(files) > 1) == (limit == 300)
    read = {}
    for file in files:
        read |= safetensors.load_file(file)
    same(source, read)
    same(source, dict(io.open_folder(tmp_path / "ours")))
    (tmp_path / "theirs").mkdir()
    safetensors.save_file(source, tmp_path / "theirs/model.safetensors")
    same(source, dict(io.open_folder(tmp_path / "theirs")))
    assert not list((tmp_path / "ours").glob(".*"))


def test_every_tensor_is_aligned(tmp_path):
    """PyTorch refuses to view float32 at an odd offset."""
    odd = {"a": np.ones(3, np.int8), "b": np.ones(3, np.float16), "c": np.ones(3, np.float32), "d": np.ones(1, np.int8)}
    [file] = io.write_folder(tmp_path, "model", odd.items())
    for tensor in io.read_header(file)[0].values():
        assert tensor.offset % tensor.dtype.itemsize == 0
    same(odd, io.read_header(file)[0])


def test_slices_are_lazy(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    io.write_folder(tmp_path, "model", [("x", array)])
    lazy = io.open_folder(tmp_path)["x"]
    np.testing.assert_array_equal(lazy[1:2, ..., 2:4], array[1:2, ..., 2:4])
    assert lazy[0].base is None, "a slice must not keep the file mapped"


def test_rewriting_leaves_no_old_shards(tmp_path):
    io.write_folder(tmp_path, "model", tensors().items(), 300)
    assert (tmp_path / "model.safetensors.index.json").exists()
    io.write_folder(tmp_path, "model", tensors(seed=1).items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    io.write_folder(tmp_path, "model", tensors().items(), 300)
    assert not (tmp_path / "model.safetensors").exists()
    same(tensors(), dict(io.open_folder(tmp_path)))


def test_a_failed_write_keeps_the_old_file(tmp_path):
    io.write_folder(tmp_path, "model", tensors().items())

    def broken():
        yield "x", np.ones(3, np.float32)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        io.write_folder(tmp_path, "model", broken())
    same(tensors(), dict(io.open_folder(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_variants(tmp_path):
    io.write_folder(tmp_path, "model.fp16", tensors().items(), 300)
    assert (tmp_path / "model.safetensors.index.fp16.json").exists()
    assert io.weight_stem(tmp_path) == "model.fp16"
    same(tensors(), dict(io.open_folder(tmp_path)))
    io.write_folder(tmp_path, "model", tensors(seed=1).items())
    same(tensors(seed=1), dict(io.open_folder(tmp_path)))


def test_damaged_files_are_told(tmp_path):
    def complain(kind, words):
        with pytest.raises(kind, match=words) as error:
            io.open_folder(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    complain(FileNotFoundError, "holds no diffusion_pytorch_model.safetensors")
    files = io.write_folder(tmp_path, "model", tensors().items(), 300)
    whole = files[0].read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        files[0].write_bytes(whole[:cut])
        complain(ValueError, "cut short")
    files[0].write_bytes(struct.pack("<Q", 8) + b"[1,2,3]]" + whole)
    complain(ValueError, "does not start with '{'")
    files[0].unlink()
    complain(FileNotFoundError, f"lacks the shard {files[0].name}")
    index = tmp_path / "model.safetensors.index.json"
    files[0].write_bytes(whole)
    values = json.loads(index.read_text())
    values["weight_map"]["ghost"] = files[0].name
    index.write_text(json.dumps(values))
    complain(ValueError, "lacks 'ghost'")
    for text in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        complain(ValueError, "not an index of shards")


def described(**changes):
    """A file of two tensors of 8 bytes whose header's entries are changed."""
    entries = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate("ab")}
    for name, fields in changes.items():
        entries[name] = {**entries.get(name, {}), **fields} if isinstance(fields, dict) else fields
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


TEXT = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode() + b"   "
UNSOUND = {
    # The three bytes of padding belong to the header: every weight would be shifted by them.
    "length too small": (struct.pack("<Q", len(TEXT) - 3) + TEXT + bytes(16), "end at byte .* and the file at byte"),
    "length too large": (struct.pack("<Q", len(TEXT)) + TEXT[:-3] + bytes(16), "header"),
    "longer": (struct.pack("<Q", len(TEXT)) + TEXT + bytes(17), "tensors end at byte .* and the file at byte"),
    "hole": (described(b={"data_offsets": [9, 17]}), "'b' begins at byte 9 of the data where .* ends at 8"),
    "overlap": (described(b={"data_offsets": [4, 12]}), "'b' begins at byte 4 of the data where .* ends at 8"),
    "late": (described(a={"data_offsets": [8, 16]}), "begins at byte 8 of the data where .* ends at 0"),
    "size": (described(a={"shape": [3]}), "'a' has 8 bytes where its dtype and shape need 12"),
    "dtype": (described(a={"dtype": "F31"}), "'a' has the unknown dtype 'F31'"),
    "negative": (described(a={"shape": [-1, -2]}), r"'a' has the shape \[-1, -2\]"),
    "offsets": (described(a={"data_offsets": "08"}), "'a' has the data_offsets '08'"),
    "entry": (described(a=7), "entry of 'a' lacks its dtype"),
    "metadata": (described(__metadata__={"n": 3}), "__metadata__ is no object of texts"),
    "twice": (struct.pack("<Q", 14) + b'{"a":1,"a":2} ', "a key twice"),
    "blank": (struct.pack("<Q", 4) + b"  {}", r"does not start with '\{'"),
    "huge": (struct.pack("<Q", 100_000_001) + b"{", "100000001 bytes|cut short"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_what_breaks_the_formats_rules_is_refused_here_and_there(tmp_path, kind):
    content, words = UNSOUND[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        io.read_header(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    safetensors = pytest.importorskip("safetensors")
    if kind != "blank":  # a rule that the format states and the library does not hold
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(file, "np")


def test_a_header_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "MAX_HEADER_BYTES", len(TEXT))
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(TEXT)) + TEXT + bytes(16))
    assert list(io.read_header(file)[0]) == ["a"]
    file.write_bytes(struct.pack("<Q", len(TEXT) + 1) + TEXT + b" " + bytes(16))
    with pytest.raises(ValueError, match="the format allows"):
        io.read_header(file)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt", "model.pth"])
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for read in (lambda: io.read_header(tmp_path / name), lambda: io.open_folder(tmp_path)):
        with pytest.raises(ValueError, match=rf"{name} is a pickle, which can run any code .*save_file"):
            read()


def test_our_checkpoint_of_parameters(tmp_path):
    source = tensors([BF16])
    params = table.to_flax(RULES, source, ABSTRACT)
    native.save(tmp_path, RULES, params, "model")
    manifest, stream = native.tensors(tmp_path, RULES)
    assert manifest.stem == "model"
    same(source, dict(stream))
    wider = {**ABSTRACT, "embed": {"embedding": jax.ShapeDtypeStruct((7, 4), np.float32)}}
    with pytest.raises(ValueError, match=r"'embed/embedding' with shape \(6, 4\).*\(7, 4\)"):
        native.load_component(tmp_path, RULES, wider)
    with pytest.raises(ValueError, match=r"lacks the leaf 'embed2'"):
        native.load_component(tmp_path, RULES, {**ABSTRACT, "embed2": ABSTRACT["embed"]["embedding"]})
    (tmp_path / "params/_CHECKPOINT_METADATA").unlink()
    (tmp_path / "params/state/_METADATA").unlink()
    with pytest.raises(ValueError, match="not a complete Orbax checkpoint"):
        native.check_component(tmp_path, RULES, ABSTRACT)


LAYERS, WIDTH = 24, 1024
MEASURE = """
    import sys, threading, time
    from pathlib import Path
    import jax, numpy as np
    from unipic2_jax.weights import io, native, table
    from unipic2_jax.weights.table import Rule
    folder, layers, width = Path(sys.argv[1]), {layers}, {width}
    rules = [Rule("b.{{i}}.w%d" % k, "b/w%d/kernel" % k, "linear", range(layers)) for k in range(3)]
    struct = jax.ShapeDtypeStruct((layers, width, width), np.float16)
    abstract = {{"b": {{"w%d" % k: {{"kernel": struct}} for k in range(3)}}}}
    draw = np.random.default_rng(0).integers(0, 30000, (width, width), np.int16).view(np.float16)
    names = [name for rule in rules for name, _ in rule.names()]
    io.write_folder(folder / "src", "model", ((name, draw + np.float16(n)) for n, name in enumerate(names)), 40 << 20)
    # The first use of JAX and Orbax allocates what is theirs; it is done before measuring.
    native.save_tree(folder / "warm", {{"x": np.ones(8, np.float32)}})
    native.read_leaves(folder / "warm", ["x"])

    def anonymous():
        return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) << 10

    peak, done, start = 0, threading.Event(), anonymous()
    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, anonymous() - start)
    threading.Thread(target=watch, daemon=True).start()
    native.write(folder / "ours", rules, io.open_folder(folder / "src"), abstract, "model")
    first, peak = peak, 0
    manifest, stream = native.tensors(folder / "ours", rules)
    io.write_folder(folder / "back", manifest.stem, stream, 40 << 20)
    done.set()
    back, source = io.open_folder(folder / "back"), io.open_folder(folder / "src")
    assert all(back[n][...].tobytes() == source[n][...].tobytes() for n in source)
    print(sum(t.nbytes for t in source.values()), struct.size * 2, first, peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_conversion_streams(tmp_path):
    """151 MB in three stacked leaves of 50 MB: to here one layer at a time, back one leaf at a time."""
    code = textwrap.dedent(MEASURE.format(layers=LAYERS, width=WIDTH))
    code = code.replace("folder, layers", "native.BATCH_BYTES = 1\nfolder, layers", 1)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, leaf, to_here, back = (int(n) for n in done.stdout.split())
    assert total == 3 * leaf == 3 * LAYERS * WIDTH**2 * 2
    assert to_here < 0.3 * total, f"converting held {to_here / 1e6:.0f} MB of {total / 1e6:.0f}"
    assert back < 2.2 * leaf, f"converting back held {back / 1e6:.0f} MB, a leaf is {leaf / 1e6:.0f}"
    print(f"to here {to_here / 1e6:.0f} MB, back {back / 1e6:.0f} MB of {total / 1e6:.0f}")
