"""ChainForge: the DeepSeek-R1 recipe, whole, from one YAML, on TRL."""

__version__ = "0.1.0"
