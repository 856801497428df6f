"""Sources of documents, their order, the split, and the errors of unusable ones."""

import hashlib
import json
import sys
import types

import numpy as np
import pytest

from infinicontext.data import corpora
from infinicontext.data.corpora import documents, load_corpus
from infinicontext.data.tokenizers import ByteTokenizer, word_tokenizer
from infinicontext.errors import UserError


@pytest.fixture(scope="module")
def python_corpus():
    return {split: load_corpus("python", ByteTokenizer(), split) for split in ("train", "validation")}


def test_python_corpus_is_large_and_split(python_corpus):
    train, validation = python_corpus["train"], python_corpus["validation"]
    assert train.bytes_per_document.sum() > 1_000_000
    assert len(validation) > 0
    assert not set(train.names) & set(validation.names)
    assert {"ast.py", "json/decoder.py"} <= set(train.names) | set(validation.names)
    assert not [name for name in train.names if "site-packages" in name or "__pycache__" in name]


def test_python_corpus_is_what_the_files_hold(python_corpus):
    corpus = python_corpus["train"]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.starts[-1] == len(corpus.tokens)
    texts = dict(documents("python"))
    for i in (0, len(corpus) // 2, len(corpus) - 1):
        ids = corpus.document(i)
        assert ids.dtype == np.int32
        assert ids[0] == ByteTokenizer.start_id
        assert ByteTokenizer().decode(ids) == texts[corpus.names[i]]
        assert corpus.bytes_per_document[i] == len(ids) - 1


def test_python_corpus_leaves_out_what_differs_between_installations(tmp_path, monkeypatch):
    for name in ["b.py", "a/c.rst", "a/topics.txt", "site-packages/x.py", "a/__pycache__/x.py", "_sysconfigdata_x.py", "a/data.jsonl"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    (tmp_path / "b.py").write_bytes("\ufeffb.py".encode())
    monkeypatch.setattr(corpora.sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    assert list(documents("python")) == [(name, name) for name in ["a/c.rst", "a/topics.txt", "b.py"]]


@pytest.fixture
def folder(tmp_path):
    """Two plain files, one of them below, and files that are not read."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "z.TXT").write_bytes("\ufeffline\r\né\n".encode())
    (tmp_path / "sub" / "a.md").write_text("# a")
    (tmp_path / "sub" / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / ".hidden" / "h.txt").write_text("hidden")
    return tmp_path


def test_folder_file_and_glob(folder):
    z = "line\r\né\n"
    assert list(documents(str(folder))) == [("sub/a.md", "# a"), ("z.TXT", z)]
    assert list(documents(str(folder / "z.TXT"))) == [("z.TXT", z)]
    found = list(documents(str(folder / "**" / "*")))
    assert found == [((folder / "sub" / "a.md").as_posix(), "# a"), ((folder / "z.TXT").as_posix(), z)]


def test_jsonl_has_a_document_per_line(tmp_path):
    texts = ["one", "", "line separator \u2028 inside", "two\nlines"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path = tmp_path / "books.jsonl"
    path.write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert list(documents(str(path))) == [("books.jsonl:1", "one"), ("books.jsonl:3", texts[2]), ("books.jsonl:4", texts[3])]


def test_parquet_has_a_document_per_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "books.parquet"
    parquet.write_table(pa.table({"text": ["one", "", "zwei é"], "id": [1, 2, 3]}), path, row_group_size=1)
    assert list(documents(str(path))) == [("books.parquet:0", "one"), ("books.parquet:2", "zwei é")]
    for table, message in [({"body": ["x"]}, 'columns body but no column "text"'), ({"text": ["x", None]}, "row 1 has no field")]:
        parquet.write_table(pa.table(table), path)
        with pytest.raises(UserError, match=message):
            list(documents(str(path)))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="as parquet"):
        list(documents(str(path)))


def test_huggingface_data_set(monkeypatch):
    class Rows(dict):
        column_names = ("text", "label")

    def load_dataset(name, split):
        if name != "org/books":
            raise FileNotFoundError(f"{name} not found")
        return Rows(text=[f"{split} text", ""]) if split != "bare" else types.SimpleNamespace(column_names=["body"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(documents("hf:org/books")) == [("org/books:0", "train text")]
    assert list(documents("hf:org/books:test")) == [("org/books:0", "test text")]
    with pytest.raises(UserError, match="org/none not found"):
        list(documents("hf:org/none"))
    with pytest.raises(UserError, match='columns body but no column "text"'):
        list(documents("hf:org/books:bare"))


@pytest.mark.parametrize(("module", "source", "extra"), [("datasets", "hf:x", "hf"), ("pyarrow.parquet", "x.parquet", "parquet")])
def test_missing_optional_package_says_what_to_install(tmp_path, monkeypatch, module, source, extra):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install \"infinicontext\[{extra}\]\""):
        list(documents(source))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r'a\.txt" is not UTF-8 text \(at byte 3\)'),
        ("a.txt", b"", "holds no text"),
        ("a.pdf", b"x", r'a\.pdf"; a file must be one of \.txt'),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r'a\.jsonl", line 2 is not valid JSON'),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}', r'a\.jsonl", line 3 has no field "text" that is a string'),
        ("a.jsonl", b'["text"]', "line 1 has no field"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no field"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 has a lone surrogate"),
    ],
)
def test_unusable_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"data.source.*{message}"):
        list(documents(str(path)))


def test_unusable_file_in_a_folder_is_named(folder):
    (folder / "sub" / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r'bad\.txt" is not UTF-8'):
        list(documents(str(folder)))
    (folder / "sub" / "bad.txt").unlink()
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=r'cannot read .*gone\.txt": No such file'):
        list(documents(str(folder)))


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(UserError, match="no file or folder; it must be"):
        list(documents(str(tmp_path / "missing")))
    for source in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(UserError, match="holds no text"):
            list(documents(str(source)))


def test_split_depends_on_the_text_alone(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    for order, name in ((texts, "one"), ([*texts[::-1], *texts], "two")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))

    def split(name, split, fraction=0.3):
        corpus = load_corpus(str(tmp_path / f"{name}.jsonl"), ByteTokenizer(), split, fraction)
        return [ByteTokenizer().decode(corpus.document(i)) for i in range(len(corpus))]

    train, validation = set(split("one", "train")), set(split("one", "validation"))
    assert train | validation == set(texts)
    assert not train & validation
    assert 60 < len(validation) < 120
    assert (set(split("two", "train")), set(split("two", "validation"))) == (train, validation)
    assert set(split("one", "validation", 0.1)) < validation
    assert all((int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < 0.3 * 2**32) == (text in validation) for text in texts)


def test_empty_split_is_a_user_error(tmp_path):
    (tmp_path / "book.txt").write_text("one document is on one side only")
    sides = []
    for split in ("train", "validation"):
        try:
            load_corpus(str(tmp_path), ByteTokenizer(), split)
        except UserError as error:
            sides.append(str(error))
    assert len(sides) == 1
    assert "data.validation_fraction 0.05" in sides[0]


def test_fingerprint_tells_tokens_and_boundaries_apart(tmp_path):
    def fingerprint(*texts, start_id=None):
        tokenizer = word_tokenizer(["a b"])
        tokenizer.start_id = start_id
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return load_corpus(str(tmp_path), tokenizer, "train", 0.0).fingerprint()

    assert fingerprint("a b", "a") == fingerprint("a  b", "a")
    assert len({fingerprint("a b", "a"), fingerprint("a", "b a"), fingerprint("b a", "a"), fingerprint("a b", "a", start_id=1)}) == 4
