"""The GGUF Factory: bases, adapters and merged models as GGUF files that are checked before they are named."""
