"""The adapters of every architecture, written once, and converted once into each format."""

import pytest

from readers.torchvision_operators import define_operators

# transformers imports torchvision where it is installed
define_operators()


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """architecture -> its `readers.cases.Case`."""
    from readers.cases import Case

    made = {}

    def make(architecture):
        if architecture not in made:
            made[architecture] = Case(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return make
