"""The scripts of examples/ and the notebooks run and check themselves."""
