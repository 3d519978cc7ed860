"""Every family of models that transformers has, and families outside its experts interface."""
