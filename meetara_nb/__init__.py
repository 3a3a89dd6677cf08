"""MeeTARA Lab: from a domain written in YAML to a checked GGUF file.

Importing the package is light: torch, transformers and llama.cpp load only when a stage needs them.
"""

__version__ = "0.1.0"
