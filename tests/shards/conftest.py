"""What tests of shards share."""

import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def jpegs(test_data: Path) -> list[bytes]:
    """40 real JPEGs of ImageNet."""
    with tarfile.open(test_data / "data" / "imagenet-250.tar") as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()][:40]
        return [file.read() for file in files if file]
