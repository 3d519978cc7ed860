"""Which versions of Python and of other libraries the package was run with."""
