"""ChainForge: the whole DeepSeek-R1 recipe from one YAML file, on TRL."""

__version__ = "0.1.0"
