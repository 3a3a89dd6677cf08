"""The GPU Training Engine: a LoRA adapter from training data, within a time budget, resumable."""
