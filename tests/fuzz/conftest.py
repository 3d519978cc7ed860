"""How many examples hypothesis draws, by which seed, and the models that they are tried on.

`fixed` draws the same examples in every run, and belongs to every test run: a change fails by its
own fault alone. `random` draws other examples in every run, and is marked `long`. By hand,
`--hypothesis-profile many --hypothesis-seed=7` draws more, and shrinks what fails. No example is
kept in a database: a failure prints how to repeat it.
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


@pytest.fixture(params=["fixed", pytest.param("random", marks=pytest.mark.long)])
def examples(request):
    """Function of numbers of examples, `fixed`, `random` and `many` -> settings of a test."""
    is_fixed = request.param == "fixed"
    is_many = request.config.getoption("--hypothesis-profile") == "many"
    which = "many" if is_many and not is_fixed else request.param

    def drawn(**numbers):
        return settings(max_examples=numbers[which], derandomize=is_fixed)

    return drawn


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """family -> `fuzz.bases.Base`, each built and saved once."""
    from fuzz.bases import Bases

    return Bases(tmp_path_factory.mktemp("bases"))
