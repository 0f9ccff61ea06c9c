"""Documents arrive whole, in order and in one split; what is wrong is said with its place."""

import gzip
import json
import random
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hope_jax.data import sources
from hope_jax.data.sources import (
    HuggingFaceConfig,
    JsonlConfig,
    MixtureConfig,
    ParquetConfig,
    PartConfig,
    SplitConfig,
    StdlibConfig,
    TextConfig,
)

WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2"
ALL = SplitConfig(valid=0.0, test=0.0)


def _documents(source, shares=ALL):
    return [text for _, text in sources.documents(source, shares)]


def _by_split(source, shares):
    found = {}
    for split, text in sources.documents(source, shares):
        found.setdefault(split, []).append(text)
    return found


def _write(path, data):
    """Writes bytes as the name says: plain, .gz or .zst."""
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)
    return str(path)


TEXT = " \n = One = \n \n a b\n c\n\n\n = = Part = = \n d é\n = Two = \n e\r\nf"


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
@pytest.mark.parametrize(
    ("document", "pattern", "expected"),
    [
        ("file", "", [TEXT]),
        ("line", "", [" = One = ", " a b", " c", " = = Part = = ", " d é", " = Two = ", " e", "f"]),
        (
            "blank_line",
            "",
            [" = One = \n", " a b\n c\n", " = = Part = = \n d é\n = Two = \n e\r\nf"],
        ),
        ("pattern", "^ = [^=].* = $", [TEXT[: TEXT.index(" = Two")], TEXT[TEXT.index(" = Two") :]]),
    ],
)
def test_a_text_file_falls_into_documents(tmp_path, suffix, document, pattern, expected):
    path = _write(tmp_path / f"a{suffix}", TEXT.encode())
    assert _documents(TextConfig(train=path, document=document, pattern=pattern)) == expected


def test_compressed_files_of_many_chunks_and_frames_are_whole(tmp_path):
    draw = random.Random(0)
    lines = [f"{draw.getrandbits(4000):x}" for _ in range(3000)]
    data = "\n".join(lines).encode()
    path = tmp_path / "a.zst"
    half = len(data) // 2
    assert len(zstandard.compress(data)) > 1 << 20
    path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    assert _documents(TextConfig(train=str(path), document="line")) == lines


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_or_wrong_compressed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    _write(path, bytes(range(32, 127)) * 10)
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(ValueError, match=rf"a\{suffix} cannot be decompressed"):
        _documents(TextConfig(train=str(path)))
    path.write_bytes(b"neither of both")
    with pytest.raises(ValueError, match=rf"a\{suffix} cannot be decompressed"):
        _documents(TextConfig(train=str(path)))


def test_patterns_are_read_in_order_and_no_file_twice(tmp_path):
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = (str(tmp_path / "b"), str(tmp_path / "**"))
    assert _documents(TextConfig(train=paths)) == ["b", "a", "sub/c"]


def test_a_file_in_two_splits_is_refused(tmp_path):
    (tmp_path / "a").write_text("a")
    source = TextConfig(train=str(tmp_path / "*"), test=str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"a' is in train and test"):
        sources.files(source)


def test_undecodable_bytes_are_named_with_their_offset(tmp_path):
    path = _write(tmp_path / "a.txt", "ééé\nok\n".encode() + b"x\xff")
    for document in ("file", "line"):
        with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 0xff at offset 11"):
            _documents(TextConfig(train=path, document=document))


@pytest.mark.parametrize("kind", [TextConfig, JsonlConfig, ParquetConfig])
def test_missing_files_are_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"no file '.*nowhere'"):
        _documents(kind(train=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match=r"no file fits the pattern '.*\*\.x'"):
        _documents(kind(train=(str(tmp_path / "*.x"),)))
    with pytest.raises(ValueError, match="train must name at least 1 file"):
        kind(train=())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_gives_its_field(tmp_path, suffix):
    texts = ["a\nb", "é\u2028\u0085x", "", "z"]
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=False) for text in texts]
    path = _write(tmp_path / f"a{suffix}", "\n\n".join(lines).encode())
    assert _documents(JsonlConfig(train=path, field="body")) == ["a\nb", "é\u2028\u0085x", "z"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', r"line 3 has no field 'text'; its fields are 'body', 'id'"),
        ("{", "line 3 is not JSON"),
        ('["x"]', "line 3 must be a JSON object, got list"),
        ('{"text": 7}', "line 3 field 'text' must be text, got int"),
        (r'{"text": "\ud800"}', "line 3 field 'text' holds half a surrogate pair"),
    ],
)
def test_a_wrong_jsonl_line_is_named(tmp_path, line, message):
    path = _write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n'.encode())
    with pytest.raises(ValueError, match=message):
        _documents(JsonlConfig(train=path))


