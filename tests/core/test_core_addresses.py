"""What is read from addresses and written to them, with fsspec's memory in place of a bucket."""

import json
import os

import fsspec
import numpy as np
import pytest

from unipic2_jax.core import addresses

KIND = "memory://bucket"


def test_what_is_an_address():
    assert all(map(addresses.is_address, ("gs://bucket/run", "s3://b", "memory://x", "abfs+x://y", "hf://datasets/a")))
    assert not any(map(addresses.is_address, ("runs/a", "/a", "C:/a", "owner/name", "gs:/b", None, "gs://")))


def test_a_file_is_fetched_once_and_again_when_it_changed(memory, monkeypatch):
    memory.pipe_file("/bucket/data/a.txt", b"one")
    memory.pipe_file("/bucket/data/in/b.txt", b"two")
    fetches, get = [], type(memory).get_file

    def counted(self, name, *arguments, **options):
        fetches.append(name)
        get(self, name, *arguments, **options)

    monkeypatch.setattr(type(memory), "get_file", counted)
    folder = addresses.fetched(f"{KIND}/data")
    assert (folder / "a.txt").read_bytes() == b"one" and (folder / "in/b.txt").read_bytes() == b"two"
    assert addresses.fetched(f"{KIND}/data/") == folder and len(fetches) == 2
    memory.pipe_file("/bucket/data/a.txt", b"new")
    memory.rm("/bucket/data/in/b.txt")
    addresses.fetched(f"{KIND}/data")
    assert (folder / "a.txt").read_bytes() == b"new" and not (folder / "in/b.txt").exists() and len(fetches) == 3
    assert addresses.fetched(f"{KIND}/data/a.txt").read_bytes() == b"new"


def test_only_what_is_wanted_is_fetched(memory):
    for name in ("a.tar", "b.tar", "c.txt", "deep/d.tar"):
        memory.pipe_file(f"/bucket/shards/{name}", name.encode())
    names = lambda path: sorted(p.name for p in addresses.Path(path).rglob("*") if not p.name.startswith("."))
    assert names(addresses.fetched_files(f"{KIND}/shards", (".tar",))) == ["a.tar", "b.tar", "d.tar", "deep"]
    pattern = addresses.fetched_files(f"{KIND}/shards/[ab]*.tar", (".tar",))
    assert pattern.endswith("/[ab]*.tar")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (f"{KIND}/nothing", "There is no file at memory://bucket/nothing; check the address."),
        ("memry://bucket/x", "The protocol of memry://bucket/x is unknown to fsspec; did you mean 'memory'?"),
    ],
)
def test_what_cannot_be_read_has_a_sentence(memory, address, sentence):
    with pytest.raises((OSError, ValueError)) as caught:
        addresses.fetched(address)
    assert str(caught.value) == sentence


def test_a_protocol_whose_package_is_missing_names_it(monkeypatch):
    def missing(address):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"^The address gs://b/x needs gcsfs: pip install gcsfs\.$"):
        addresses.filesystem("gs://b/x")


def test_a_store_that_refuses_is_told_in_one_sentence(memory, monkeypatch):
    memory.pipe_file("/bucket/a", b"x")

    def refuse(*arguments, **options):
        raise RuntimeError("403 Forbidden\nmore")

    monkeypatch.setattr(type(memory), "get_file", refuse)
    with pytest.raises(OSError, match=r"^memory://bucket/a cannot be read \(403 Forbidden\); check the address, your"):
        addresses.fetched(f"{KIND}/a")


def test_a_folder_is_uploaded_when_it_is_complete(memory):
    with addresses.uploaded(f"{KIND}/out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub/a").write_bytes(b"x")
        assert not memory.exists("/bucket/out")
    assert memory.cat_file("/bucket/out/sub/a") == b"x"
    with pytest.raises(ZeroDivisionError), addresses.uploaded(f"{KIND}/other") as folder:
        (folder / "a").touch()
        raise ZeroDivisionError
    assert not memory.exists("/bucket/other")


def states(memory, root="/bucket/run"):
    """What the store has after every change of it, in the order of the calls that made them."""
    seen, put, remove = [], type(memory).pipe_file, type(memory).rm_file

    def look(act):
        def call(self, path, *arguments, **options):
            result = act(self, path, *arguments, **options)
            if not path.endswith(".writable"):
                seen.append({name[len(root) + 1 :]: bytes(memory.cat_file(name)) for name in memory.find(root)})
            return result

        return call

    return seen, {"pipe_file": look(put), "rm_file": look(remove)}


