"""TFDS datasets through `tfds.data_source`, prepared and read without TensorFlow."""

import collections
import json
import sys

import pytest

from maxlike.data import record_sources
from maxlike.errors import UserError

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("importlib_resources")

# A builder lives in a package of its own, from whose folder TFDS reads the metadata.
BUILDER = """
import json
import numpy as np
import tensorflow_datasets as tfds


class Tales(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"id": np.int64, "text": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        with open(PATH) as file:
            for number, text in enumerate(json.load(file)):
                yield number, {"id": number, "text": text}
"""


@pytest.fixture
def prepared(tmp_path, texts, monkeypatch):
    """A prepared dataset `tales` of the forty texts and an empty one; its folder."""
    (tmp_path / "texts.json").write_text(json.dumps([*texts, ""]))
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "__init__.py").write_text("")
    (tmp_path / "tales" / "builder.py").write_text(f"PATH = {str(tmp_path / 'texts.json')!r}\n{BUILDER}")
    monkeypatch.syspath_prepend(tmp_path)
    from tales.builder import Tales

    Tales(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    yield str(tmp_path / "tfds")
    for module in ("tales", "tales.builder"):
        sys.modules.pop(module)


def test_documents_parts_and_refusals(prepared, texts, cache, monkeypatch):
    monkeypatch.setattr(record_sources, "_RECORDS_A_PART", 16)
    source = record_sources.Tfds(name="tales", data_dir=prepared)
    skipped = collections.Counter()
    assert len(source.parts()) == 3
    found = [document for part in range(3) for document in source.read(part, skipped)]
    assert sorted(text for _, text in found) == sorted(texts)
    assert skipped == {"empty": 1}
    assert sorted(index for index, _ in found) == [i for i in range(41) if i in {index for index, _ in found}]
    half = record_sources.Tfds(name="tales", data_dir=prepared, split="train[:50%]")
    assert sum(1 for part in range(len(half.parts())) for _ in half.read(part, skipped)) in (19, 20)
    assert half.fingerprint(cache) != source.fingerprint(cache)
    with pytest.raises(UserError, match=r"Tfds\.split='test' of tales is unknown; it has train"):
        record_sources.Tfds(name="tales", data_dir=prepared, split="test").parts()
    with pytest.raises(UserError, match=r"Tfds\.field='body' is no text of tales; its features are id, text"):
        list(record_sources.Tfds(name="tales", data_dir=prepared, field="body").read(0, skipped))
    with pytest.raises(UserError, match=r"Tfds\.name='no_such_dataset' cannot be opened"):
        record_sources.Tfds(name="no_such_dataset", data_dir=prepared).parts()
    with pytest.raises(UserError, match=r"not prepared under .*Tfds\.download=True"):
        record_sources.Tfds(name="tales", data_dir=prepared + "x").parts()


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'maxlike\[data\]'"):
        record_sources.Tfds(name="tales").parts()
