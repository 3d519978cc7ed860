"""Profiles of hypothesis, and a folder for each process that is made and removed once.

`quick` runs in every test run. `--hypothesis-profile many` runs 500 configurations and 1000 damaged
files by hand. No example is kept in a database: a failure prints how to repeat it.
"""

import tempfile

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.configuration import set_hypothesis_home_dir

# nothing may be written into the tree, not even what hypothesis caches for itself
set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))

_COMMON = {
    "database": None,
    # an example takes up to a second, on a busy machine longer
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}
# without shrinking, which would take minutes
settings.register_profile("quick", phases=[Phase.explicit, Phase.generate], **_COMMON)
settings.register_profile("many", verbosity=Verbosity.normal, **_COMMON)
settings.load_profile("quick")


@pytest.fixture
def many(request):
    """Whether the tests draw as many examples as they do by hand."""
    return request.config.getoption("--hypothesis-profile") == "many"


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """family -> `fuzz.bases.Base`, each built and saved once."""
    from fuzz.bases import Bases

    return Bases(tmp_path_factory.mktemp("bases"))