def test_parquet_gives_its_column(tmp_path):
    table = pyarrow.table({"id": [1, 2, 3], "body": ["a", "é\n", "c"], "null": ["x", None, "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    path = str(tmp_path / "a.parquet")
    assert _documents(ParquetConfig(train=path, column="body")) == ["a", "é\n", "c"]
    with pytest.raises(ValueError, match="no column 'text'; its columns are 'id', 'body', 'null'"):
        _documents(ParquetConfig(train=path))
    with pytest.raises(ValueError, match="row 1 column 'null' must be text, got NoneType"):
        _documents(ParquetConfig(train=path, column="null"))
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        _documents(ParquetConfig(train=str(tmp_path / "b.parquet")))


def test_a_hub_dataset_is_read_through_its_package(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return [{"text": f"{split} {i}", "n": i} for i in range(2)]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = HuggingFaceConfig(name="a/b", subset="c", valid="validation", revision="v1")
    assert _by_split(source, SplitConfig()) == {
        "train": ["train 0", "train 1"],
        "valid": ["validation 0", "validation 1"],
    }
    assert asked == [("a/b", "c", "train", "v1"), ("a/b", "c", "validation", "v1")]
    with pytest.raises(ValueError, match="row 0 has no field 'body'; its fields are 'text', 'n'"):
        _documents(HuggingFaceConfig(name="a/b", field="body"))
    with pytest.raises(ValueError, match="row 0 field 'n' must be text, got int"):
        _documents(HuggingFaceConfig(name="a/b", field="n"))


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    path = _write(tmp_path / "a", b"")
    for package, source in (
        ("datasets", HuggingFaceConfig(name="a/b")),
        ("pyarrow", ParquetConfig(train=path)),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install 'hope_jax\["):
            _documents(source)


def test_the_standard_library_is_a_corpus():
    texts = _documents(StdlibConfig())
    assert sum(map(len, texts)) > 5_000_000
    assert texts == _documents(StdlibConfig())
    paths = [str(path) for path in sources.files(StdlibConfig())["train"]]
    assert paths == sorted(paths, key=lambda path: Path(path).parts)
    assert not any("/test/" in path or "site-packages" in path for path in paths)


def _corpus(tmp_path, texts):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts))
    return TextConfig(train=str(path), document="line")


def test_splits_share_no_document_and_lose_none(tmp_path):
    texts = [f"document {i % 900}" for i in range(1000)]
    found = _by_split(_corpus(tmp_path, texts), SplitConfig(valid=0.2, test=0.1))
    assert sum(map(Counter, found.values()), Counter()) == Counter(texts)
    kinds = {split: set(part) for split, part in found.items()}
    assert sum(map(len, kinds.values())) == 900
    for split, share in (("train", 0.7), ("valid", 0.2), ("test", 0.1)):
        assert abs(len(kinds[split]) / 900 - share) < 0.05


def test_a_new_document_moves_no_other(tmp_path):
    shares = SplitConfig(valid=0.2, test=0.2)
    before = _by_split(_corpus(tmp_path, [f"{i}" for i in range(100)]), shares)
    after = _by_split(_corpus(tmp_path, [f"{i}" for i in reversed(range(-50, 100))]), shares)
    for split, texts in before.items():
        assert set(texts) <= set(after[split])


def test_the_split_is_the_same_everywhere(tmp_path):
    found = _by_split(_corpus(tmp_path, list("abcdefghijklmnop")), SplitConfig(valid=0.3, test=0.3))
    found = {split: "".join(texts) for split, texts in found.items()}
    assert found == {"train": "abdfghijlmnp", "valid": "eko", "test": "c"}


def test_a_split_by_position_cuts_each_document(tmp_path):
    texts = ["0123456789", "abcdefghijklmnopqrst", "é"]
    found = _by_split(_corpus(tmp_path, texts), SplitConfig(valid=0.1, test=0.2, by="position"))
    assert found == {
        "train": ["0123456", "abcdefghijklmn", "é"],
        "valid": ["7", "op"],
        "test": ["89", "qrst"],
    }


def test_named_files_are_the_splits(tmp_path):
    paths = {split: _write(tmp_path / split, split.encode()) for split in sources.SPLITS}
    assert _by_split(TextConfig(**paths), SplitConfig()) == {
        split: [split] for split in sources.SPLITS
    }
    del paths["test"]
    assert _by_split(TextConfig(**paths), SplitConfig()) == {"train": ["train"], "valid": ["valid"]}
    assert sources.splits(TextConfig(**paths), SplitConfig()) == ("train", "valid")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid": -0.1}, r"valid must be a share in \[0, 1\), got -0.1"),
        ({"test": 1.0}, r"test must be a share in \[0, 1\), got 1.0"),
        ({"valid": 0.6, "test": 0.4}, "must leave a share below 1 for train"),
    ],
)
def test_impossible_shares_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SplitConfig(**settings)


def test_impossible_sources_are_refused():
    with pytest.raises(ValueError, match="pattern must be given exactly if document is 'pattern'"):
        TextConfig(train="a", document="pattern")
    with pytest.raises(ValueError, match="pattern must be given exactly if document is 'pattern'"):
        TextConfig(train="a", pattern="x")
    with pytest.raises(ValueError, match=r"pattern must be a regular expression, got '\('"):
        TextConfig(train="a", document="pattern", pattern="(")
    with pytest.raises(ValueError, match="parts must name at least 1 source"):
        MixtureConfig(parts=())
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight must be above 0 and finite"):
            PartConfig(source=StdlibConfig(), weight=weight)


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason=f"needs WikiText-2 in {WIKITEXT}")
def test_wikitext_falls_into_articles():
    source = TextConfig(
        train=str(WIKITEXT / "valid.txt"),
        test=str(WIKITEXT / "test.txt"),
        document="pattern",
        pattern="^ = [^=].* = $",
    )
    found = _by_split(source, SplitConfig())
    # Two lines of the test split's formulas look like titles.
    for split, name, articles in (("train", "valid.txt", 60), ("test", "test.txt", 62)):
        assert "".join(found[split]).encode() == (WIKITEXT / name).read_bytes()
        assert len(found[split]) == articles
        assert all(text.strip().startswith("= ") for text in found[split])