def test_a_mirror_is_a_whole_state_at_every_moment(memory, monkeypatch):
    """Whenever the process dies, what mirror.json names is there, as it was when that was written, but for files that grow."""
    seen, changes = states(memory)
    for name, change in changes.items():
        monkeypatch.setattr(type(memory), name, change)
    mirror = addresses.Mirror(f"{KIND}/run")
    rng = np.random.default_rng(0)
    for step in range(6):
        for name in os.listdir(mirror.folder):
            if name.startswith("state") and rng.random() < 0.6:
                (mirror.folder / name).unlink()
        (mirror.folder / f"state{step}").write_bytes(bytes(rng.integers(0, 256, 9, np.uint8)))
        with (mirror.folder / "metrics.jsonl").open("a") as file:
            file.write(f"{step}\n")
        (mirror.folder / "x.1.part").touch()
        mirror.push()
    named = None
    for state in seen:
        if "mirror.json" not in state:
            continue
        names = json.loads(state["mirror.json"])["files"]
        assert set(names) <= state.keys() and "x.1.part" not in names
        if named is not None and names == named[0]:
            assert all(state[n] == named[1][n] for n in names if n.startswith("state"))
        else:
            named = names, state
    assert set(seen[-1]) == {*os.listdir(mirror.folder), "mirror.json"} - {"x.1.part"}
    files = {p.name: p.read_bytes() for p in mirror.folder.iterdir() if "part" not in p.name}
    mirror.close()
    assert not mirror.folder.exists()
    again = addresses.Mirror(f"{KIND}/run")
    assert {p.name: p.read_bytes() for p in again.folder.iterdir()} == files
    again.close()


def test_one_process_of_a_machine_works_at_an_address(memory):
    mirror = addresses.Mirror(f"{KIND}/run")
    with pytest.raises(OSError, match="Another process of this machine works in memory://bucket/run; end it"):
        addresses.Mirror(f"{KIND}/run")
    other = addresses.Mirror(f"{KIND}/run", writes=False, part=1)
    (other.folder / "a").touch()
    other.push()
    assert not memory.exists("/bucket/run/a")
    other.close()
    mirror.close()


def test_what_cannot_be_sent_is_said_at_the_next_call(memory, monkeypatch):
    mirror = addresses.Mirror(f"{KIND}/run")
    (mirror.folder / "a").touch()

    def refuse(*arguments, **options):
        raise RuntimeError("no route")

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    mirror.begin()
    with pytest.raises(OSError, match=r"memory://bucket/run cannot be written \(no route\)"):
        mirror.settle()
    mirror.close()


def test_what_is_removed_while_it_is_sent_is_not_named(memory, monkeypatch):
    """An old checkpoint goes while a newer one is sent."""
    mirror = addresses.Mirror(f"{KIND}/run")
    for name in ("old", "new"):
        (mirror.folder / name).write_text(name)
    put = addresses._put

    def slow(fs, file, target):
        if file.name == "old":
            file.unlink()
        put(fs, file, target)

    monkeypatch.setattr(addresses, "_put", slow)
    mirror.push()
    assert json.loads(memory.cat_file("/bucket/run/mirror.json"))["files"] == ["new"]
    mirror.close()


def test_names_that_lead_out_of_the_folder_are_refused(memory):
    memory.pipe_file("/bucket/run/mirror.json", b'{"files": ["../../x"]}')
    with pytest.raises(OSError, match=r"memory://bucket/run cannot be read \(the name '../../x' leads out"):
        addresses.Mirror(f"{KIND}/run")


def test_a_folder_that_is_gone_on_with(memory):
    """What was done before an error is there for the next try."""
    with pytest.raises(ZeroDivisionError), addresses.continued(f"{KIND}/data") as folder:
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    with addresses.continued(f"{KIND}/data") as folder:
        assert (folder / "a").read_text() == "1"
        (folder / "b").write_text("2")
    assert memory.cat_file("/bucket/data/b") == b"2"
    assert (addresses.fetched(f"{KIND}/data") / "b").read_text() == "2"
