"""Tokenizers shared by unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from minisgl.tokenizer.tokenize import HFTextCodec
from tests.tokenizers_fixture import make_byte_level, make_sentencepiece


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> HFTextCodec:
    return HFTextCodec(str(make_byte_level(tmp_path_factory.mktemp("byte_level"))))


@pytest.fixture(scope="session")
def byte_level_bos(tmp_path_factory: pytest.TempPathFactory) -> HFTextCodec:
    return HFTextCodec(str(make_byte_level(tmp_path_factory.mktemp("byte_level_bos"), bos=True)))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> HFTextCodec:
    return HFTextCodec(str(make_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_byte_level(tmp_path / "model")
